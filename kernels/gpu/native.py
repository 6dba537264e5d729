"""Launches of the CUDA C++ kernels: which variant serves which batch, its arguments and its workspace."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .driver import Module
from .weights import Weights, tiled

__all__ = [
    "MOST",
    "Matvec",
    "TrellisVariant",
    "matvec",
    "matvec_variant",
    "takes_trellis",
    "trellis",
    "trellis_variant",
]

MOST = 64
"""Activations that the fused kernels take."""
_LONGEST = 40_000  # columns of which shared memory holds one activation beside the tables
_RECORD = 144  # bytes of 64 columns of a rotated activation, see trellis.cu
_BLOCKS_WANTED = 256  # of the smallest launch: two for each multiprocessor of an H100


class Matvec(NamedTuple):
    """A variant of ``matvec``: template arguments of matvec.cu and how many blocks share the columns of a row tile."""

    n_tiles: int
    single: bool
    row_warps: int
    column_warps: int
    ahead: int
    blocks: int
    splits: int = 1

    @property
    def name(self) -> str:
        return "_".join(("matvec", str(self.n_tiles), str(self.single).lower(), *map(str, self[2:6])))

    @property
    def instance(self) -> str:
        return f"MATVEC({self.n_tiles}, {str(self.single).lower()}, {', '.join(map(str, self[2:6]))})"


class TrellisVariant(NamedTuple):
    """A variant of ``trellis``: template arguments of trellis.cu; ``lanes / 2`` blocks share the columns."""

    n_tiles: int
    lanes: int
    ahead: int
    blocks: int

    @property
    def name(self) -> str:
        return "_".join(("trellis", *map(str, self)))

    @property
    def instance(self) -> str:
        return f"TRELLIS({', '.join(map(str, self))})"


class _MatvecArguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in "codes params zeros indptr entries x y partial locks".split()),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in "batch rows columns tiles groups".split()),
        ("group_factor", ctypes.c_uint32),
    )


class _TrellisArguments(ctypes.Structure):
    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in "codes scales signs_in signs_out indptr entries x y partial locks rotated".split()
        ),
        ("x_stride", ctypes.c_int64),
        *((name, ctypes.c_int) for name in "batch rows columns block_in".split()),
    )


def matvec_variant(w: Weights, batch: int) -> Matvec:
    """The variant for a layer and a batch."""
    row_tiles, columns = w.codes.shape[0], w.in_features
    if batch == 1 and columns <= _LONGEST:
        return Matvec(1, True, 1, 8, 4, 2)
    n_tiles = 1 if batch <= 8 else 2 if batch <= 16 else 4 if batch <= 32 else 8
    row_warps = 2 if n_tiles == 1 else 4
    splits = 1
    while row_tiles // row_warps * splits < _BLOCKS_WANTED and splits < 8 and columns // splits >= 1024:
        splits *= 2
    return Matvec(n_tiles, False, row_warps, 8 // row_warps, 2, 1, splits)


_MATVEC_VARIANTS = (
    Matvec(1, True, 1, 8, 4, 2),
    Matvec(1, False, 2, 4, 2, 1),
    Matvec(2, False, 4, 2, 2, 1),
    Matvec(4, False, 4, 2, 2, 1),
    Matvec(8, False, 4, 2, 2, 1),
)


def trellis_variant(w: Weights, batch: int) -> TrellisVariant:
    """The variant for a layer and a batch."""
    splits = 1
    while w.codes.shape[0] * splits < _BLOCKS_WANTED and splits < 16 and w.in_features // splits >= 1024:
        splits *= 2
    return TrellisVariant(1 if batch <= 4 else 2, 2 * splits, 4, 2 if batch <= 4 else 1)


@cache
def _source(name: str) -> str:
    folder = Path(__file__).parent / "cuda"
    return (folder / "primitives.cuh").read_text() + (folder / f"{name}.cu").read_text()


@cache
def _module(name: str, instances: str, defines: tuple[tuple[str, int], ...], device: int) -> Module:
    return Module(_source(name) + instances, dict(defines))


def _compiled(
    name: str, variants: Sequence[Matvec | TrellisVariant], w: Weights, x: Tensor, **defines: int
) -> Module:
    defines |= {"BITS": w.bits, "BF16": int(x.dtype == torch.bfloat16), "WIDE": int(w.wide)}
    instances = "\n".join(variant.instance for variant in dict.fromkeys(variants))
    return _module(name, instances, tuple(sorted(defines.items())), x.get_device())


def _pointers(w: Weights) -> tuple[int | None, int]:
    """Of the row pointers, null without a residual, and the entries."""
    return (w.sparse_indptr.data_ptr() if w.sparse_entries.numel() else None), w.sparse_entries.data_ptr()


def matvec(w: Weights, x: Tensor, variant: Matvec | None = None) -> Tensor:
    """``x · (dense + sparse)ᵀ`` of the ``uniform`` and ``lut`` kinds.

    Args:
        x: float16 or bfloat16 ``[batch, in_features]`` of up to ``MOST`` rows; in_features a multiple of 4, and rows a
            multiple of 8 bytes apart.
        variant: another than :func:`matvec_variant` gives.
    """
    batch, columns = x.shape
    tiles, rows = w.codes.shape[1], w.out_features
    chosen = variant or matvec_variant(w, batch)
    module = _compiled(
        "matvec",
        _MATVEC_VARIANTS if variant is None else (chosen,),
        w,
        x,
        LUT=int(w.lut),
        HALVES=int(w.group_size % 64 != 0),
        TAIL=int(columns % 64 != 0),
    )
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    splits = chosen.splits
    partial = torch.empty(splits, batch, rows, dtype=torch.float32, device=x.device) if splits > 1 else y
    arguments = _MatvecArguments(
        w.codes.data_ptr(),
        w.params.data_ptr(),
        w.zeros.data_ptr(),
        *_pointers(w),
        x.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        w.locks.data_ptr(),
        x.stride(0),
        batch,
        rows,
        columns,
        tiles,
        0 if w.lut else w.params.shape[1],
        0 if w.lut else -(-(1 << 32) // (2 * (w.group_size // 32))),
    )
    row_blocks = -(-rows // (16 * chosen.row_warps))
    before = tiles * 128 * chosen.single
    if w.lut:
        slots = 32 if w.bits == 2 or (w.bits == 3 and chosen.row_warps == 1) else 8
        before += chosen.row_warps * 2 * slots * 4 << (2 * w.bits)
    after = chosen.column_warps * 16 * chosen.row_warps * (1 if chosen.single else 8 * chosen.n_tiles) * 4
    stream = torch.cuda.current_stream(x.device).cuda_stream
    threads = 32 * chosen.row_warps * chosen.column_warps
    module.kernel(chosen.name)((row_blocks, splits, 1), threads, max(before, after), arguments, stream)
    return y


def trellis(w: Weights, x: Tensor, variant: TrellisVariant | None = None) -> Tensor:
    """``x · (dense + sparse)ᵀ`` of the ``trellis`` kind, see :func:`takes_trellis`.

    Args:
        x: float16 or bfloat16 ``[batch, in_features]``, rows a multiple of 8 bytes apart.
        variant: another than :func:`trellis_variant` gives.
    """
    batch, columns = x.shape
    rows = w.out_features
    chosen = variant or trellis_variant(w, batch)
    module = _compiled("trellis", (chosen,), w, x, STATE_BITS=w.state_bits)
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    splits, most = chosen.lanes // 2, 4 * chosen.n_tiles
    partial = y
    if splits > 1:
        partial = torch.empty(splits + 1, batch, rows, dtype=torch.float32, device=x.device)
    pieces = -(-columns // 128)
    rotated = None
    if batch > 4:
        rotated = torch.empty(2 * pieces * batch * _RECORD, dtype=torch.uint8, device=x.device)
    arguments = _TrellisArguments(
        w.codes.data_ptr(),
        w.params.data_ptr(),
        w.signs_in.data_ptr(),
        w.signs_out.data_ptr(),
        *_pointers(w),
        x.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        w.locks.data_ptr(),
        None if rotated is None else rotated.data_ptr(),
        x.stride(0),
        batch,
        rows,
        columns,
        w.block_in,
    )
    stream = torch.cuda.current_stream(x.device).cuda_stream
    share = min(batch, most)
    shared = (8 + 1) * share * 128 * 4
    if rotated is None:
        shared = max(shared, (2 * -(-pieces // splits) + 1) * share * _RECORD)
    else:
        module.kernel("rotate_activations")((-(-pieces * batch // 4), 1, 1), 128, 0, arguments, stream)
    grid = (rows // 128, splits, -(-batch // most))
    module.kernel(chosen.name)(grid, 256, shared, arguments, stream)
    return y


def takes_trellis(w: Weights) -> bool:
    """Whether there is a fused kernel for this trellis."""
    return tiled(w.bits, w.block_out) and w.block_in >= 64 and w.in_features % 64 == 0
