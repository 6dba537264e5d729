"""The CUDA C++ kernels on a CPU: compiled against cuda_on_threads.h instead of primitives.cuh and a GPU's compiler.

Their arithmetic, layouts, reductions and loops are those of the GPU; native.py makes the arguments, as it does there.
"""

import re
import shutil
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_requant.kernels.gpu import native
from vllm_requant.kernels.gpu.native import Matvec, TrellisVariant
from vllm_requant.kernels.gpu.weights import NAMES, stack

from .on_threads import compiled
from .test_gpu import assert_product, trellis, weights_of

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++20 compiler")

SHIFT = re.compile(r'asm\("shl.b32 %0, %1, %2;" : "=r"\((\w+)\) : "r"\((\w+)\), "n"\((.*)\)\);')


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors lie there, also beside a GPU, and a GPU has one multiprocessor: blocks stay for several stretches."""
    torch.manual_seed(0)
    monkeypatch.setattr("tests.kernels.test_gpu.DEVICE", torch.device("cpu"))
    monkeypatch.setattr(native, "_multiprocessors", lambda device: 1)
    monkeypatch.setattr(native, "_overlaps", lambda device: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: torch.zeros(*shape, **kind).fill_(_poison(kind)))


def _poison(kind: dict) -> float:
    """For memory that nobody has written."""
    return float("nan") if kind.get("dtype", torch.float32).is_floating_point else 255


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Callable]:
    """In place of a module that is compiled for a GPU: ``build(name, variants)(name, macros, device)``."""
    folder = tmp_path_factory.mktemp("cuda")
    count = 0

    @cache
    def module(name: str, variants: tuple[Matvec | TrellisVariant, ...], defines: tuple) -> SimpleNamespace:
        nonlocal count
        count += 1
        source = native.source(name)
        source = source[source.index("// ---- residual") :]  # cuda_on_threads.h has what comes before
        source = SHIFT.sub(r"\1 = \2 << (\3);", source)
        assert "asm" not in re.sub(r"//.*", "", source)
        instances, kernels = native.instances(name, variants)
        return compiled(f"{source}\n{instances}", dict(defines), kernels, folder / f"{count}.cpp")

    def made(variants: tuple[Matvec | TrellisVariant, ...]) -> Callable:
        return lambda name, defines, device: module(name, variants, defines)

    return made


ONE = (Matvec(1, True, 1, 2, 2, 2), Matvec(1, True, 2, 1, 4, 2, 2), native.MATVEC_VARIANTS[1])
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
    make_layer: Callable,
    build: Callable,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(native, "_module", build(ONE + SOME))
    rows = 85
    layer = make_layer(kind, bits, group_size, rows, columns, density=0.05)
    w, weight = weights_of(layer), layer.weight()
    for variant, batches in [(variant, (1,)) for variant in ONE] + [(SOME[0], (3, 8)), (SOME[1], (9, 16))]:
        for batch in batches:
            # activations of very different sizes, each with a scale of its own
            x = (torch.randn(batch, columns) * torch.logspace(-4, 1, batch)[:, None]).to(dtype)
            y = native.matvec(w, x, variant)
            for m in range(batch):
                assert_product(y[m : m + 1], x[m : m + 1], weight)
            assert not w.locks.any()
    for first, count in ((0, rows), (16, 50)):
        assert_rounded(native.expand(w, dtype, first, count), weight[first : first + count])


def assert_rounded(weight: Tensor, exact: Tensor) -> None:
    """No further from it than a rounding, or two where there is a residual, explains."""
    assert weight.shape == exact.shape
    off = (exact.to(weight.dtype).float() - exact).norm()
    assert (weight.float() - exact).norm() <= 1.2 * off + 1e-6


@pytest.mark.parametrize(
    ("bits", "state_bits", "block_in", "dtype"),
    [(2, 12, 128, torch.bfloat16), (3, 16, 64, torch.float16), (4, 12, 128, torch.bfloat16)],
)
def test_trellis(
    build: Callable,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
    state_bits: int,
    block_in: int,
    dtype: torch.dtype,
) -> None:
    variants = (TrellisVariant(1, 2, 4, 2), TrellisVariant(1, 4, 4, 2), TrellisVariant(2, 8, 4, 1))
    monkeypatch.setattr(native, "_module", build(variants))
    rows, columns = 256, 384
    w, weight = trellis(bits, state_bits, (128, block_in), rows, columns, 0.02)
    for variant, batches in zip(variants, ((1,), (4,), (5, 9)), strict=True):
        for batch in batches:
            x = torch.randn(batch, columns).to(dtype)
            assert_product(native.trellis(w, x, variant), x, weight)
            assert not w.locks.any()
    assert_rounded(native.expand_trellis(w, dtype, 128, 128), weight[128:])


@pytest.mark.parametrize(
    ("kind", "bits", "group_size", "columns", "dtype"),
    [
        ("uniform", 4, 64, 320, torch.bfloat16),
        ("uniform", 3, 32, 96, torch.float16),
        ("lut", 3, 0, 260, torch.bfloat16),
    ],
)
def test_products_with_experts(
    make_layer: Callable,
    build: Callable,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(native, "_module", build((native.EXPERTS,)))
    rows = 40
    layers = [make_layer(kind, bits, group_size, rows, columns, density=density) for density in (0.05, 0, 0.02)]
    for number, layer in enumerate(layers):  # of one seed: different all the same
        layer.tensors["qweight"] ^= number
    of_each = [weights_of(layer) for layer in layers]
    w = of_each[0]._replace(**stack([dict(zip(NAMES, one, strict=False)) for one in of_each]))
    experts = torch.tensor([2, 0, -1, 1, 1, 2], dtype=torch.int32)
    for share in (1, 2, 3):
        x = torch.randn(len(experts) // share, columns).to(dtype)
        y = native.expert_products(w, x, experts, share)
        assert y.shape == (len(experts), rows)
        for p, expert in enumerate(experts.tolist()):
            if expert < 0:
                assert not y[p].any()
            else:
                assert_product(y[p : p + 1], x[p // share][None], layers[expert].weight())
    # one expert's weights serve every other kernel
    alone, own = w.expert(2), of_each[2]
    assert torch.equal(alone.codes, own.codes) and torch.equal(alone.params, own.params)
    first = int(alone.sparse_indptr[0])
    assert torch.equal(alone.sparse_indptr - first, own.sparse_indptr)
    assert torch.equal(alone.sparse_entries[first:], own.sparse_entries)
