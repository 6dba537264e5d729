"""Every base obeys its interface, and quantizes better with more bits."""

import itertools

import pytest
import torch

from vllm_requant.format import QuantizedLayer
from vllm_requant.offline.bases import BASES, Base

ROWS, COLUMNS, GROUP = 16, 200, 64


def _all_bases() -> list[tuple[str, int]]:
    return [(name, bits) for name, base in BASES.items() for bits in base.bits]


def _inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    fisher = torch.randn(ROWS, COLUMNS, generator=generator).pow(2)
    return weight, fisher


def _base(name: str, bits: int) -> Base:
    return BASES[name](bits, GROUP)


@pytest.mark.parametrize(("name", "bits"), _all_bases())
def test_result_is_a_valid_layer_of_the_promised_spec(name: str, bits: int) -> None:
    weight, fisher = _inputs()
    base = _base(name, bits)
    dense = base.quantize(weight, fisher=fisher)
    assert dense.spec == base.spec(COLUMNS, ROWS)
    QuantizedLayer(dense.spec, dense.tensors).check(name=name)


@pytest.mark.parametrize("name", BASES)
def test_error_falls_with_bits(name: str) -> None:
    weight, fisher = _inputs()
    errors = [
        float(((_base(name, bits).quantize(weight, fisher=fisher).weight() - weight) ** 2 * fisher).sum())
        for bits in BASES[name].bits
    ]
    # a bit more divides the squared error by about 4
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(("name", "bits"), _all_bases())
def test_removed_weights_do_not_influence_the_rest(name: str, bits: int) -> None:
    weight, fisher = _inputs()
    removed = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    removed[:, ::17] = True
    wild = weight.masked_fill(removed, 100.0)
    tame = weight.masked_fill(removed, 0.001)
    base = _base(name, bits)
    with_wild = base.quantize(wild, removed=removed, fisher=fisher).weight()
    with_tame = base.quantize(tame, removed=removed, fisher=fisher).weight()
    assert torch.equal(with_wild[~removed], with_tame[~removed])
    # without removal they do, or the test above would prove nothing
    assert not torch.equal(base.quantize(wild, fisher=fisher).weight()[~removed], with_wild[~removed])


@pytest.mark.parametrize("bits", BASES["rtn"].bits)
def test_rtn_error_is_at_most_half_a_step(bits: int) -> None:
    weight, _ = _inputs()
    dense = _base("rtn", bits).quantize(weight)
    group = torch.arange(COLUMNS) // GROUP
    step = dense.tensors["scales"].float()[:, group]
    # half a step, plus another half where the rounded zero point clips an extreme, plus the scale's own rounding
    assert ((dense.weight() - weight).abs() <= step * (1 + 2.0**-10 * (1 << bits)) + 1e-7).all()
    inner = (weight.abs() < 0.6 * weight.abs().amax()) & (step > 0)
    assert ((dense.weight() - weight).abs() <= 0.5001 * step + 1e-7)[inner].float().mean() > 0.99


def test_rtn_keeps_zero_exactly() -> None:
    """Zero is representable in every group, also where all weights have one sign."""
    weight, _ = _inputs()
    weight = weight.abs()
    weight[:, ::5] = 0
    assert (_base("rtn", 3).quantize(weight).weight()[:, ::5] == 0).all()


def test_rtn_survives_a_constant_group() -> None:
    weight = torch.zeros(4, 128)
    dense = _base("rtn", 4).quantize(weight)
    QuantizedLayer(dense.spec, dense.tensors).check(name="zero")
    assert (dense.weight() == 0).all()


def test_squeezellm_follows_the_fisher_information() -> None:
    """Weights that matter more are represented better."""
    weight, _ = _inputs()
    important = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    important[:, :8] = True
    fisher = torch.where(important, 1e4, 1.0)
    error = (_base("squeezellm", 3).quantize(weight, fisher=fisher).weight() - weight).abs()
    flat = (_base("squeezellm", 3).quantize(weight, fisher=torch.ones_like(weight)).weight() - weight).abs()
    assert error[important].mean() < 0.3 * flat[important].mean()
    assert error[~important].mean() > flat[~important].mean()


def test_squeezellm_without_fisher_is_refused() -> None:
    with pytest.raises(ValueError, match="Fisher"):
        _base("squeezellm", 4).quantize(_inputs()[0])
