"""Paths obey the trellis and are as good as published; QTIP's weights decode to what was searched for."""

import itertools

import pytest
import torch

from vllm_requant.format import QuantizedLayer
from vllm_requant.kernels.reference import TILE, trellis_code, trellis_states
from vllm_requant.offline.bases import LayerData, Qtip, Rtn
from vllm_requant.offline.bases.feedback import reversed_factor, reversed_feedback
from vllm_requant.offline.bases.qtip import _pack, code_fit, hadamard_block
from vllm_requant.offline.bases.viterbi import closed_paths, trellis_path
from vllm_requant.offline.statistics import InputStatistics

# Mean squared error on unit Gaussian values, the measurement of others for this code, open paths of 256.
PUBLISHED = {(8, 2): 0.0833, (8, 3): 0.0253, (8, 4): 0.0093, (10, 2): 0.0760, (10, 3): 0.0209, (10, 4): 0.0060}
PUBLISHED |= {(12, 2): 0.0703, (12, 3): 0.0189, (12, 4): 0.0053}


def _gaussian(sequences: int, length: int) -> torch.Tensor:
    return torch.randn(sequences, length, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("bits", "state_bits"), [(2, 8), (3, 8), (4, 8), (2, 12), (4, 12)])
@pytest.mark.parametrize("rotations", [0, 1, 3])
def test_states_are_windows_of_a_string(bits: int, state_bits: int, rotations: int) -> None:
    states = trellis_path(_gaussian(9, TILE), trellis_code(state_bits) / 147, bits, rotations=rotations).long()
    kept = (1 << (state_bits - bits)) - 1
    assert ((states[:, :-1] >> bits) == (states[:, 1:] & kept)).all()
    if rotations:
        assert ((states[:, -1] >> bits) == (states[:, 0] & kept)).all()
        spec = Qtip(bits, state_bits).spec(16, 16)
        packed = _pack(states[:2].view(1, 2, TILE).int(), spec)
        assert torch.equal(trellis_states(packed[0], bits=bits, state_bits=state_bits), states[:2])


@pytest.mark.parametrize(("state_bits", "bits"), [(8, 2), (8, 3), (10, 4)])
def test_open_path_is_the_best_there_is(state_bits: int, bits: int) -> None:
    """Against exhaustive search over all strings of three values."""
    code = trellis_code(state_bits) / 147
    x = _gaussian(6, 3)
    states = trellis_path(x, code, bits, rotations=0).long()
    found = (code[states] - x).square().sum(1)
    length = state_bits + 2 * bits
    strings = torch.arange(1 << length)
    windows = torch.stack([(strings >> (i * bits)) & ((1 << state_bits) - 1) for i in range(3)], dim=1)
    for row, error in zip(x, found, strict=True):
        best = (code[windows] - row).square().sum(1).min()
        torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("state_bits", "bits"), PUBLISHED)
def test_gaussian_distortion_is_as_published(state_bits: int, bits: int) -> None:
    x = _gaussian(96, 256)
    code = trellis_code(state_bits) * code_fit(bits, state_bits).scale
    error = float((code[trellis_path(x, code, bits, rotations=0).long()] - x).square().mean())
    # the sample has a mean square of its own
    assert error / float(x.square().mean()) < 1.03 * PUBLISHED[state_bits, bits]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_closing_a_string_costs_little(bits: int) -> None:
    """An open path has the free bits of its first window; over 1024 values they hardly count."""
    x = _gaussian(24, 1024)
    code = trellis_code(12) * code_fit(bits, 12).scale

    def error(values: torch.Tensor, rotations: int) -> float:
        return float((code[trellis_path(values, code, bits, rotations=rotations).long()] - values).square().mean())

    free = error(x, 0)
    assert error(x, 1) < 1.02 * free
    # and short closed strings are as accurate as long ones
    assert error(x.view(-1, TILE), 1) < 1.04 * free


def test_more_rotations_are_never_worse() -> None:
    x, code = _gaussian(30, 64), trellis_code(10) / 147
    errors = [(code[trellis_path(x, code, 2, rotations=r).long()] - x).square().sum(1) for r in (1, 2, 4)]
    # the first try is among those of two, and so on
    assert all((later <= earlier + 1e-4).all() for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("rotations", [0, 1, 3])
@pytest.mark.parametrize("bits", [1, 2, 5])
def test_tensor_operations_find_paths_as_good(bits: int, rotations: int) -> None:
    """They serve other devices than the CPU."""
    x, code = _gaussian(20, 48), trellis_code(10) * code_fit(bits, 10).scale
    native = trellis_path(x, code, bits, rotations=rotations).long()
    tensor = closed_paths(x, code, bits, rotations=rotations).long()
    expected, found = ((code[states] - x).square().sum(1) for states in (native, tensor))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    windows = tensor if rotations == 0 else torch.cat([tensor, tensor[:, :1]], dim=1)
    assert torch.equal(windows[:, 1:] & ((1 << (10 - bits)) - 1), windows[:, :-1] >> bits)


def test_impossible_trellis_is_refused() -> None:
    with pytest.raises(ValueError, match="5 state bits and 2 bits"):
        trellis_path(_gaussian(1, 16), torch.zeros(32), 2)


@pytest.mark.parametrize("width", [1, 2, 8])
def test_block_feedback_completes_the_square(width: int) -> None:
    x = torch.randn(100, 24, generator=torch.Generator().manual_seed(0))
    hessian = x.t() @ x
    rows = hessian.__getitem__
    factor = reversed_factor(rows, 24, 0.01).flip(0, 1)
    assert torch.equal(factor, factor.triu())
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(factor @ factor.t(), damped)
    feedback = reversed_feedback(rows, 24, width).flip(0, 1)
    for first in range(0, 24, width):
        own = feedback[first : first + width, first : first + width]
        torch.testing.assert_close(own, torch.eye(width, dtype=torch.float64), atol=1e-5, rtol=0)
        assert (feedback[first + width :, first : first + width].abs() < 1e-6).all()
        if first == 0:
            continue
        # the best later errors for given earlier ones, from the normal equations
        best = torch.linalg.solve(damped[first:, first:], damped[first:, :first]).t()[:, :width]
        torch.testing.assert_close(feedback[:first, first : first + width], best, atol=1e-4, rtol=1e-3)


def _layer(rows: int = 64, columns: int = 192) -> LayerData:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, columns, generator=generator) @ torch.randn(columns, columns, generator=generator) / 14
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    weight[3, 50] = 2.0  # an outlier: incoherence spreads it
    return LayerData(weight, inputs=InputStatistics(x.t() @ x / len(x), x.abs().mean(0)))


def test_every_bit_divides_the_error() -> None:
    layer = _layer()
    error = [_error(layer, Qtip(bits, state_bits=12).quantize(layer).weight()) for bits in range(1, 7)]
    for wider, narrower in itertools.pairwise(reversed(error)):
        assert wider < 0.4 * narrower, error


def _error(layer: LayerData, weight: torch.Tensor) -> float:
    error = weight - layer.weight
    return float((error @ layer.require_inputs().hessian * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_layer_is_valid_and_beats_rounding(bits: int) -> None:
    layer = _layer()
    base = Qtip(bits, state_bits=10)
    dense = base.quantize(layer)
    assert dense.spec == base.spec(192, 64)
    QuantizedLayer(dense.spec, dense.tensors).check(name="m")
    assert dense.spec.bits_per_weight < bits + 0.05
    assert _error(layer, dense.weight()) < 0.5 * _error(layer, Rtn(bits, 32).quantize(layer).weight())


def test_feedback_and_state_bits_pay() -> None:
    layer = _layer()
    deaf = LayerData(layer.weight, inputs=InputStatistics(torch.eye(192), torch.ones(192)))
    errors = [_error(layer, Qtip(2, bits).quantize(layer).weight()) for bits in (8, 10, 12)]
    assert errors[0] > errors[1] > errors[2]
    assert _error(layer, Qtip(2, 10).quantize(deaf).weight()) > 1.1 * errors[1]


def test_layers_of_one_width_share_their_input_signs() -> None:
    base = Qtip(2, 8)
    one, two = (base.quantize(_layer(rows)).tensors for rows in (32, 64))
    assert torch.equal(one["signs_in"], two["signs_in"])
    assert not torch.equal(one["signs_in"], torch.zeros_like(one["signs_in"]))


def test_a_layer_of_zeros_stays_zero() -> None:
    layer = LayerData(torch.zeros(32, 64), inputs=InputStatistics(torch.eye(64), torch.ones(64)))
    assert (Qtip(2, 8).quantize(layer).weight() == 0).all()


def test_block_sizes() -> None:
    assert [hadamard_block(n) for n in (4096, 576, 1536, 96, 80)] == [128, 64, 128, 32, 16]
    with pytest.raises(ValueError, match="100 features are not a multiple of 16"):
        hadamard_block(100)
