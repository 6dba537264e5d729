"""Every base obeys its interface, and quantizes better with more bits."""

import itertools
from dataclasses import replace

import pytest
import torch

from vllm_requant.format import QuantizedLayer
from vllm_requant.offline.bases import BASES, Base, LayerData
from vllm_requant.offline.bases.squeezellm import feedback_codes, least_squares_table
from vllm_requant.offline.statistics import InputStatistics

ROWS, COLUMNS, GROUP = 16, 208, 64


def _all_bases() -> list[tuple[str, int]]:
    return [(name, bits) for name, base in BASES.items() for bits in base.bits]


def _layer(seed: int = 0) -> LayerData:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator) * 0.05
    fisher = torch.randn(ROWS, COLUMNS, generator=generator).pow(2)
    # inputs of uneven size that are correlated, as activations are
    x = torch.randn(1000, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator) / 14
    x *= torch.linspace(0.2, 3, COLUMNS)
    return LayerData(weight, fisher, InputStatistics(x.t() @ x / len(x), x.abs().mean(0)))


def _with(weight: torch.Tensor) -> LayerData:
    return replace(_layer(), weight=weight)


def _base(name: str, bits: int) -> Base:
    base = BASES[name]
    return base(bits, **{"group_size": GROUP} if "group_size" in base.options else {})


@pytest.mark.parametrize(("name", "bits"), _all_bases())
def test_result_is_a_valid_layer_of_the_promised_spec(name: str, bits: int) -> None:
    base = _base(name, bits)
    dense = base.quantize(_layer())
    assert dense.spec == base.spec(COLUMNS, ROWS)
    QuantizedLayer(dense.spec, dense.tensors).check(name=name)
    assert all(tensor.is_contiguous() for tensor in dense.tensors.values()), "files hold nothing else"


@pytest.mark.parametrize("name", BASES)
def test_error_falls_with_bits(name: str) -> None:
    layer = _layer()
    hessian = layer.require_inputs().hessian
    errors = []
    for bits in BASES[name].bits:
        error = _base(name, bits).quantize(layer).weight() - layer.weight
        errors.append(float((error @ hessian * error).sum()))
    # a bit more divides the squared error by about 4
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(("name", "bits"), _all_bases())
def test_removed_weights_do_not_influence_the_rest(name: str, bits: int) -> None:
    weight = _layer().weight
    removed = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    removed[:, ::17] = True
    wild = weight.masked_fill(removed, 100.0)
    tame = weight.masked_fill(removed, 0.001)
    base = _base(name, bits)
    with_wild = base.quantize(_with(wild), removed).weight()
    with_tame = base.quantize(_with(tame), removed).weight()
    assert torch.equal(with_wild[~removed], with_tame[~removed])
    # without removal they do, or the test above would prove nothing
    assert not torch.equal(base.quantize(_with(wild)).weight()[~removed], with_wild[~removed])


@pytest.mark.parametrize("bits", BASES["rtn"].bits)
def test_rtn_error_is_at_most_half_a_step(bits: int) -> None:
    weight = _layer().weight
    dense = _base("rtn", bits).quantize(LayerData(weight))
    group = torch.arange(COLUMNS) // GROUP
    step = dense.tensors["scales"].float()[:, group]
    # half a step, plus another half where the rounded zero point clips an extreme, plus the scale's own rounding
    assert ((dense.weight() - weight).abs() <= step * (1 + 2.0**-10 * (1 << bits)) + 1e-7).all()
    inner = (weight.abs() < 0.6 * weight.abs().amax()) & (step > 0)
    assert ((dense.weight() - weight).abs() <= 0.5001 * step + 1e-7)[inner].float().mean() > 0.99


def test_rtn_keeps_zero_exactly() -> None:
    """Zero is representable in every group, also where all weights have one sign."""
    weight = _layer().weight.abs()
    weight[:, ::5] = 0
    assert (_base("rtn", 3).quantize(LayerData(weight)).weight()[:, ::5] == 0).all()


def test_rtn_survives_a_constant_group() -> None:
    weight = torch.zeros(4, 128)
    dense = _base("rtn", 4).quantize(LayerData(weight))
    QuantizedLayer(dense.spec, dense.tensors).check(name="zero")
    assert (dense.weight() == 0).all()


def test_squeezellm_follows_the_fisher_information() -> None:
    """Weights that matter more are represented better."""
    weight = _layer().weight
    important = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    important[:, :8] = True
    fisher = torch.where(important, 1e4, 1.0)
    error = (_base("squeezellm", 3).quantize(LayerData(weight, fisher)).weight() - weight).abs()
    flat = (_base("squeezellm", 3).quantize(LayerData(weight, torch.ones_like(weight))).weight() - weight).abs()
    assert error[important].mean() < 0.3 * flat[important].mean()
    assert error[~important].mean() > flat[~important].mean()


@pytest.mark.parametrize(("name", "what"), [("squeezellm", "Fisher"), ("gptq", "inputs"), ("awq", "inputs")])
def test_what_a_base_needs_is_demanded(name: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        _base(name, 4).quantize(LayerData(_layer().weight))


def _output_error(name: str, layer: LayerData, bits: int) -> float:
    error = _base(name, bits).quantize(layer).weight() - layer.weight
    return float((error @ layer.require_inputs().hessian * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_looking_at_the_inputs_lowers_the_output_error(bits: int) -> None:
    layer = _layer()
    rtn, clipped, gptq = (_output_error(name, layer, bits) for name in ("rtn", "awq", "gptq"))
    assert clipped < rtn
    assert gptq < 0.8 * clipped


def test_gptq_compensates_around_exact_weights() -> None:
    """Columns that the sparse part holds exactly take part in the feedback, at no error of their own."""
    layer = _layer()
    hessian = layer.require_inputs().hessian
    exact = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    exact[:, ::9] = True

    def error(removed: torch.Tensor | None) -> float:
        weight = _base("gptq", 3).quantize(layer, removed).weight()
        left = torch.where(exact, layer.weight, weight) - layer.weight
        return float((left @ hessian * left).sum())

    assert error(exact) < 0.9 * error(None)


@pytest.mark.parametrize("name", BASES)
def test_refit_obeys_the_interface(name: str) -> None:
    layer, base = _layer(), _base(name, 3)
    exact = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    exact[:, ::9] = True
    dense = base.refit(layer, base.quantize(layer), exact)
    assert dense.spec == base.spec(COLUMNS, ROWS)
    QuantizedLayer(dense.spec, dense.tensors).check(name=name)
    assert all(tensor.is_contiguous() for tensor in dense.tensors.values()), "files hold nothing else"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refitted_tables_lower_the_output_error(bits: int) -> None:
    layer, base = _layer(), _base("squeezellm", bits)
    hessian = layer.require_inputs().hessian
    exact = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    exact[:, ::9] = True

    def error(weight: torch.Tensor) -> float:
        left = torch.where(exact, layer.weight, weight) - layer.weight
        return float((left @ hessian * left).sum())

    dense = base.quantize(layer, exact)
    assert error(base.refit(layer, dense, exact).weight()) < 0.6 * error(dense.weight())


def test_least_squares_table_is_the_optimum() -> None:
    layer = _layer()
    hessian = layer.require_inputs().hessian
    exact = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) < 0.1
    start = torch.linspace(-0.1, 0.1, 8).expand(ROWS, 8)
    codes = feedback_codes(layer.weight, hessian, start, exact)
    table = least_squares_table(layer.weight, hessian, codes, start, exact)

    def error(table: torch.Tensor) -> torch.Tensor:
        left = (table.gather(1, codes.long()) - layer.weight) * ~exact
        return (left @ hessian * left).sum(1)

    best = error(table)
    assert (best < error(start)).all()
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert (best <= error(table + 1e-3 * torch.randn(ROWS, 8, generator=generator)) * (1 + 1e-4)).all()


@pytest.mark.parametrize("name", BASES)
def test_expected_errors_stand_to_each_other_as_the_real_ones(name: str) -> None:
    layer = _layer()
    expected, real = [], []
    for bits in BASES[name].bits:
        base = _base(name, bits)
        expected.append(base.expected_error(layer))
        real.append(layer.error(base.quantize(layer).weight()))
    for one, other in itertools.pairwise(range(len(real))):
        assert expected[other] / expected[one] == pytest.approx(real[other] / real[one], rel=0.6)
