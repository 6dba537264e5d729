"""The kernels of CUDA devices against reference.py in float64.

Without a GPU Triton's interpreter runs the Triton kernels on the CPU, in a process of its own, and test_cuda_sources.py
the CUDA C++ kernels; with one (``make test-gpu``) all of them run for real.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_requant import kernels
from vllm_requant.kernels import gpu, reference
from vllm_requant.kernels.gpu import native, tuning
from vllm_requant.kernels.gpu.layout import residual_entries, tiles_of
from vllm_requant.kernels.gpu.weights import NAMES, Weights

REAL = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if REAL else "cpu")
needs_gpu = pytest.mark.skipif(not REAL, reason="needs a CUDA device")

UNIFORM = [("uniform", 2, 32), ("uniform", 3, 96), ("uniform", 4, 64), ("uniform", 4, 128), ("uniform", 8, 32)]
LUT = [("lut", 2, 0), ("lut", 3, 0), ("lut", 4, 0)]
SHAPES = [(40, 100), (33, 576)]
TRELLIS = [(2, 12), (3, 16), (4, 12), (1, 8), (5, 16), (6, 12)]


@pytest.fixture(autouse=True)
def device_or_interpreter(request: pytest.FixtureRequest) -> None:
    """Triton asks for its interpreter when it is imported, which in this process it may have been."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    if not REAL and not INTERPRETED and request.function is not test_under_the_interpreter:
        pytest.skip("run by test_under_the_interpreter")


@pytest.mark.skipif(REAL or INTERPRETED, reason="the tests run in this process")
def test_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]


def weights_of(layer: object) -> Weights:
    """Of a layer of conftest.py, wherever the tests compute."""
    made = gpu.weights.repack(
        layer.kind,  # type: ignore[attr-defined]
        layer.tensors,  # type: ignore[attr-defined]
        None,
        bits=layer.bits,  # type: ignore[attr-defined]
        in_features=layer.in_features,  # type: ignore[attr-defined]
        device=DEVICE,
    )
    return Weights(*made.values(), layer.kind, layer.bits, layer.group_size, 0, layer.in_features, layer.out_features)  # type: ignore[attr-defined]


def trellis(
    bits: int, state_bits: int, blocks: tuple[int, int], rows: int, columns: int, density: float
) -> tuple[Weights, Tensor]:
    """A random trellis in run-time form and its weight by reference.py, float32."""
    generator = torch.Generator().manual_seed(bits)

    def random_bytes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator)

    block_out, block_in = blocks
    tensors = {
        "qweight": random_bytes(rows // block_out, columns * block_out // 128, 16 * bits),
        "scales": torch.rand(rows // block_out, columns // block_in, generator=generator).half(),
        "signs_in": random_bytes(columns // 8),
        "signs_out": random_bytes(rows // 8),
    }
    weight = reference.dequantize_trellis(**tensors, bits=bits, state_bits=state_bits, in_features=columns)
    if density:
        mask = torch.rand(rows, columns, generator=generator) < density
        mask[0], mask[-1] = True, False
        indptr = torch.zeros(rows + 1, dtype=torch.int32)
        indptr[1:] = mask.sum(1).cumsum(0)
        values = torch.randn(int(indptr[-1]), generator=generator).half()
        tensors |= {"sparse_indptr": indptr, "sparse_indices": mask.nonzero()[:, 1].to(torch.uint16)}
        tensors["sparse_values"] = values
        weight = reference.add_sparse_(weight, indptr, tensors["sparse_indices"], values)
    signs = (
        reference.signs(tensors["signs_in"], columns) * block_in**-0.5,
        reference.signs(tensors["signs_out"], rows) * block_out**-0.5,
    )
    made = gpu.weights.repack("trellis", tensors, signs, bits=bits, in_features=columns, device=DEVICE)
    return Weights(*made.values(), "trellis", bits, 0, state_bits, columns, rows), weight


def interpreted(dtype: torch.dtype) -> float:
    """By how much errors may exceed those of rounding: the interpreter cuts a float32 off to make a bfloat16."""
    return 5 if dtype == torch.bfloat16 and not REAL else 1


class Product:
    """What ``x · weightᵀ`` may be: no further from the exact product than rounding weights and result to the type of
    ``x`` explains."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        self.dtype, self.eps = x.dtype, torch.finfo(x.dtype).eps
        wide, exactly = x.cpu().double(), weight.double().t()
        self.exact = wide @ exactly
        # both roundings are of half a unit; a residual is added to what is rounded already
        self.bound = 1.5 * self.eps * (wide.abs() @ exactly.abs()) + self.eps * self.exact.abs() + 1e-6
        self.rounded = (wide @ weight.to(x.dtype).double().t()).to(x.dtype).double()

    def check(self, y: Tensor, slack: float = 1) -> None:
        off = y.cpu().double() - self.exact
        assert y.dtype == self.dtype and y.shape == self.exact.shape
        if y.dtype == torch.float32:  # sums alone
            assert bool((off.abs() <= 16 * slack * self.bound).all())
            return
        assert bool((off.abs() <= slack * self.bound).all())
        by_rounding = (self.rounded - self.exact).norm()
        assert off.norm() <= 1.15 * slack * by_rounding + 1e-4 * self.eps * self.exact.norm()


def assert_product(y: Tensor, x: Tensor, weight: Tensor, slack: float = 1) -> None:
    Product(x, weight).check(y, slack)


# ---- Triton ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits", "group_size"), UNIFORM + LUT)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.03])
def test_expanded_rows_are_exact(
    make_layer: Callable, kind: str, bits: int, group_size: int, rows: int, columns: int, density: float
) -> None:
    from vllm_requant.kernels.gpu import portable

    layer = make_layer(kind, bits, group_size, rows, columns, density=density)
    w, weight = weights_of(layer), layer.weight()
    assert torch.equal(portable.expand(w, torch.float32).cpu(), weight)
    ids = torch.tensor([rows - 1, 0, 0, rows // 2], device=DEVICE)
    for dtype in (torch.float16, torch.float32):
        assert torch.equal(portable.embedding(w, ids, dtype).cpu(), weight[ids.cpu()].to(dtype))
    part = portable.expand(w, torch.bfloat16, first_row=8, count=5).cpu()
    rounded = weight[8:13].bfloat16()
    # a residual is added to what is rounded already
    assert torch.allclose(part, rounded, rtol=2**-7, atol=2**-7 * float(weight.abs().max()) if density else 0)


@pytest.mark.parametrize(("kind", "bits", "group_size"), UNIFORM + LUT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_portable_product(make_layer: Callable, kind: str, bits: int, group_size: int, dtype: torch.dtype) -> None:
    from vllm_requant.kernels.gpu import portable

    layer = make_layer(kind, bits, group_size, 40, 160, density=0.03)
    w = weights_of(layer)
    for batch in (1, 17):
        x = torch.randn(batch, 160).to(dtype).to(DEVICE)
        assert_product(portable.linear(w, x), x, layer.weight(), interpreted(dtype))


def test_residual_with_wide_columns(make_layer: Callable) -> None:
    indices, values = torch.tensor([3, 65_535, 65_536, 69_999], dtype=torch.int32), torch.tensor([1.0, -2, 0.5, -0.25])
    entries = residual_entries(indices, values.half(), 70_000)
    assert torch.equal(entries & 0xFFFFFFFF, indices.long())
    assert torch.equal((entries >> 32).to(torch.int16).view(torch.float16), values.half())
    # a small layer whose entries are those of a wide one
    layer = make_layer("lut", 4, 0, 20, 100, density=0.1)
    w = weights_of(layer)
    narrow = w.sparse_entries.long() & 0xFFFFFFFF
    w = w._replace(sparse_entries=(narrow & 0xFFFF) | narrow >> 16 << 32)
    assert w.wide
    rows = gpu.ops.embedding(torch.arange(20, device=DEVICE), w, torch.float32)
    assert torch.equal(rows.cpu(), layer.weight())


@pytest.mark.parametrize(("bits", "state_bits"), TRELLIS)
@pytest.mark.parametrize(
    ("blocks", "rows", "columns"), [((128, 128), 256, 256), ((64, 64), 192, 64), ((16, 32), 48, 96)]
)
def test_expanded_trellis(bits: int, state_bits: int, blocks: tuple[int, int], rows: int, columns: int) -> None:
    from vllm_requant.kernels.gpu import portable

    w, weight = trellis(bits, state_bits, blocks, rows, columns, 0.02)
    exact = portable.expand(w, torch.float32).cpu()
    assert torch.allclose(exact, weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
    rounded = portable.expand(w, torch.bfloat16, first_row=blocks[0], count=blocks[0]).cpu().float()
    part = weight[blocks[0] : 2 * blocks[0]]
    assert (rounded - part).norm() <= 1.3 * interpreted(torch.bfloat16) * (part.bfloat16().float() - part).norm()


@pytest.mark.parametrize("batch", [0, 1, 40, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_batch(make_layer: Callable, batch: int, dtype: torch.dtype) -> None:
    """Through the op's dispatch, whatever kernel it chooses here, and with more than one panel."""
    layer = make_layer("uniform", 4, 64, 300, 96, density=0.02)
    w = weights_of(layer)
    x = torch.randn(2, batch, 2 * 96).to(dtype).to(DEVICE)[..., ::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu.ops, "PANEL_BYTES", 1)  # the least panel has 128 rows
        y = gpu.ops.linear(x, w)
    assert y.shape == (2, batch, 300)
    if batch:
        assert_product(y.reshape(-1, 300), x.reshape(-1, 96), layer.weight(), interpreted(dtype))


# ---- the choice of a kernel, the ops -----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bits", "group_size"), UNIFORM + LUT)
def test_variants_are_compiled_together_and_fit(kind: str, bits: int, group_size: int) -> None:
    nothing = torch.empty(0)
    for rows, columns in ((576, 576), (4096, 4096), (28_672, 8192), (8192, 28_672), (128_256, 4096)):
        codes = torch.empty(*tiles_of(rows, columns), 1, device="meta")
        w = Weights(codes, *[nothing] * 7, kind, bits, group_size, 0, columns, rows)
        for batch in range(1, native.MOST + 1):
            for variant in (native.matvec_variant(w, batch), *native.matvec_candidates(w, batch)):
                if variant is None:
                    assert batch > 32  # then expanded weights are multiplied
                    continue
                assert variant._replace(splits=1, blocks=1) in native.MATVEC_VARIANTS
                assert 8 * variant.n_tiles >= batch and variant.single == (batch == 1)
                assert variant.shared(w, batch) <= 227 << 10
                x, splits, _ = variant.grid(w, 132)
                assert 1 <= x <= w.codes.shape[0] and splits <= -(-columns // 256)


def test_measured_tables_are_kept_and_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some GPU")
    monkeypatch.setattr(tuning, "_shipped", lambda device: tmp_path / "shipped.json")
    (tmp_path / "shipped.json").write_text('{"lut4": {"64x64": {"1": [0, 1, 2], "64": [9, 1, 1]}}}')
    tuning.clear()
    try:
        assert tuning.lookup(0, "lut4", 64, 64, 3) == (False, None)
        assert tuning.lookup(0, "lut4", 64, 64, 33) == (True, [9, 1, 1])
        table: tuning.Table = {"lut4": {"64x64": {"8": [3, 2, 1], "64": None}}}
        assert tuning.save(table) == tmp_path / "tuned" / "some-gpu.json"
        assert tuning.lookup(0, "lut4", 64, 64, 3) == (True, [3, 2, 1])
        # what was measured here counts, what was not comes with the package
        assert tuning.lookup(0, "lut4", 64, 64, 33) == (True, None)
        assert tuning.lookup(0, "lut4", 64, 64, 1) == (True, [0, 1, 2])
        assert tuning.lookup(0, "lut3", 64, 64, 3) == (False, None)
        tuning.save({"lut4": {"32x64": {"1": None}}, "lut3": {"64x64": {"1": None}}})
        assert tuning.lookup(0, "lut4", 64, 64, 3) == (True, [3, 2, 1])
        assert tuning.lookup(0, "lut3", 64, 64, 1) == (True, None)
    finally:
        tuning.clear()


@pytest.mark.parametrize("path", sorted((Path(tuning.__file__).parent / "tuned").glob("*.json")), ids=lambda p: p.stem)
def test_tables_of_the_package_name_variants_that_fit(path: Path) -> None:
    nothing = torch.empty(0)
    for form, shapes in json.loads(path.read_text()).items():
        kind, bits = form[:-1], int(form[-1])
        group_size = {2: 64, 3: 64}.get(bits, 128) if kind == "uniform" else 0
        for shape, entries in shapes.items():
            rows, columns = map(int, shape.split("x"))
            codes = torch.empty(*tiles_of(rows, columns), 1, device="meta")
            w = Weights(codes, *[nothing] * 7, kind, bits, group_size, 0, columns, rows)
            for size, entry in entries.items():
                assert int(size) in tuning.CLASSES
                if entry is None:
                    continue
                if kind == "trellis":
                    for batch in {4, int(size)} if int(size) == 8 else {int(size)}:
                        assert native.trellis_candidates(w, batch)[entry[0]] is not None
                    continue
                index, splits, blocks = entry
                wanted = native.MATVEC_VARIANTS[index]._replace(splits=splits, blocks=blocks)
                assert wanted in native.matvec_candidates(w, int(size))


def test_other_dimensions_are_refused(make_layer: Callable) -> None:
    w = weights_of(make_layer("uniform", 4, 32, 40, 100))
    for wrong in (w._replace(in_features=200), w._replace(out_features=60)):
        with pytest.raises(RuntimeError, match="does not fit"):
            gpu.ops.linear(torch.randn(1, wrong.in_features, device=DEVICE), wrong)


def test_shapes_for_the_compiler(make_layer: Callable) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    w = weights_of(make_layer("uniform", 4, 32, 40, 100))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in w]
        y = torch.ops.requant.gpu_linear(torch.empty(2, 3, 100, dtype=torch.bfloat16, device=DEVICE), *fake)
        assert y.shape == (2, 3, 40) and y.dtype == torch.bfloat16
        rows = torch.ops.requant.gpu_embedding(torch.zeros(7, dtype=torch.int64, device=DEVICE), *fake, torch.float16)
        assert rows.shape == (7, 100) and rows.dtype == torch.float16


# ---- a real device -----------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize(("kind", "bits", "group_size"), UNIFORM + LUT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (10_000, 640), (200, 4096)])
def test_fused_product(
    make_layer: Callable, kind: str, bits: int, group_size: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    layer = make_layer(kind, bits, group_size, rows, columns, density=0.01)
    w, weight = weights_of(layer), layer.weight()
    for batch in (1, 2, 8, 9, 16, 31, 64):
        x = torch.randn(batch, columns, device=DEVICE).to(dtype)
        poison = torch.full((batch, rows), float("nan"), dtype=dtype, device=DEVICE)
        del poison
        product = Product(x, weight)
        for variant in native.matvec_candidates(w, batch):
            y = native.matvec(w, x, variant)
            product.check(y)
            assert torch.equal(y, native.matvec(w, x, variant))
            assert not w.locks.any()
    expanded = native.expand(w, dtype, 16, rows - 16).cpu().float()
    assert (expanded - weight[16:]).norm() <= 1.2 * (weight[16:].to(dtype).float() - weight[16:]).norm() + 1e-6


@needs_gpu
@pytest.mark.parametrize(("bits", "state_bits"), [(2, 12), (3, 16), (4, 12), (4, 10)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "block_in"), [(256, 192, 64), (128, 4096, 128), (1280, 1152, 128)])
def test_fused_trellis(bits: int, state_bits: int, dtype: torch.dtype, rows: int, columns: int, block_in: int) -> None:
    w, weight = trellis(bits, state_bits, (128, block_in), rows, columns, 0.01)
    assert native.takes_trellis(w)
    for batch in (1, 3, 4, 5, 16):
        x = torch.randn(batch, columns, device=DEVICE).to(dtype)
        product = Product(x, weight)
        for variant in native.TRELLIS_VARIANTS[0 if batch <= 4 else 4 :][:4]:
            y = native.trellis(w, x, variant)
            product.check(y)
            assert torch.equal(y, native.trellis(w, x, variant))
            assert not w.locks.any()
    expanded = native.expand_trellis(w, dtype).cpu().float()
    assert (expanded - weight).norm() <= 1.2 * (weight.to(dtype).float() - weight).norm()


@needs_gpu
@pytest.mark.parametrize("kind", ["uniform", "lut"])
def test_through_the_package_and_in_a_graph(make_layer: Callable, kind: str) -> None:
    layer = make_layer(kind, 4, 32 if kind == "uniform" else 0, 96, 1024, density=0.01)
    assert kernels.kernel_path(kind, "cuda") == "cuda"
    packed = layer.repack("cuda")
    assert list(packed) == list(NAMES)
    for batch in (1, 5, 40, 200):
        x = torch.randn(batch, 1024, device=DEVICE).bfloat16()
        eager = layer.linear(x, packed)
        assert_product(eager, x, layer.weight())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer.linear(x, packed)
        x.copy_(torch.randn_like(x))
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, layer.linear(x, packed))
    ids = torch.tensor([[3, 95], [0, 0]], device=DEVICE)
    assert torch.equal(layer.embedding(ids, torch.bfloat16, packed).cpu(), layer.weight()[ids.cpu()].bfloat16())
    checks = ("test_schema", "test_faketensor")
    arguments = (x, *packed.values(), kind, 4, layer.group_size, 0, 1024, 96)
    torch.library.opcheck(torch.ops.requant.gpu_linear.default, arguments, test_utils=checks)
