"""Products and look-ups equal reference.py on every instruction set, within derived bounds.

An activation is off by at most half a step of its chunk, a table entry by half a step of its row; products and sums of
a chunk are exact. Sums of K chunks in float32, with factors, err by at most about K · 2⁻²³ of the sum of magnitudes in
any order; the result is rounded once more to the type of x. The bound is taken against the product in float64. Where
batches are multiplied as dequantized panels, weights are rounded to bfloat16 if x is bfloat16, which adds
2⁻⁸ · Σ|x||w|. Dequantized weights must be equal bit by bit.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vllm_requant import kernels
from vllm_requant.kernels import cpu, ops
from vllm_requant.kernels.ops import planes_for

from .conftest import Layer

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
DTYPES = tuple(ROUNDOFF)
FORMATS = [("uniform", bits, group) for bits in (2, 3, 4, 8) for group in (32, 64, 96, 128)]
FORMATS += [("lut", bits, 0) for bits in (2, 3, 4)]


CHUNK = 64
STEPS = {1: 127.0, 2: 127.0 * 2**8, 3: 127.0 * 2**16}
ENTRIES = {1: 2.0**13, 2: 2.0**13, 3: 2.0**20}
"""Steps from zero to the largest activation of a chunk, and to the largest entry of a row's table, by bytes."""


def rounding(x: Tensor, layer: Layer, planes: int) -> Tensor:
    """What half a step of every activation, and of every entry, can add up to: float64 ``[batch, rows]``."""
    pad = -x.shape[1] % CHUNK
    chunks = torch.nn.functional.pad(x.double(), (0, pad)).view(len(x), -1, CHUNK)
    w = layer.dense().double()
    weights = torch.nn.functional.pad(w.abs(), (0, pad)).view(len(w), -1, CHUNK).sum(2)
    bound = (chunks.abs().amax(2) / STEPS[planes] / 2 * 1.001) @ weights.T
    if layer.kind == "lut":
        largest = layer.tensors["lookup_table"].double().abs().amax(1)
        bound = bound + 1.02 * x.double().abs().sum(1)[:, None] * (largest / ENTRIES[planes] / 2)
    return bound


def assert_product(
    y: Tensor, x: Tensor, layer: Layer, *, activation_bits: int = 16, rounded_weights: bool = False
) -> None:
    weight = layer.weight()
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], weight.shape[0])
    y, flat = y.double().reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
    true, magnitude = flat.double() @ weight.double().T, flat.double().abs() @ weight.double().abs().T
    off = rounding(flat, layer, planes_for(x.dtype, activation_bits))
    # codes and zero points are multiplied apart: both are up to 2^bits steps where their difference may be small
    if layer.kind == "uniform":
        magnitude = magnitude + flat.double().abs() @ layer.steps().double().T
    off = off + (2 * weight.shape[1] / CHUNK + 24) * 2.0**-23 * magnitude
    off = off + (2 * weight.shape[1] * 2.0**-24 + 2.0**-8) * magnitude * rounded_weights
    # 2⁻²⁴ is the spacing of the smallest float16 values
    excess = (y - true).abs() - off - ROUNDOFF[x.dtype] * (true.abs() + off) - 2.0**-24
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than the bound"


def activations(batch: int, columns: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(batch, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("kind", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize("density", [0.0, 0.03])
def test_weights_and_products_equal_the_reference(
    make_layer: Callable, isa: str, kind: str, bits: int, group_size: int, density: float
) -> None:
    # 576: SmolLM2's width, a tail of 64; 100 and 33: odd tails; 1000: tails of 64, 32 and 8; 5: no full lane
    for rows, columns in ((9, 576), (7, 100), (4, 33), (6, 1000), (3, 5), (8, 256), (1, 7 * 32)):
        layer = make_layer(kind, bits, group_size, rows, columns, density=density)
        weight, packed = layer.weight(), layer.repack()
        for dtype in DTYPES:
            everything = layer.embedding(torch.arange(rows), dtype, packed)
            assert torch.equal(everything, weight.to(dtype)), (columns, dtype)
            for batch in (1, 2, 7):
                x = activations(batch, columns, dtype)
                for bits_of_x in (16, 8):
                    assert_product(
                        layer.linear(x, packed, activation_bits=bits_of_x), x, layer, activation_bits=bits_of_x
                    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_shapes(make_layer: Callable, isa: str, data: st.DataObject) -> None:
    kind, bits, group_size = data.draw(st.sampled_from([*FORMATS, ("uniform", 4, 160), ("uniform", 3, 65536)]))
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 700))
    density = data.draw(st.sampled_from([0.0, 0.002, 0.3, 1.0]))
    layer = make_layer(kind, bits, group_size, rows, columns, density=density, seed=data.draw(st.integers(0, 9)))
    x = activations(data.draw(st.integers(1, 40)), columns, data.draw(st.sampled_from(DTYPES)))
    short = data.draw(st.sampled_from([8, 16]))
    y = layer.linear(x, activation_bits=short)
    assert_product(y, x, layer, activation_bits=short, rounded_weights=x.dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("batch", [17, 64])
@pytest.mark.parametrize(("kind", "bits", "group_size"), [("uniform", 4, 64), ("uniform", 3, 96), ("lut", 3, 0)])
def test_large_batch(
    make_layer: Callable,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bits: int,
    group_size: int,
    batch: int,
    native: bool,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(ops, "PANEL_BYTES", 1)  # panels of 64 rows: two full ones and a rest
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    monkeypatch.setattr(cpu, "fused_batch", lambda packed, dtype: cpu.SMALL_BATCH)
    layer = make_layer(kind, bits, group_size, 150, 576, density=0.01)
    x = activations(batch, 576, dtype)
    # the function, not the op: if transformers has imported this folder as `kernels` before, the op calls that one's
    y = ops._packed_linear_any(x, layer.repack()["packed"], 150, planes_for(dtype))
    assert_product(y, x, layer, rounded_weights=native and dtype == torch.bfloat16)


@pytest.mark.parametrize(("kind", "bits", "group_size"), [("uniform", 4, 32), ("lut", 4, 0)])
def test_a_row_has_one_result_in_every_small_batch(
    make_layer: Callable, isa: str, kind: str, bits: int, group_size: int
) -> None:
    # more windows than the residual is computed of at a time, of 16 activations as of 6; columns are no whole vectors
    layer = make_layer(kind, bits, group_size, 745, 610, density=0.02)
    packed, x = layer.repack(), activations(cpu.SMALL_BATCH, 610, torch.float32)
    together = layer.linear(x, packed)
    for batch in (1, 3, 4, 6, 15):
        assert torch.equal(layer.linear(x[:batch], packed), together[:batch])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["uniform", "lut"])
def test_result_does_not_depend_on_the_thread_count(
    make_layer: Callable, isa: str, kind: str, dtype: torch.dtype
) -> None:
    # large enough for cpu/dispatch.cpp to share it; rows are no multiple of any tile
    layer = make_layer(kind, 4, 64 if kind == "uniform" else 0, 1031, 576, density=0.01)
    packed, x = layer.repack(), activations(5, 576, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((layer.linear(x[:1], packed), layer.linear(x, packed)))
    finally:
        torch.set_num_threads(before)
    for single, several in results[1:]:
        assert torch.equal(single, results[0][0]) and torch.equal(several, results[0][1])


@pytest.mark.parametrize(("columns", "where"), [(40_000, 39_999), (65_536, 65_535), (70_001, 70_000)])
def test_sparse_columns_beyond_the_sign_bit_and_beyond_uint16(
    make_layer: Callable, isa: str, columns: int, where: int
) -> None:
    layer = make_layer("lut", 2, 0, 3, columns)
    layer.tensors["sparse_indptr"] = torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    dtype = torch.uint16 if columns <= 65_536 else torch.int32
    layer.tensors["sparse_indices"] = torch.tensor([32_768, where], dtype=torch.int32).to(dtype)
    layer.tensors["sparse_values"] = torch.tensor([512.0, -1024.0], dtype=torch.float16)
    packed, weight = layer.repack(), layer.weight()
    assert torch.equal(layer.embedding(torch.arange(3), torch.float32, packed), weight)
    x = torch.zeros(5, columns)
    x[:, 32_768], x[:, where] = torch.arange(1.0, 6), 2.0
    for batch in (1, 5):
        assert_product(layer.linear(x[:batch], packed), x[:batch], layer)


def test_shapes_of_x(make_layer: Callable) -> None:
    layer = make_layer("uniform", 3, 32, 11, 100, density=0.05)
    packed = layer.repack()
    for x in (
        activations(6, 100, torch.bfloat16).view(2, 3, 100),
        activations(100, 5, torch.float32).t(),
        activations(8, 100, torch.float32)[::2],
        activations(40, 100, torch.float16).view(2, 20, 100)[:, 1:],
    ):
        assert_product(layer.linear(x, packed), x, layer)
    assert layer.linear(torch.randn(100), packed).shape == (11,)
    assert layer.linear(torch.empty(0, 100), packed).shape == (0, 11)
    assert layer.linear(torch.empty(2, 0, 100), packed).shape == (2, 0, 11)


def test_non_finite_activations_stay_in_their_row(make_layer: Callable, isa: str) -> None:
    layer = make_layer("uniform", 4, 32, 6, 100)
    x = activations(4, 100, torch.float32)
    x[1, 99], x[2, 0] = float("nan"), float("inf")
    y = layer.linear(x)
    assert y[1].isnan().all() and not y[2].isfinite().any()
    assert torch.equal(y[[0, 3]], layer.linear(x[[0, 3]]))


@pytest.mark.parametrize(("kind", "bits", "group_size"), FORMATS)
def test_embedding(make_layer: Callable, isa: str, kind: str, bits: int, group_size: int) -> None:
    layer = make_layer(kind, bits, group_size, 50, 576, density=0.01)
    packed, weight = layer.repack(), layer.weight()
    ids = torch.tensor([[49, 0, 7], [7, 7, 1]])
    for dtype in DTYPES:
        assert torch.equal(layer.embedding(ids, dtype, packed), weight[ids].to(dtype))
    assert torch.equal(layer.embedding(ids.int(), torch.float32, packed), weight[ids])
    assert layer.embedding(ids[:0], torch.float32, packed).shape == (0, 3, 576)
    for bad in (-1, 50):
        with pytest.raises(IndexError):
            layer.embedding(torch.tensor([3, bad]), torch.float32, packed)


def test_float16_conversions_of_every_tier(isa: str) -> None:
    """Every finite float16 survives the product with 1; sums that fall between two float16 round as in torch."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()]
    # the sparse part, which is multiplied as it is: W = [[1, 2⁻¹⁴]], of which the first column copies x and the second
    # moves the sum off the float16 grid
    tensors = {
        "qweight": torch.zeros(1, 1, dtype=torch.uint8),
        "lookup_table": torch.zeros(1, 4).half(),
        "sparse_indptr": torch.tensor([0, 2], dtype=torch.int32),
        "sparse_indices": torch.tensor([0, 1], dtype=torch.uint16),
        "sparse_values": torch.tensor([1.0, 2.0**-14]).half(),
    }
    packed = kernels.repack("lut", tensors, bits=2, in_features=2, device="cpu")
    step = torch.randn(halves.numel(), generator=torch.Generator().manual_seed(0)).half()
    for second in (torch.zeros_like(step), step):
        x = torch.stack([halves, second], dim=1)
        got = torch.cat(
            [kernels.linear("lut", part, packed, out_features=1, bits=2) for part in x.split(cpu.SMALL_BATCH)]
        )
        assert torch.equal(got[:, 0], (halves.float() + second.float() * 2.0**-14).half())
