"""Launches of the CUDA C++ kernels: which variant serves which batch, its arguments and its workspace."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tuning
from .driver import Module
from .weights import Weights, tiled

__all__ = [
    "MATVEC_VARIANTS",
    "MOST",
    "TRELLIS_VARIANTS",
    "Matvec",
    "TrellisVariant",
    "expand",
    "expand_trellis",
    "expert_products",
    "instances",
    "matvec",
    "matvec_candidates",
    "matvec_variant",
    "source",
    "takes_trellis",
    "trellis",
    "trellis_candidates",
    "trellis_variant",
]

MOST = 64
"""Activations that the fused kernels take."""
_SHARED = 224 << 10  # bytes of a multiprocessor's shared memory that blocks may take
_RECORD = 144  # bytes of 64 columns of a rotated activation, see trellis.cu


class Matvec(NamedTuple):
    """A variant of ``matvec``: template arguments of matvec.cu, then how it is launched.

    Attributes:
        n_tiles, single, row_warps, column_warps, kbytes: as there; kilobytes of a warp's ring.
        resident: blocks that find room on a multiprocessor, those of the next launch among them.
        splits: blocks that share the columns of a row tile.
        blocks: of one launch, a multiprocessor.
    """

    n_tiles: int
    single: bool
    row_warps: int
    column_warps: int
    kbytes: int
    resident: int
    splits: int = 1
    blocks: int = 1

    @property
    def name(self) -> str:
        return "_".join(("matvec", str(self.n_tiles), str(self.single).lower(), *map(str, self[2:6])))

    @property
    def instance(self) -> str:
        return f"MATVEC({self.n_tiles}, {str(self.single).lower()}, {', '.join(map(str, self[2:6]))})"

    @property
    def threads(self) -> int:
        """Of a block: warps that multiply, and those that add."""
        return 32 * (self.row_warps * self.column_warps + (1 if self.single else 2 if self.n_tiles <= 2 else 4))

    def shared(self, w: Weights, batch: int) -> int:
        """Bytes of shared memory, as matvec.cu lays it out."""
        warps, rows = self.row_warps * self.column_warps, 16 * self.row_warps
        chunks = -(-_chunks(w) // self.splits)
        metas, places = 0 if w.lut else _metas(w), 1 if self.single else 8 * self.n_tiles
        rings = warps * max(2, 2 * self.kbytes // w.bits) * (512 * w.bits + 96 * metas)
        activations = chunks * places * (512 + 16 * metas) + -(-batch // 4) * 16
        tables = 0
        if w.lut:
            tables = self.row_warps * _table_bytes(w.bits, 32 if self.row_warps == 1 or w.bits < 4 else 8)
            tables += _alignment_bytes(w.bits)
        buffers = 4 if self.single else 2
        return rings + activations + tables + buffers * (self.column_warps + 1) * batch * (rows + 4) * 4

    def grid(self, w: Weights, multiprocessors: int) -> tuple[int, int, int]:
        """As many blocks as fit at a time, or as there is work for."""
        stretches = -(-w.codes.shape[0] // self.row_warps)
        chunks = _chunks(w)
        splits = -(-chunks // -(-chunks // self.splits))  # so that each has some
        return min(stretches, max(1, multiprocessors * self.blocks // splits)), splits, 1


def _metas(w: Weights) -> int:
    """Groups of 128 columns of the ``uniform`` kind, as matvec.cu counts them."""
    return 1 if w.group_size % 128 == 0 else 2 if w.group_size % 64 == 0 else 4


def _chunks(w: Weights) -> int:
    """Of 256 columns."""
    return -(-w.codes.shape[1] // 4)


def _table_bytes(bits: int, slots: int) -> int:
    """Of a row tile, as in codes.cuh."""
    return 2 * slots * 4 << (2 * bits)


def _alignment_bytes(bits: int) -> int:
    """By which tables may begin later: of 4 bits anywhere, others at a multiple of half of what they take."""
    return 0 if bits == 4 else _table_bytes(bits, 32) // 2


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

    @property
    def splits(self) -> int:
        """Blocks that share the columns."""
        return self.lanes // 2

    def shared(self, w: Weights, batch: int) -> int:
        """Bytes of shared memory, as trellis.cu lays it out; more than four activations are rotated beforehand."""
        share = min(batch, 4 * self.n_tiles)
        records = 0 if batch > 4 else 2 * -(-_pieces(w) // self.splits) + 1
        return (2 * (8 + 1) * 128 * 4 + records * _RECORD) * share


def _fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _MatvecArguments(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "codes params zeros indptr entries x y partial locks experts"),
        *_fields(ctypes.c_int64, "x_stride codes_stride params_stride zeros_stride"),
        *_fields(ctypes.c_int, "batch rows columns tiles groups share"),
        *_fields(ctypes.c_uint32, "group_factor"),
    )


class _TrellisArguments(ctypes.Structure):
    _fields_ = (
        *_fields(ctypes.c_void_p, "codes scales signs_in signs_out indptr entries x y partial locks rotated"),
        *_fields(ctypes.c_int64, "x_stride"),
        *_fields(ctypes.c_int, "batch rows columns block_in"),
    )


MATVEC_VARIANTS = (
    Matvec(1, True, 1, 7, 4, 4),
    Matvec(1, True, 1, 7, 6, 3),
    Matvec(1, True, 1, 7, 8, 2),
    Matvec(1, True, 1, 3, 8, 4),
    Matvec(1, True, 1, 15, 4, 2),
    Matvec(1, True, 1, 15, 8, 1),
    Matvec(1, False, 1, 6, 6, 2),
    Matvec(1, False, 2, 7, 4, 1),
    Matvec(2, False, 2, 3, 6, 2),
    Matvec(2, False, 2, 7, 4, 1),
    Matvec(4, False, 4, 3, 4, 1),
    Matvec(8, False, 4, 3, 4, 1),
)
"""All that are compiled; tuning tables name them by their index."""
TRELLIS_VARIANTS = tuple(
    TrellisVariant(n_tiles, lanes, 4, 3 - n_tiles) for n_tiles in (1, 2) for lanes in (2, 4, 8, 16)
)
EXPERTS = Matvec(1, True, 1, 3, 8, 4, blocks=4)
"""The one variant of experts.cu."""
_FIRST = {1: 2, 8: 7, 16: 9, 32: 10}  # untuned: of MATVEC_VARIANTS, by batch class


def matvec_candidates(w: Weights, batch: int) -> list[Matvec]:
    """Variants that can serve a layer and a batch."""
    size, chunks = tuning.batch_class(batch), _chunks(w)
    fitting = [v for v in MATVEC_VARIANTS if v.single == (size == 1) and 8 * v.n_tiles == max(size, 8)]
    # of one activation it takes so few rows for blocks to share the columns
    several = size > 1 or w.codes.shape[0] <= 128
    every = [
        v._replace(splits=splits, blocks=blocks)
        for v in fitting
        for splits in ((1, 2, 4, 8) if several else (1,))
        for blocks in (1, 2, 3, 4)
        if splits <= chunks and blocks <= v.resident
    ]
    return [v for v in every if v.shared(w, size) <= _SHARED]


def matvec_variant(w: Weights, batch: int) -> Matvec | None:
    """The variant for a layer and a batch; None where expanded weights are faster."""
    size, chunks = tuning.batch_class(batch), _chunks(w)
    known, entry = _tuned(w, batch)
    if known:
        return None if entry is None else MATVEC_VARIANTS[entry[0]]._replace(splits=entry[1], blocks=entry[2])
    if size == 64:
        return None
    # a class has the same variant throughout, so that a row has the same sums in every batch of it
    chosen = MATVEC_VARIANTS[_FIRST[size]]
    while chosen.shared(w, size) > _SHARED and chosen.splits < chunks:
        chosen = chosen._replace(splits=min(2 * chosen.splits, chunks))
    return chosen if chosen.shared(w, size) <= _SHARED else None


def _pieces(w: Weights) -> int:
    """Of 128 columns, which are rotated together."""
    return -(-w.in_features // 128)


def trellis_candidates(w: Weights, batch: int) -> list[TrellisVariant | None]:
    """Variants that can serve a layer and a batch, None in the place of those that cannot."""
    first = 0 if batch <= 4 else 4  # those of four activations, of eight
    return [
        v if w.in_features // v.splits >= 256 and v.shared(w, batch) <= _SHARED else None
        for v in TRELLIS_VARIANTS[first : first + 4]
    ]


def trellis_variant(w: Weights, batch: int) -> TrellisVariant | None:
    """The variant for a layer and a batch; None where expanded weights are faster."""
    known, entry = _tuned(w, batch)
    first = 0 if batch <= 4 else 4
    if known:
        return None if entry is None else TRELLIS_VARIANTS[first + entry[0]]
    if batch > 32:
        return None
    index, blocks = 0, w.codes.shape[0] * (-(-batch // 8) if batch > 8 else 0)
    while index < 3 and w.in_features >> index >= 1024 and blocks << index < 128:
        index += 1
    return TRELLIS_VARIANTS[first + index]


def _tuned(w: Weights, batch: int) -> tuple[bool, list[int] | None]:
    if not w.codes.is_cuda:
        return False, None
    return tuning.lookup(w.codes.get_device(), f"{w.kind}{w.bits}", w.out_features, w.in_features, batch)


@cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _overlaps(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


_MATVEC_SOURCES = ("types.cuh", "primitives.cuh", "codes.cuh", "matvec.cu")
_SOURCES = {
    "matvec": (*_MATVEC_SOURCES, "expand.cu"),
    "experts": (*_MATVEC_SOURCES, "experts.cu"),
    "trellis": ("types.cuh", "primitives.cuh", "strings.cuh", "trellis.cu", "expand_strings.cu"),
}


@cache
def source(name: str) -> str:
    """CUDA C++ of a module: ``"matvec"``, ``"experts"`` or ``"trellis"``."""
    folder = Path(__file__).parent / "cuda"
    return "".join((folder / file).read_text() for file in _SOURCES[name])


def instances(name: str, variants: Sequence[Matvec | TrellisVariant]) -> tuple[str, list[str]]:
    """What makes kernels of the templates of a module, and the names of all its kernels."""
    text = "\n".join(variant.instance for variant in variants)
    if name == "experts":
        return text.replace("MATVEC", "EXPERTS"), ["experts"]
    extra = ("expand_rows",) if name == "matvec" else ("rotate_activations", "expand_strings")
    return text, [*extra, *(variant.name for variant in variants)]


_VARIANTS: dict[str, Sequence[Matvec | TrellisVariant]] = {
    "matvec": MATVEC_VARIANTS,
    "experts": (EXPERTS,),
    "trellis": TRELLIS_VARIANTS,
}


@cache
def _module(name: str, defines: tuple[tuple[str, int], ...], device: int) -> Module:
    text, names = instances(name, _VARIANTS[name])
    module = Module(source(name) + text, dict(defines))
    # all at once: nothing is left to be loaded when a graph is captured
    for kernel in names:
        module.kernel(kernel)
    return module


def _compiled(name: str, w: Weights, x: Tensor, **defines: int) -> Module:
    defines |= {"BITS": w.bits, "BF16": int(x.dtype == torch.bfloat16), "WIDE": int(w.wide)}
    return _module(name, tuple(sorted(defines.items())), x.get_device())


def _pointers(w: Weights) -> tuple[int | None, int]:
    """Of the row pointers, null without a residual, and the entries."""
    return (w.sparse_indptr.data_ptr() if w.sparse_entries.numel() else None), w.sparse_entries.data_ptr()


def matvec(w: Weights, x: Tensor, variant: Matvec) -> Tensor:
    """``x · (dense + sparse)ᵀ`` of the ``uniform`` and ``lut`` kinds.

    Args:
        x: float16 or bfloat16 ``[batch, in_features]`` of up to ``MOST`` rows; in_features a multiple of 4, and rows a
            multiple of 8 bytes apart.
        variant: see :func:`matvec_variant`.
    """
    batch, rows = x.shape[0], w.out_features
    module = _matvec_module(w, x)
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    device = x.get_device()
    grid = variant.grid(w, _multiprocessors(device))
    partial = torch.empty(grid[1], batch, rows, dtype=torch.float32, device=x.device) if grid[1] > 1 else y
    arguments = _matvec_arguments(w, x, y, partial)
    module.kernel(variant.name)(
        grid,
        variant.threads,
        variant.shared(w, batch),
        arguments,
        torch.cuda.current_stream(device).cuda_stream,
        _overlaps(device),
    )
    return y


def expert_products(w: Weights, x: Tensor, experts: Tensor, share: int) -> Tensor:
    """``x[p // share] · (dense + sparse)ᵀ`` with the weights of expert ``experts[p]``, for every ``p``.

    Args:
        w: of several experts, see :func:`vllm_requant.kernels.gpu.weights.stack`; ``uniform`` or ``lut``.
        x: float16 or bfloat16 ``[pairs / share, in_features]``, in_features and rows as for :func:`matvec`.
        experts: int32 ``[pairs]``, contiguous; below zero for one that is not here.

    Returns:
        ``[pairs, out_features]``, zeros where there is no expert.
    """
    one, pairs, device = w.expert(0), experts.numel(), x.get_device()
    module = _matvec_module(one, x, "experts")
    y = torch.zeros(pairs, w.out_features, dtype=x.dtype, device=x.device)
    arguments = _matvec_arguments(one, x, y, y)
    arguments.experts, arguments.batch, arguments.share = experts.data_ptr(), 1, share
    arguments.codes_stride, arguments.zeros_stride = w.codes.stride(0), w.zeros.stride(0) // 2
    arguments.params_stride = w.params.stride(0) // 2  # in words
    multiprocessors = max(1, _multiprocessors(device) // pairs)  # for each
    x_blocks, *_ = EXPERTS.grid(one, multiprocessors)
    module.kernel("experts")(
        (x_blocks, 1, pairs),
        EXPERTS.threads,
        EXPERTS.shared(one, 1),
        arguments,
        torch.cuda.current_stream(device).cuda_stream,
        _overlaps(device),
    )
    return y


def expand(w: Weights, dtype: torch.dtype, first_row: int = 0, count: int | None = None) -> Tensor:
    """Rows of ``dense + sparse`` of the ``uniform`` and ``lut`` kinds.

    Args:
        w: in_features a multiple of 4.
        dtype: float16 or bfloat16.
        first_row: a multiple of 16.
        count: all that follow by default.
    """
    count = w.out_features - first_row if count is None else count
    columns = w.in_features
    out = torch.empty(count, columns, dtype=dtype, device=w.codes.device)
    if count == 0:
        return out
    module = _matvec_module(w, out)
    tiles = w.codes.shape[1]
    arguments = _matvec_arguments(w, out, out, out)
    arguments.rows, arguments.batch = first_row + count, first_row
    parts = max(1, min(tiles // 16, 4))
    device = out.get_device()
    module.kernel("expand_rows")(
        (-(-count // 16), parts, 1),
        256,
        _table_bytes(w.bits, 8 if w.bits == 4 else 32) + _alignment_bytes(w.bits) if w.lut else 0,
        arguments,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return out


def _matvec_module(w: Weights, x: Tensor, name: str = "matvec") -> Module:
    return _compiled(
        name,
        w,
        x,
        LUT=int(w.lut),
        METAS=1 if w.lut else _metas(w),
        TAIL=int(w.in_features % 128 != 0),
    )


def _matvec_arguments(w: Weights, x: Tensor, y: Tensor, partial: Tensor) -> _MatvecArguments:
    """What the kernels of matvec.cu take."""
    return _MatvecArguments(
        w.codes.data_ptr(),
        w.params.data_ptr(),
        w.zeros.data_ptr(),
        *_pointers(w),
        x.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        w.locks.data_ptr(),
        None,
        x.stride(0),
        *(0, 0, 0),
        x.shape[0],
        w.out_features,
        w.in_features,
        w.codes.shape[1],
        0 if w.lut else w.params.shape[1],
        1,
        0 if w.lut else -(-(1 << 32) // (2 * (w.group_size // 32))),
    )


def trellis(w: Weights, x: Tensor, variant: TrellisVariant) -> Tensor:
    """``x · (dense + sparse)ᵀ`` of the ``trellis`` kind, see :func:`takes_trellis`.

    Args:
        x: float16 or bfloat16 ``[batch, in_features]``, rows a multiple of 8 bytes apart.
        variant: see :func:`trellis_variant`.
    """
    batch, rows = x.shape[0], w.out_features
    module = _compiled("trellis", w, x, STATE_BITS=w.state_bits)
    y = torch.empty(batch, rows, dtype=x.dtype, device=x.device)
    splits, most = variant.splits, 4 * variant.n_tiles
    partial = y
    if splits > 1:
        partial = torch.empty(splits + 1, batch, rows, dtype=torch.float32, device=x.device)
    pieces, rotated = _pieces(w), None
    if batch > 4:
        rotated = torch.empty(2 * pieces * batch * _RECORD, dtype=torch.uint8, device=x.device)
    arguments = _trellis_arguments(w, x, y, partial)
    arguments.rotated = None if rotated is None else rotated.data_ptr()
    device = x.get_device()
    stream, overlap = torch.cuda.current_stream(device).cuda_stream, _overlaps(device)
    if rotated is not None:
        module.kernel("rotate_activations")((-(-pieces * batch // 4), 1, 1), 128, 0, arguments, stream, overlap)
    blocks = max(1, _multiprocessors(device) * variant.blocks // splits)
    grid = (min(rows // 128, blocks), splits, -(-batch // most))
    module.kernel(variant.name)(grid, 256, variant.shared(w, batch), arguments, stream, overlap)
    return y


def _trellis_arguments(w: Weights, x: Tensor, y: Tensor, partial: Tensor) -> _TrellisArguments:
    """What the kernels of trellis.cu take."""
    return _TrellisArguments(
        w.codes.data_ptr(),
        w.params.data_ptr(),
        w.signs_in.data_ptr(),
        w.signs_out.data_ptr(),
        *_pointers(w),
        x.data_ptr(),
        y.data_ptr(),
        partial.data_ptr(),
        w.locks.data_ptr(),
        None,
        x.stride(0),
        x.shape[0],
        w.out_features,
        w.in_features,
        w.block_in,
    )


def expand_trellis(w: Weights, dtype: torch.dtype, first_row: int = 0, count: int | None = None) -> Tensor:
    """Rows of ``dense + sparse`` of the ``trellis`` kind, see :func:`takes_trellis`.

    Args:
        dtype: float16 or bfloat16.
        first_row, count: multiples of 128; all that follow by default.
    """
    count = w.out_features - first_row if count is None else count
    out = torch.empty(count, w.in_features, dtype=dtype, device=w.codes.device)
    module = _compiled("trellis", w, out, STATE_BITS=w.state_bits)
    arguments = _trellis_arguments(w, out, out, out)
    arguments.batch = first_row // 128
    device = out.get_device()
    module.kernel("expand_strings")(
        (count // 128, -(-w.in_features // 128), 1),
        256,
        (128 * 136 + 128) * 4,
        arguments,
        torch.cuda.current_stream(device).cuda_stream,
    )
    return out


def takes_trellis(w: Weights) -> bool:
    """Whether there is a fused kernel for this trellis."""
    return tiled(w.bits, w.block_out) and w.block_in >= 64 and w.in_features % 64 == 0
