"""The native CPU kernels: loading the shared object and calling its C ABI on tensors.

Assumes contiguous CPU tensors; shapes are held against the header of the packed weight. The shared object is loaded at
first use, and then registers the native op with torch. ``REQUANT_CPU_ISA`` (``scalar``, ``avx2`` or ``avx512``, which
is AVX-512 with VNNI), read then, caps the instruction set.
"""

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from ..native import HOW_TO_BUILD, NativeCodeError, open_library
from . import memory

__all__ = [
    "ISA_NAMES",
    "SMALL_BATCH",
    "dequantize",
    "fused_batch",
    "is_trellis",
    "isa",
    "library",
    "linear",
    "linear_into",
    "multiplies_bfloat16",
    "pack",
    "pack_trellis",
    "packed_nbytes",
    "trellis_dequantize",
    "trellis_rotate",
    "trellis_rotate_back",
]

ISA_NAMES = ("scalar", "avx2", "avx512")
SMALL_BATCH = 16
"""Batches up to this one are multiplied from codes whatever the weight, the processor and the type of activations."""

_ANY = 1 << 62
FUSED_BATCHES = {
    "scalar": (SMALL_BATCH, SMALL_BATCH, SMALL_BATCH, SMALL_BATCH),
    "avx2": (128, 128, 24, SMALL_BATCH),
    "avx512": (_ANY, _ANY, _ANY, SMALL_BATCH),
    "bfloat16": (48, 48, 64, SMALL_BATCH),
}
"""Largest batches that are multiplied from codes, of uniform, lut and trellis weights and of any with float32 inputs;
for larger ones torch's product of dequantized panels is faster. By instruction set where torch computes that in
float32, ``bfloat16`` where activations have that type and the processor multiplies it. Measured on an AMD EPYC with
all of them; with AVX2 by forbidding torch and ourselves what is above."""

_KINDS = {"uniform": 0, "lut": 1}
_TRELLIS = 2
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAILURES = {-1: ValueError, -2: MemoryError, -3: IndexError}
_REASONS = {
    -1: "the weight does not have these features, or its bits, group_size or shape are none that the kernels know",
    -2: "not enough memory",
    -3: "a row lies outside the weight",
}

Sparse = tuple[Tensor, Tensor, Tensor] | None
"""indptr, indices, values of the sparse part, canonical."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded shared object with its argument types set and its op registered.

    Raises:
        NativeCodeError: it is missing or does not load; the message says how to build it.
        ValueError: ``REQUANT_CPU_ISA`` names no instruction set.
    """
    native = open_library(Path(__file__).parent, "_kernels")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    sparse, packed = (pointer, pointer, number, pointer), (pointer, size)
    signatures = {
        "requant_isa": (number, ()),
        "requant_set_isa": (number, (number,)),
        "requant_pack": (size, (number, number, size, size, size, *(4 * (pointer,)), *sparse, pointer)),
        "requant_pack_trellis": (size, (number, number, *(4 * (size,)), *(4 * (pointer,)), *sparse, pointer)),
        "requant_kind": (number, packed),
        "requant_linear": (number, (*packed, size, size, number, number, size, pointer, pointer)),
        "requant_dequantize": (number, (*packed, size, number, pointer, size, size, pointer)),
        "requant_trellis_dequantize": (number, (*packed, size, number, size, size, pointer)),
        "requant_trellis_rotate": (number, (*packed, size, pointer, pointer, number)),
        "requant_read": (ctypes.c_uint64, (pointer, size, number)),
        "requant_register_ops": (number, (pointer,)),
        "requant_set_fused_batch": (None, 4 * (size,)),
    }
    try:
        for name, (result, arguments) in signatures.items():
            function = getattr(native, name)
            function.restype, function.argtypes = result, list(arguments)
    except AttributeError as error:
        raise NativeCodeError(f"the built CPU kernels are of another version ({error}): {HOW_TO_BUILD}") from error
    cap = os.environ.get("REQUANT_CPU_ISA")
    if cap:
        if cap not in ISA_NAMES:
            raise ValueError(f"REQUANT_CPU_ISA is {cap!r}, must be one of {', '.join(ISA_NAMES)}")
        native.requant_set_isa(ISA_NAMES.index(cap))
    isa_name = ISA_NAMES[native.requant_isa()]
    native.requant_set_fused_batch(*FUSED_BATCHES["bfloat16" if multiplies_bfloat16() else isa_name])
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    if native.requant_register_ops(torch_cpu._handle):
        raise NativeCodeError(f"torch {torch.__version__} lacks the stable C interface that the CPU kernels use")
    return native


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without, torch takes several times as long as in float32."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def isa() -> str:
    """Name of the instruction set in use."""
    return ISA_NAMES[library().requant_isa()]


def _check(status: int) -> int:
    if status < 0:
        raise _FAILURES[status](_REASONS[status])
    return status


def _sparse_arguments(sparse: Sparse) -> tuple[int | None, int | None, int, int | None]:
    if sparse is None:
        return None, None, 0, None
    indptr, indices, values = sparse
    return indptr.data_ptr(), indices.data_ptr(), int(indices.dtype == torch.int32), values.data_ptr()


def pack(
    kind: str,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    sparse: Sparse,
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """One block of memory with all that a product needs, in the layout of kernels.h.

    Args:
        kind: ``"uniform"`` or ``"lut"``.
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]``, row bit streams.
        scales: float16 ``[out_features, groups]``, or tables ``[out_features, 2**bits]``.
        zeros: uint8 ``[out_features, groups]``; None for tables.

    Returns:
        uint8, one dimension.
    """
    tables = scales.float() if kind == "lut" else None
    arguments = (
        _KINDS[kind],
        bits,
        group_size,
        scales.shape[0],
        in_features,
        qweight.data_ptr(),
        scales.data_ptr(),
        None if tables is None else tables.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        *_sparse_arguments(sparse),
    )
    return _packed(library().requant_pack, arguments)


def pack_trellis(
    qweight: Tensor,
    scales: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    sparse: Sparse,
    *,
    bits: int,
    state_bits: int,
) -> Tensor:
    """The same for the trellis kind.

    Args:
        qweight: uint8 ``[row blocks, tiles, 16 · bits]``.
        scales: float16 ``[row blocks, column blocks]``.
        signs_in, signs_out: float32, ±(block size)^−1/2 of every feature.
    """
    rows, columns = signs_out.numel(), signs_in.numel()
    arguments = (
        bits,
        state_bits,
        rows,
        columns,
        rows // scales.shape[0],
        columns // scales.shape[1],
        *(tensor.data_ptr() for tensor in (qweight, scales, signs_in, signs_out)),
        *_sparse_arguments(sparse),
    )
    return _packed(library().requant_pack_trellis, arguments)


def packed_nbytes(
    kind: str,
    shape: tuple[int, int],
    *,
    bits: int,
    group_size: int = 0,
    state_bits: int = 0,
    blocks: tuple[int, int] = (0, 0),
    indptr: Tensor | None = None,
    wide: bool = False,
) -> int:
    """Bytes of what :func:`pack` or :func:`pack_trellis` returns, from shapes and the rows of the sparse part alone.

    Args:
        kind: ``"uniform"``, ``"lut"`` or ``"trellis"``.
        shape: output and input features.
        blocks: of a trellis, the Hadamard blocks of output and input features.
        indptr: int32 ``[out_features + 1]``; None without a sparse part.
        wide: sparse columns are int32.
    """
    sparse = (None, None, 0, None) if indptr is None else (indptr.data_ptr(), None, int(wide), None)
    if kind == "trellis":
        arguments = (bits, state_bits, *shape, *blocks, *(4 * (None,)), *sparse)
        return _check(library().requant_pack_trellis(*arguments, None))
    arguments = (_KINDS[kind], bits, group_size, *shape, *(4 * (None,)), *sparse)
    return _check(library().requant_pack(*arguments, None))


def _packed(function: "ctypes._FuncPointer", arguments: tuple[int | None, ...]) -> Tensor:
    out = memory.empty(_check(function(*arguments, None)))
    _check(function(*arguments, out.data_ptr()))
    return out


def is_trellis(packed: Tensor) -> bool:
    """Whether a packed weight is of the trellis kind."""
    return _check(library().requant_kind(packed.data_ptr(), packed.numel())) == _TRELLIS


def fused_batch(packed: Tensor, dtype: torch.dtype) -> int:
    """Largest batch of activations of that type that is multiplied from the codes of a packed weight."""
    largest = FUSED_BATCHES["bfloat16" if dtype == torch.bfloat16 and multiplies_bfloat16() else isa()]
    return largest[3 if dtype == torch.float32 else _check(library().requant_kind(packed.data_ptr(), packed.numel()))]


def linear(x: Tensor, packed: Tensor, *, out_features: int, planes: int) -> Tensor:
    """``x · (dense + sparse)ᵀ`` from codes.

    Args:
        x: contiguous ``[batch, in_features]``, float32, bfloat16 or float16.
        planes: bytes of an activation.

    Returns:
        ``[batch, out_features]`` of ``x.dtype``.
    """
    y = torch.empty(len(x), out_features, dtype=x.dtype)
    linear_into(x, packed, y, planes=planes)
    return y


def linear_into(x: Tensor, packed: Tensor, y: Tensor, *, planes: int) -> None:
    """The same into ``y``, contiguous ``[batch, out_features]`` of ``x.dtype``."""
    batch, in_features = x.shape
    weight = (packed.data_ptr(), packed.numel(), y.shape[1], in_features)
    _check(library().requant_linear(*weight, planes, _DTYPES[x.dtype], batch, x.data_ptr(), y.data_ptr()))


def dequantize(packed: Tensor, out: Tensor, *, ids: Tensor | None = None, first: int = 0) -> Tensor:
    """Write rows of ``dense + sparse`` of a uniform or lut weight into ``out`` and return it.

    Args:
        out: contiguous ``[count, in_features]``, float32, bfloat16 or float16.
        ids: contiguous int64 ``[count]``, the rows; without it they are ``first … first + count − 1``.

    Raises:
        IndexError: a row lies outside the weight.
    """
    count, in_features = out.shape
    rows = None if ids is None else ids.data_ptr()
    weight = (packed.data_ptr(), packed.numel(), in_features)
    _check(library().requant_dequantize(*weight, _DTYPES[out.dtype], rows, first, count, out.data_ptr()))
    return out


# ---- the trellis kind ----------------------------------------------------------------------------------------


def trellis_rotate(x: Tensor, packed: Tensor) -> Tensor:
    """Contiguous float32 ``[count, in_features]`` into the coordinates of a trellis, in place; returns ``x``."""
    _check(library().requant_trellis_rotate(packed.data_ptr(), packed.numel(), len(x), None, x.data_ptr(), 0))
    return x


def trellis_rotate_back(y: Tensor, x: Tensor, packed: Tensor) -> Tensor:
    """``y`` ``[count, out_features]`` out of them, in place, plus the residual's product with ``x``; returns ``y``."""
    weight = (packed.data_ptr(), packed.numel())
    _check(library().requant_trellis_rotate(*weight, len(y), x.data_ptr(), y.data_ptr(), 1))
    return y


def trellis_dequantize(packed: Tensor, out: Tensor, first: int) -> Tensor:
    """Write rotated weights of the rows from ``first`` on into ``out``, contiguous ``[in_features, count]``.

    ``out`` is float32, bfloat16 or float16; ``first`` and ``count`` are multiples of the output block.
    """
    columns, count = out.shape
    weight = (packed.data_ptr(), packed.numel(), columns)
    _check(library().requant_trellis_dequantize(*weight, _DTYPES[out.dtype], first, count, out.data_ptr()))
    return out
