"""What surrounds the products: run-time layout, other devices, tracing, loading the native code, errors."""

import mmap
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from vllm_requant import kernels
from vllm_requant.format.kinds import KINDS
from vllm_requant.format.schema import LayerSpec
from vllm_requant.kernels import cpu, ops
from vllm_requant.kernels.cpu import memory

FORMATS = [("uniform", bits, group) for bits in (2, 3, 4, 8) for group in (32, 128)]
FORMATS += [("lut", bits, 0) for bits in (2, 3, 4)]


@pytest.mark.parametrize(("kind", "bits", "group_size"), FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(64, 4096), (576, 576), (192, 576)])
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01])
def test_run_time_bytes(
    make_layer: Callable, kind: str, bits: int, group_size: int, rows: int, columns: int, density: float
) -> None:
    layer = make_layer(kind, bits, group_size, rows, columns, density=density)
    packed = layer.repack()
    sparse = sum(tensor.nbytes for name, tensor in layer.tensors.items() if name.startswith("sparse"))
    # a zero point takes a byte; a row of tables 48 more, and a number; sparse lanes are padded
    extra = rows * (-(-columns // group_size) if group_size else 52)
    assert sum(tensor.nbytes for tensor in packed.values()) <= layer.nbytes + extra + 0.6 * sparse + 2048
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in packed.values())
    owned = {tensor.untyped_storage().data_ptr() for tensor in layer.tensors.values()}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in packed.values() if tensor.numel()}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["uniform", "lut"])
def test_names_do_not_depend_on_the_sparse_part(make_layer: Callable, kind: str, device: str) -> None:
    group_size = 32 if kind == "uniform" else 0
    dense = make_layer(kind, 4, group_size, 6, 64).repack(device)
    mixed = make_layer(kind, 4, group_size, 6, 64, density=0.1).repack(device)
    assert dense.keys() == mixed.keys()
    assert all(tensor.device.type == device for tensor in mixed.values())
    if device == "cpu":
        assert list(mixed) == ["packed"] and dense["packed"].numel() < mixed["packed"].numel()
    else:
        assert {name for name, tensor in dense.items() if tensor.numel() == 0} == {
            "sparse_indptr",
            "sparse_indices",
            "sparse_values",
        }


@pytest.mark.parametrize(("kind", "bits", "group_size"), FORMATS)
def test_reference_of_the_format_agrees(make_layer: Callable, kind: str, bits: int, group_size: int) -> None:
    layer = make_layer(kind, bits, group_size, 9, 100)
    spec: LayerSpec = TypeAdapter(LayerSpec).validate_python(
        {"kind": kind, "bits": bits, "in_features": 100, "out_features": 9}
        | ({"group_size": group_size} if group_size else {})
    )
    assert layer.tensors.keys() == spec.tensors().keys()
    dense = KINDS[kind].dequantize(spec, layer.tensors)
    assert torch.equal(layer.embedding(torch.arange(9), torch.float32), dense)


@pytest.mark.parametrize("columns", [100, 70_001])
@pytest.mark.parametrize("kind", ["uniform", "lut"])
@pytest.mark.parametrize("density", [0.0, 0.1])
def test_implementation_for_other_devices(make_layer: Callable, kind: str, columns: int, density: float) -> None:
    layer = make_layer(kind, 3, 32 if kind == "uniform" else 0, 5, columns, density=density)
    # what repack would put on a device that is not there
    names = list(layer.repack("meta"))
    tensors = []
    for name, like in layer.repack("meta").items():
        source = layer.tensors.get(name, torch.empty(0, dtype=like.dtype))
        tensors.append(source.view(torch.int16) if source.dtype == torch.uint16 else source)
        assert tensors[-1].dtype == like.dtype and tensors[-1].shape == like.shape
    assert len(names) == len(tensors)
    group = (layer.group_size,) if kind == "uniform" else ()
    x, weight = torch.randn(4, columns), layer.weight()
    product = getattr(ops, f"_{kind}_linear_torch")(x, *tensors, 3, *group)
    assert torch.equal(product, torch.nn.functional.linear(x, weight))
    ids = torch.tensor([[4, 0], [1, 1]])
    rows = getattr(ops, f"_{kind}_embedding_torch")(ids, *tensors, 3, *group, columns, torch.bfloat16)
    assert torch.equal(rows, weight[ids].bfloat16())


def test_unknown_kind_and_wrong_sizes(make_layer: Callable) -> None:
    layer = make_layer("uniform", 4, 32, 6, 64)
    packed = layer.repack()
    with pytest.raises(ValueError, match=r"unknown kind 'ternary'.*lut, trellis, uniform"):
        kernels.repack("ternary", layer.tensors, bits=4, group_size=32, in_features=64, device="cpu")
    with pytest.raises(ValueError, match="unknown kind"):
        kernels.linear("ternary", torch.randn(1, 64), packed, out_features=6, bits=4, group_size=32)
    with pytest.raises(ValueError, match="unknown kind"):
        kernels.kernel_path("ternary", "cpu")
    with pytest.raises(ValueError, match="needs lookup_table"):
        kernels.repack("lut", layer.tensors, bits=4, group_size=0, in_features=64, device="cpu")
    with pytest.raises(RuntimeError, match="does not fit"):
        layer.linear(torch.randn(1, 65), packed)
    with pytest.raises(RuntimeError, match="does not fit"):
        kernels.linear("uniform", torch.randn(1, 64), packed, out_features=7, bits=4, group_size=32)
    with pytest.raises(ValueError, match="does not have these"):
        layer.embedding(torch.tensor([0]), torch.float32, {"packed": packed["packed"][:-1]})
    with pytest.raises(TypeError, match="float64"):
        layer.linear(torch.randn(1, 64, dtype=torch.float64), packed)


@pytest.mark.parametrize(("kind", "group_size"), [("uniform", 32), ("lut", 0)])
def test_traces_in_one_graph_for_every_batch(make_layer: Callable, kind: str, group_size: int) -> None:
    layer = make_layer(kind, 4, group_size, 12, 96, density=0.05)

    class Block(torch.nn.Module):
        """Parameters as in vLLM: their sizes are static, only the batch is symbolic."""

        def __init__(self) -> None:
            super().__init__()
            self.names = tuple(layer.repack())
            for name, tensor in layer.repack().items():
                self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            packed = {name: getattr(self, name) for name in self.names}
            y = torch.relu(layer.linear(x * 2, packed)).sum(-1, keepdim=True)
            return y + layer.embedding(ids, x.dtype, packed)

    block = Block()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=backend)
    for batch in (3, 5, 20, 40):
        x, ids = torch.randn(batch, 96, dtype=torch.bfloat16), torch.arange(batch) % 12
        assert torch.equal(compiled(x, ids), block(x, ids))
    assert len(graphs) == 1


@pytest.mark.parametrize(("kind", "group_size"), [("uniform", 32), ("lut", 0)])
def test_schema_and_fake_implementation(make_layer: Callable, kind: str, group_size: int) -> None:
    packed = make_layer(kind, 4, group_size, 12, 96, density=0.05).repack()["packed"]
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for product in (torch.ops.requant.packed_linear.default, torch.ops.requant.packed_linear_any.default):
        for x in (torch.randn(3, 96), torch.randn(2, 9, 96).bfloat16(), torch.randn(96, 3).t()):
            torch.library.opcheck(product, (x, packed, 12, 2), test_utils=checks)
    rows = torch.ops.requant.packed_embedding.default
    torch.library.opcheck(rows, (torch.tensor([[1, 2]]), packed, 96, torch.float16), test_utils=checks)


def test_few_numbers_of_rows_reach_torch(make_layer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch multiplies bfloat16 it generates code for every number of rows, and keeps it."""
    layer = make_layer("uniform", 4, 64, 128, 192, density=0.01)
    packed = layer.repack()["packed"]
    multiply, seen = torch.mm, set()

    def counting(x: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        seen.add(len(x))
        result: torch.Tensor = multiply(x, weight, out=out)
        return result

    monkeypatch.setattr(cpu, "multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch, "mm", counting)
    generator = torch.Generator().manual_seed(0)
    for batch in (49, 57, 64, 130, 511, 600, 1100):
        x = torch.randn(batch, 192, generator=generator).bfloat16()
        expected = x.double() @ layer.weight().double().T
        y = torch.ops.requant.packed_linear_any(x, packed, 128, 2)
        assert y.shape == (batch, 128)
        assert (y.double() - expected).abs().max() <= 0.02 * expected.abs().max()
    assert seen == {64, 144, 512, 96, 80}


@pytest.mark.parametrize("content", [None, b"not a shared object"])
def test_missing_or_broken_native_code_says_how_to_build_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    if content:
        (tmp_path / "_kernels.abi3.so").write_bytes(content)
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "__init__.py"))
    cpu.library.cache_clear()
    try:
        with pytest.raises(kernels.NativeCodeError, match=r"pip install \."):
            kernels.kernel_path("lut", "cpu")
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()
    assert kernels.kernel_path("lut", "cpu").startswith("cpu-")
    assert kernels.kernel_path("lut", "cuda") == "torch-reference"


def test_environment_caps_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = cpu.library().requant_isa()
    try:
        for name, found in (("scalar", "cpu-scalar"), ("avx2", f"cpu-{cpu.ISA_NAMES[min(before, 1)]}")):
            monkeypatch.setenv("REQUANT_CPU_ISA", name)
            cpu.library.cache_clear()
            assert kernels.kernel_path("uniform", "cpu") == found
            # the cap is set once: a later change is for the next process
            monkeypatch.setenv("REQUANT_CPU_ISA", "sse9")
            assert kernels.kernel_path("uniform", "cpu") == found
            cpu.library().requant_set_isa(before)
        cpu.library.cache_clear()
        with pytest.raises(ValueError, match="REQUANT_CPU_ISA is 'sse9'"):
            kernels.kernel_path("uniform", "cpu")
    finally:
        monkeypatch.undo()
        cpu.library.cache_clear()
        cpu.library().requant_set_isa(before)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on request")
def test_packed_weights_share_huge_pages() -> None:
    """Small ones lie in one mapping, each in a storage of its own, and all memory goes back with the last of them."""

    def mapped() -> int:
        return sum(line.startswith("VmSize") and int(line.split()[1]) for line in open("/proc/self/status")) // 1024

    before = mapped()
    small = [memory.empty(300_001).fill_(i) for i in range(100)]
    large = memory.empty(memory.BLOCK).fill_(7)
    assert all(int(part[0]) == int(part[-1]) == i for i, part in enumerate(small))
    assert all(part.data_ptr() % memory.ALIGNMENT == 0 for part in small)
    assert all(part.untyped_storage().nbytes() == 300_001 for part in small)
    assert max(part.data_ptr() for part in small) - min(part.data_ptr() for part in small) < 2 * memory.BLOCK
    assert large.data_ptr() % memory.HUGE_PAGE == 0
    assert mapped() - before >= memory.BLOCK * 3 // 2 >> 20
    del small, large
    assert mapped() - before < memory.BLOCK >> 20
    assert memory.empty(0).numel() == 0


def test_fresh_process() -> None:
    """Imports torch alone, registers once however often it is imported, and shares torch's OpenMP runtime."""
    code = (
        "import gc, importlib, sys\n"
        "import vllm_requant.kernels as k\n"
        "heavy = {'vllm', 'pydantic', 'transformers', 'vllm_requant.format'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "importlib.reload(k.ops)\n"
        "for name in [n for n in sys.modules if n.startswith('vllm_requant')]: del sys.modules[name]\n"
        "del k; gc.collect()\n"
        "import torch, vllm_requant.kernels as k\n"
        "layer = {'qweight': torch.zeros(8, 32, dtype=torch.uint8)}\n"
        "layer['lookup_table'] = torch.ones(8, 16).half()\n"
        "layer = k.repack('lut', layer, bits=4, group_size=0, in_features=64, device='cpu')\n"
        "y = k.linear('lut', torch.ones(1, 64), layer, out_features=8, bits=4)\n"
        "assert torch.allclose(y, torch.full((1, 8), 64.0)), y\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.split()[-1]}\n"
        "print(len({m for m in maps if 'gomp' in m or 'iomp' in m}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1", done.stdout
