"""Trellis products equal the reference on every instruction set and for every shape of block."""

import pytest
import torch
from torch import Tensor

from vllm_requant import kernels
from vllm_requant.format import QuantizedLayer, TrellisSpec
from vllm_requant.kernels import cpu, ops, reference

SHAPES = [(128, 256, 128, 64), (192, 576, 64, 64), (48, 96, 16, 32), (256, 128, 32, 128), (16, 16, 16, 16)]


def build(bits: int, state_bits: int, shape: tuple[int, int, int, int], density: float = 0.0) -> QuantizedLayer:
    rows, columns, block_out, block_in = shape
    spec = TrellisSpec(
        bits=bits,
        state_bits=state_bits,
        block_in=block_in,
        block_out=block_out,
        in_features=columns,
        out_features=rows,
    )
    generator = torch.Generator().manual_seed(rows + bits)
    dense = {
        name: torch.randint(256, wanted.shape, dtype=torch.uint8, generator=generator)
        for name, wanted in spec.dense_tensors().items()
    }
    dense["scales"] = (torch.rand(dense["scales"].shape, generator=generator) * 1e-3 + 1e-4).half()
    mask = torch.rand(rows, columns, generator=generator) < density
    if density:
        mask[0], mask[-1] = True, False
    weight = torch.randn(rows, columns, generator=generator)
    layer = QuantizedLayer.build(spec, dense, weight=weight, mask=mask)
    layer.check(name="random")
    return layer


def repack(layer: QuantizedLayer, device: str = "cpu") -> dict[str, Tensor]:
    spec = layer.spec
    return kernels.repack("trellis", layer.tensors, in_features=spec.in_features, device=device, **spec.kernel_settings)


def linear(layer: QuantizedLayer, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    spec = layer.spec
    return kernels.linear("trellis", x, weights, out_features=spec.out_features, **spec.kernel_settings)


def assert_product(y: Tensor, x: Tensor, layer: QuantizedLayer, relative: float) -> None:
    exact = x.double() @ layer.weight().double().t()
    assert y.dtype == x.dtype and y.shape == exact.shape
    # rotations mix all elements of a row, so errors are relative to its length, not to single products
    bound = relative * x.double().norm(dim=-1, keepdim=True) * layer.weight().double().norm(dim=1)
    assert ((y.double() - exact).abs() <= bound + 1e-12).all()


@pytest.mark.parametrize(("bits", "state_bits"), [(k, n) for k in range(1, 7) for n in (8, 12, 16) if n >= 2 * k])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(isa: str, bits: int, state_bits: int, shape: tuple[int, int, int, int]) -> None:
    for density in (0.0, 0.03):
        layer = build(bits, state_bits, shape, density)
        packed = repack(layer)
        for batch in (1, 3, cpu.SMALL_BATCH, cpu.SMALL_BATCH + 3):
            x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(batch))
            y = linear(layer, x, packed)
            assert_product(y, x, layer, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [2, 40, 80])
@pytest.mark.parametrize("native", [False, True])
def test_half_precision(monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype, batch: int) -> None:
    monkeypatch.setattr(ops, "PANEL_BYTES", 1)  # a panel of 128 rows, and a rest
    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: native)
    layer = build(3, 12, (192, 576, 64, 64), 0.01)
    x = torch.randn(batch, 576).to(dtype)
    y = linear(layer, x[None], repack(layer))[0]
    # one rounding of the result, and in torch's bfloat16 of rotated activations and weights
    rounded = native and dtype == torch.bfloat16 and batch > cpu.FUSED_BATCHES["bfloat16"][2]
    assert_product(y, x, layer, (4 if rounded else 1) * torch.finfo(dtype).eps)


def test_a_row_has_one_result_in_every_small_batch(isa: str) -> None:
    layer = build(2, 12, (256, 512, 128, 128), 0.01)
    packed, x = repack(layer), torch.randn(cpu.SMALL_BATCH, 512)
    together = linear(layer, x, packed)
    for batch in (1, 3, 6):
        assert torch.equal(linear(layer, x[:batch], packed), together[:batch])


def test_threads_do_not_change_the_result() -> None:
    layer = build(4, 12, (512, 512, 128, 128), 0.01)
    packed, x = repack(layer), torch.randn(3, 512)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(linear(layer, x, packed))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_implementation_for_other_devices() -> None:
    layer = build(3, 12, (64, 128, 32, 64), 0.05)
    x, t = torch.randn(4, 128), layer.tensors
    names = list(repack(layer, "meta"))
    # what repack would put on a device that is not there
    ends = {
        "signs_in": reference.signs(t["signs_in"], 128) / 8,
        "signs_out": reference.signs(t["signs_out"], 64) / 32**0.5,
    }
    given = t | ends | {"sparse_indices": t["sparse_indices"].view(torch.int16)}
    assert_product(ops._trellis_linear_torch(x, *(given[name] for name in names), 3, 12), x, layer, 2e-6)


def test_run_time_bytes_are_those_of_the_disk_and_signs() -> None:
    layer = build(2, 12, (1024, 1024, 128, 128))
    # two bytes of each string are there twice; signs are numbers
    strings = 1024 * 1024 // 128
    assert repack(layer)["packed"].numel() <= layer.spec.nbytes + 2 * strings + 4 * 2048 + 1024


def test_sizes_that_do_not_fit_are_refused() -> None:
    layer = build(2, 12, (64, 128, 32, 64))
    packed = repack(layer)
    with pytest.raises(RuntimeError, match="does not fit"):
        linear(layer, torch.randn(1, 64), packed)
    with pytest.raises(TypeError, match="float64"):
        linear(layer, torch.randn(1, 128, dtype=torch.float64), packed)
    with pytest.raises(ValueError, match="no rows can be looked up"):
        kernels.embedding("trellis", torch.tensor([0]), packed, bits=2, in_features=128, dtype=torch.float32)


def test_traces_with_a_symbolic_batch() -> None:
    layer = build(2, 12, (64, 128, 32, 64), 0.02)
    packed = repack(layer)

    @torch.compile(fullgraph=True, dynamic=True)
    def run(x: Tensor) -> Tensor:
        return linear(layer, x * 2, packed)

    for batch in (2, 5, 33):
        x = torch.randn(batch, 128)
        assert_product(run(x), 2 * x, layer, 2e-6)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_hadamard_transform_is_orthonormal_and_its_own_inverse(block: int) -> None:
    x = torch.randn(3, 2 * block)
    turned = reference.hadamard_blocks(x, block)
    torch.testing.assert_close(reference.hadamard_blocks(turned, block), x)
    torch.testing.assert_close(turned.view(3, 2, block).norm(dim=2), x.view(3, 2, block).norm(dim=2))
    layer = build(2, 12, (block, 2 * block, block, block))
    signed = x * reference.signs(layer.tensors["signs_in"], 2 * block)
    packed = repack(layer)["packed"]
    torch.testing.assert_close(cpu.trellis_rotate(x.clone(), packed), reference.hadamard_blocks(signed, block))


@pytest.mark.parametrize("state_bits", [8, 12, 16])
def test_code_is_nearly_gaussian(state_bits: int) -> None:
    code = reference.trellis_code(state_bits)
    assert abs(code.mean()) < 0.02 * code.std()
    kurtosis = ((code - code.mean()) ** 4).mean() / code.var() ** 2
    assert kurtosis == pytest.approx(3, abs=0.4)
