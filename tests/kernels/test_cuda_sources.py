"""The CUDA C++ kernels on a CPU: compiled against cuda_on_threads.h instead of primitives.cuh and a GPU's compiler.

Their arithmetic, layouts, reductions and loops are those of the GPU; native.py makes the arguments, as it does there.
"""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_requant.kernels.gpu import native
from vllm_requant.kernels.gpu.native import Matvec, TrellisVariant
from vllm_requant.kernels.gpu.weights import Weights

from .test_gpu import assert_product, trellis, weights_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++20 compiler")

HERE = Path(__file__).parent
SHARED = "extern __shared__ __align__(16) char shared[];"
SHIFT = re.compile(r'asm\("shl.b32 %0, %1, %2;" : "=r"\((\w+)\) : "r"\((\w+)\), "n"\((.*)\)\);')


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors lie there, also beside a GPU."""
    monkeypatch.setattr("tests.kernels.test_gpu.DEVICE", torch.device("cpu"))


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable]:
    """``launch(kernel, arguments, grid, threads, shared)`` of a source with macros and variants."""
    folder = tmp_path_factory.mktemp("cuda")
    count = 0

    def made(name: str, variants: Sequence[Matvec | TrellisVariant], **defines: int) -> Callable:
        nonlocal count
        count += 1
        source = native.source(name)
        source = source[source.index("// ---- residual") :]  # cuda_on_threads.h has what comes before
        source = SHIFT.sub(r"\1 = \2 << (\3);", source.replace(SHARED, "char* const shared = shared_memory;"))
        source = source.replace("__shared__ __align__(16)", "alignas(16) static")
        assert "asm" not in re.sub(r"//.*", "", source)
        kernels = [variant.name for variant in variants]
        kernels += ["expand_rows"] if name == "matvec" else ["rotate_activations", "expand_strings"]
        entries = "".join(
            f'extern "C" void run_{kernel}(const Arguments* in, int x, int y, int z, int threads, int shared) '
            f"{{ run([=] {{ {kernel}(*in); }}, x, y, z, threads, shared); }}\n"
            for kernel in kernels
        )
        macros = "".join(f"#define {key} {value}\n" for key, value in defines.items())
        instances = "\n".join(variant.instance for variant in variants)
        file = folder / f"{count}.cpp"
        file.write_text(f'{macros}#include "{HERE}/cuda_on_threads.h"\n{source}\n{instances}\n{entries}')
        library = file.with_suffix(".so")
        flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
        done = subprocess.run(
            ["g++", *flags, str(file), "-o", str(library)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        loaded = ctypes.CDLL(str(library))

        def launch(
            kernel: str, arguments: ctypes.Structure, grid: tuple[int, int, int], threads: int, shared: int
        ) -> None:
            getattr(loaded, f"run_{kernel}")(ctypes.byref(arguments), *grid, threads, shared)

        return launch

    return made


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def defines_of(w: Weights, dtype: torch.dtype) -> dict[str, int]:
    common = {"BITS": w.bits, "BF16": int(dtype == torch.bfloat16), "WIDE": int(w.wide)}
    if w.kind == "trellis":
        return common | {"STATE_BITS": w.state_bits}
    special = {"LUT": int(w.lut), "HALVES": int(w.group_size % 64 != 0), "TAIL": int(w.in_features % 64 != 0)}
    return common | special


ONE = (Matvec(1, True, 1, 4, 2, 2), Matvec(1, True, 2, 2, 4, 2, 2), native.MATVEC_VARIANTS[2])
SOME = (Matvec(1, False, 1, 2, 2, 1), Matvec(2, False, 2, 2, 2, 1, 3))


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "columns", "dtype"),
    [
        ("uniform", 2, 32, 160, torch.float16),
        ("uniform", 3, 96, 388, torch.bfloat16),
        ("uniform", 4, 128, 1216, torch.bfloat16),
        ("uniform", 8, 64, 320, torch.bfloat16),
        ("lut", 2, 0, 128, torch.bfloat16),
        ("lut", 3, 0, 420, torch.float16),
        ("lut", 4, 0, 384, torch.bfloat16),
    ],
)
def test_products_and_rows(
    make_layer: Callable, build: Callable, kind: str, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> None:
    rows = 85
    layer = make_layer(kind, bits, group_size, rows, columns, density=0.05)
    w, weight = weights_of(layer), layer.weight()
    launch = build("matvec", ONE + SOME, **defines_of(w, dtype))
    for variant, batches in [(variant, (1,)) for variant in ONE] + [(SOME[0], (3, 8)), (SOME[1], (9, 16))]:
        for batch in batches:
            # activations of very different sizes, each with a scale of its own
            x = (torch.randn(batch, columns) * torch.logspace(-4, 1, batch)[:, None]).to(dtype)
            y, partial = poisoned(batch, rows, dtype=dtype), poisoned(variant.splits, batch, rows)
            arguments = native.matvec_arguments(w, x, y, partial)
            threads, shared = 32 * variant.row_warps * variant.column_warps, variant.shared(w, batch)
            # one multiprocessor: a block stays for several stretches
            launch(variant.name, arguments, variant.grid(w, 1), threads, shared)
            for m in range(batch):
                assert_product(y[m : m + 1], x[m : m + 1], weight)
            assert not w.locks.any()
    out = poisoned(64, columns, dtype=dtype)
    arguments = native.matvec_arguments(w, out, out, out)
    arguments.rows, arguments.batch = 80, 16
    launch("expand_rows", arguments, (4, 2, 1), 256, 3 * 32 << 10)
    expected = weight[16:80]
    assert (out.float() - expected).norm() <= 1.2 * (expected.to(dtype).float() - expected).norm() + 1e-6


@pytest.mark.parametrize(
    ("bits", "state_bits", "block_in", "dtype"),
    [(2, 12, 128, torch.bfloat16), (3, 16, 64, torch.float16), (4, 12, 128, torch.bfloat16)],
)
def test_trellis(build: Callable, bits: int, state_bits: int, block_in: int, dtype: torch.dtype) -> None:
    rows, columns = 256, 384
    w, weight = trellis(bits, state_bits, (128, block_in), rows, columns, 0.02)
    variants = (TrellisVariant(1, 2, 4, 2), TrellisVariant(1, 4, 4, 2), TrellisVariant(2, 8, 4, 1))
    launch = build("trellis", variants, **defines_of(w, dtype))
    for variant, batches in zip(variants, ((1,), (4,), (5, 9)), strict=True):
        for batch in batches:
            x, y = torch.randn(batch, columns).to(dtype), poisoned(batch, rows, dtype=dtype)
            splits, most = variant.lanes // 2, 4 * variant.n_tiles
            partial = poisoned(splits + 1, batch, rows)
            arguments = native.trellis_arguments(w, x, y, partial)
            pieces, share = -(-columns // 128), min(batch, most)
            shared = 2 * 9 * share * 512 + (2 * -(-pieces // splits) + 1) * share * 144
            if batch > 4:
                rotated = torch.full((2 * pieces * batch * 144,), 255, dtype=torch.uint8)
                arguments.rotated = rotated.data_ptr()
                launch("rotate_activations", arguments, (-(-pieces * batch // 4), 1, 1), 128, 0)
            launch(variant.name, arguments, (1, splits, -(-batch // most)), 256, shared)
            assert_product(y, x, weight)
            assert not w.locks.any()
    out = poisoned(128, columns, dtype=dtype)
    arguments = native.trellis_arguments(w, out, out, out)
    arguments.batch = 1
    launch("expand_strings", arguments, (1, 3, 1), 256, (128 * 136 + 128) * 4)
    expected = weight[128:]
    assert (out.float() - expected).norm() <= 1.2 * (expected.to(dtype).float() - expected).norm()
