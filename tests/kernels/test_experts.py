"""A mixture of experts equals its formula, whatever tokens go where."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vllm_requant.kernels import cpu, experts

from .conftest import Layer

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 128, 96, 6, 3
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
Make = Callable[..., Layer]


def mixture(make_layer: Make, kind: str, *, stacked: bool) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
    """Joined weights, and of every expert gate over up, and down, in float32."""
    group = 0 if kind == "lut" else 32
    packed, meaning = [], []
    for number in range(EXPERTS):
        both = [
            make_layer(kind, 4, group, rows, HIDDEN, density=0.01, seed=10 * number + i)
            for i, rows in enumerate([2 * INTERMEDIATE] if stacked else [INTERMEDIATE, INTERMEDIATE])
        ]
        down = make_layer(kind, 4, group, HIDDEN, INTERMEDIATE, density=0.01, seed=10 * number + 5)
        packed.append(([layer.repack()["packed"] for layer in both], down.repack()["packed"]))
        meaning.append((torch.cat([layer.weight() for layer in both]), down.weight()))
    return experts.join(packed), meaning


def routed(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    # expert 5 gets no token
    ids = torch.rand(tokens, EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    return x, torch.rand(tokens, TOP_K, generator=generator), ids


def formula(meaning: list[tuple[Tensor, Tensor]], x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token, numbers in enumerate(ids.tolist()):
        for place, number in enumerate(numbers):
            if number >= 0:
                gate_up, down = (weight.double() for weight in meaning[number])
                gate, up = (gate_up @ x[token].double()).chunk(2)
                result[token] += routing[token, place] * (down @ (torch.nn.functional.silu(gate) * up))
    return result


def compute(weights: dict[str, Tensor], x: Tensor, routing: Tensor, ids: Tensor) -> Tensor:
    return experts.packed_experts(x, routing, ids, weights, intermediate=INTERMEDIATE, activation="silu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["uniform", "lut"])
@pytest.mark.parametrize("stacked", [True, False])
def test_sum_over_a_tokens_experts(make_layer: Make, dtype: torch.dtype, kind: str, stacked: bool) -> None:
    weights, meaning = mixture(make_layer, kind, stacked=stacked)
    # the last one sends an expert more tokens than are multiplied from codes
    for tokens in (1, 5, 200):
        x, routing, ids = routed(tokens, dtype)
        expected = formula(meaning, x, routing, ids)
        y = compute(weights, x, routing, ids)
        assert y.dtype == dtype
        assert (y.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_experts_that_are_elsewhere_add_nothing(make_layer: Make) -> None:
    weights, meaning = mixture(make_layer, "uniform", stacked=True)
    x, routing, ids = routed(9, torch.float32)
    here = torch.where(ids % 2 == 0, ids, -1)
    expected = formula(meaning, x, routing, here)
    off = (compute(weights, x, routing, here).double() - expected).abs().max()
    assert off <= TOLERANCE[torch.float32] * expected.abs().max()
    assert not compute(weights, x, routing, torch.full_like(ids, -1)).any()


def test_no_tokens(make_layer: Make) -> None:
    weights, _ = mixture(make_layer, "uniform", stacked=True)
    assert compute(weights, *(tensor[:0] for tensor in routed(3, torch.bfloat16))).shape == (0, HIDDEN)


def test_a_token_has_the_same_result_in_any_batch(make_layer: Make) -> None:
    weights, _ = mixture(make_layer, "lut", stacked=True)
    x, routing, ids = routed(cpu.SMALL_BATCH, torch.bfloat16)
    together = compute(weights, x, routing, ids)
    for token in range(len(x)):
        one = slice(token, token + 1)
        assert torch.equal(compute(weights, x[one], routing[one], ids[one]), together[one])


def test_torch_accepts_the_op(make_layer: Make) -> None:
    weights, _ = mixture(make_layer, "uniform", stacked=True)
    arguments = (*routed(4, torch.bfloat16), weights["packed"], weights["pieces"], INTERMEDIATE, "silu", 2)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.requant.packed_experts.default, arguments, test_utils=checks)


def test_unknown_activation(make_layer: Make) -> None:
    weights, _ = mixture(make_layer, "uniform", stacked=True)
    with pytest.raises(ValueError, match="activation is 'relu', must be one of silu"):
        experts.packed_experts(*routed(1, torch.float32), weights, intermediate=INTERMEDIATE, activation="relu")
