"""The native CPU kernels: loading the shared object and calling its C ABI on tensors.

Assumes what :mod:`vllm_requant.kernels.ops` has checked: contiguous CPU tensors of matching shapes. The
shared object is loaded at first use. ``REQUANT_CPU_ISA`` (``scalar``, ``avx2`` or ``avx512``), read then, caps
the instruction set.
"""

import ctypes
import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..native import HOW_TO_BUILD, NativeCodeError, open_library

__all__ = [
    "ISA_NAMES",
    "TrellisWeights",
    "Weights",
    "add_sparse_product",
    "dequantize",
    "isa",
    "library",
    "linear",
    "repack_codes",
    "trellis_dequantize",
    "trellis_linear",
    "trellis_rotate",
]

ISA_NAMES = ("scalar", "avx2", "avx512")
CODE_SLACK = 128
"""Bytes behind the last row of codes that a kernel may read (CODE_SLACK in kernels.h)."""

_KINDS = {"uniform": 0, "lut": 1}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAILURES = {-1: ValueError, -2: MemoryError, -3: IndexError}
_REASONS = {
    -1: "bits, group_size or shape is none that the CPU kernels know",
    -2: "not enough memory",
    -3: "a row lies outside the weight",
}

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]
"""Run-time codes, scales or tables, zero points, and indptr, indices, values of the sparse part."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded shared object with its argument types set.

    Raises:
        NativeCodeError: it is missing or does not load; the message says how to build it.
        ValueError: ``REQUANT_CPU_ISA`` names no instruction set.
    """
    native = open_library(Path(__file__).parent, "_kernels")
    try:
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        weights = (number, number, size, size, size, *(5 * (pointer,)), number, pointer)
        native.requant_isa.argtypes = []
        native.requant_set_isa.argtypes = [number]
        native.requant_codes_bytes.argtypes = [number, size, size]
        native.requant_codes_bytes.restype = size
        native.requant_repack_codes.argtypes = [number, size, size, pointer, pointer]
        native.requant_linear.argtypes = (*weights, number, size, pointer, pointer)
        native.requant_dequantize.argtypes = (*weights, number, pointer, size, size, pointer)
        trellis = (number, number, size, size, size, size, pointer, pointer)
        native.requant_trellis_rotate.argtypes = [size, size, size, pointer, number, pointer]
        native.requant_trellis_linear.argtypes = [*trellis, *(4 * (pointer,)), number, pointer, size, pointer, pointer]
        native.requant_trellis_dequantize.argtypes = [*trellis, size, size, pointer]
        native.requant_add_sparse_product.argtypes = [
            size,
            size,
            pointer,
            pointer,
            number,
            pointer,
            size,
            pointer,
            pointer,
        ]
        native.requant_read.argtypes = [pointer, size, number]
        native.requant_read.restype = ctypes.c_uint64
    except AttributeError as error:
        raise NativeCodeError(f"the built CPU kernels are of another version ({error}): {HOW_TO_BUILD}") from error
    cap = os.environ.get("REQUANT_CPU_ISA")
    if cap:
        if cap not in ISA_NAMES:
            raise ValueError(f"REQUANT_CPU_ISA is {cap!r}, must be one of {', '.join(ISA_NAMES)}")
        native.requant_set_isa(ISA_NAMES.index(cap))
    return native


def isa() -> str:
    """Name of the instruction set in use."""
    return ISA_NAMES[library().requant_isa()]


def _check(status: int) -> None:
    if status:
        raise _FAILURES[status](_REASONS[status])


def row_bytes(bits: int, in_features: int) -> int:
    """Bytes of one row of run-time codes."""
    if bits == 8:
        return in_features
    # every segment (kernels.h) starts on a whole group of eight codes
    return (in_features + 7) // 8 * bits


def repack_codes(qweight: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Canonical row bit streams to the run-time layout of kernels.h.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]`` on the CPU.

    Returns:
        uint8 ``[out_features · row_bytes + CODE_SLACK]``.
    """
    native, rows = library(), qweight.shape[0]
    source = qweight.contiguous()
    out = torch.empty(native.requant_codes_bytes(bits, rows, in_features), dtype=torch.uint8)
    _check(native.requant_repack_codes(bits, rows, in_features, source.data_ptr(), out.data_ptr()))
    return out


def _arguments(kind: str, weights: Weights, bits: int, group_size: int, in_features: int) -> tuple[int | None, ...]:
    codes, scales, zeros, indptr, indices, values = weights
    return (
        _KINDS[kind],
        bits,
        group_size,
        scales.shape[0],
        in_features,
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        # an empty tensor has no address: the kernels take that for "no sparse part"
        indptr.data_ptr() or None,
        indices.data_ptr() or None,
        int(indices.dtype == torch.int32),
        values.data_ptr() or None,
    )


def linear(kind: str, x: Tensor, weights: Weights, *, bits: int, group_size: int) -> Tensor:
    """``x · (dense + sparse)ᵀ`` for a small batch, sums in float32.

    Args:
        x: contiguous ``[batch, in_features]``, float32, bfloat16 or float16.

    Returns:
        ``[batch, out_features]`` of ``x.dtype``.
    """
    batch, in_features = x.shape
    y = torch.empty(batch, weights[1].shape[0], dtype=x.dtype)
    arguments = _arguments(kind, weights, bits, group_size, in_features)
    _check(library().requant_linear(*arguments, _DTYPES[x.dtype], batch, x.data_ptr(), y.data_ptr()))
    return y


def dequantize(
    kind: str,
    weights: Weights,
    out: Tensor,
    *,
    bits: int,
    group_size: int,
    ids: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Write rows of ``dense + sparse`` into ``out`` and return it.

    Args:
        out: contiguous ``[count, in_features]``, float32, bfloat16 or float16.
        ids: contiguous int64 ``[count]``, the rows; without it they are ``first … first + count − 1``.

    Raises:
        IndexError: a row lies outside the weight.
    """
    count, in_features = out.shape
    arguments = _arguments(kind, weights, bits, group_size, in_features)
    rows = None if ids is None else ids.data_ptr()
    _check(library().requant_dequantize(*arguments, _DTYPES[out.dtype], rows, first, count, out.data_ptr()))
    return out


# ---- the trellis kind ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrellisWeights:
    """Run-time tensors of a trellis layer and what follows from their shapes.

    Attributes:
        qweight: uint8 ``[row blocks, tiles, 16 · bits]``.
        scales: float16 ``[row blocks, column blocks]``.
        signs_in, signs_out: float32, ±(block size)^−1/2 of every feature.
        indptr, indices, values: of the residual, empty without one.
        bits, state_bits: of the trellis.
    """

    qweight: Tensor
    scales: Tensor
    signs_in: Tensor
    signs_out: Tensor
    indptr: Tensor
    indices: Tensor
    values: Tensor
    bits: int
    state_bits: int

    @property
    def out_features(self) -> int:
        return self.signs_out.numel()

    @property
    def in_features(self) -> int:
        return self.signs_in.numel()

    @property
    def block_out(self) -> int:
        return self.out_features // self.scales.shape[0]

    @property
    def block_in(self) -> int:
        return self.in_features // self.scales.shape[1]

    def _arguments(self) -> tuple[int, ...]:
        return (
            self.bits,
            self.state_bits,
            self.out_features,
            self.in_features,
            self.block_out,
            self.block_in,
            self.qweight.data_ptr(),
            self.scales.data_ptr(),
        )


def trellis_linear(x: Tensor, weights: TrellisWeights) -> Tensor:
    """``x · (dense + sparse)ᵀ`` for a small batch, in float32.

    Args:
        x: contiguous ``[batch, in_features]``.

    Returns:
        ``[batch, out_features]``.
    """
    y = torch.empty(x.shape[0], weights.out_features)
    _check(
        library().requant_trellis_linear(
            *weights._arguments(),
            weights.signs_in.data_ptr(),
            weights.signs_out.data_ptr(),
            weights.indptr.data_ptr() or None,
            weights.indices.data_ptr() or None,
            int(weights.indices.dtype == torch.int32),
            weights.values.data_ptr() or None,
            x.shape[0],
            x.data_ptr(),
            y.data_ptr(),
        )
    )
    return y


def trellis_rotate(x: Tensor, signs: Tensor, block: int, *, signs_last: bool = False) -> Tensor:
    """Signs and block Hadamard transform of contiguous float32 rows ``[count, features]``, in place; returns ``x``."""
    status = library().requant_trellis_rotate(*x.shape, block, signs.data_ptr(), int(signs_last), x.data_ptr())
    _check(status)
    return x


def trellis_dequantize(weights: TrellisWeights, out: Tensor, first: int) -> Tensor:
    """Write rotated weights of the rows from ``first`` on into ``out``, contiguous float32 ``[count, in_features]``.

    ``first`` and ``count`` are multiples of the output block.
    """
    _check(library().requant_trellis_dequantize(*weights._arguments(), first, out.shape[0], out.data_ptr()))
    return out


def add_sparse_product(y: Tensor, x: Tensor, weights: TrellisWeights) -> None:
    """Add the residual's product to ``y``; float32 ``[batch, out_features]`` and ``[batch, in_features]``."""
    values = weights.values.float()
    _check(
        library().requant_add_sparse_product(
            weights.out_features,
            weights.in_features,
            weights.indptr.data_ptr(),
            weights.indices.data_ptr(),
            int(weights.indices.dtype == torch.int32),
            values.data_ptr(),
            x.shape[0],
            x.data_ptr(),
            y.data_ptr(),
        )
    )
