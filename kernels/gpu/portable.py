"""Launches of the Triton kernels."""

import torch
from torch import Tensor

from . import tiles
from .weights import Weights, tiled

__all__ = ["embedding", "expand", "linear"]

_COLUMNS, _STEPS = 128, 8
"""Columns that a program expands at a time, and how often at the most."""


def expand(w: Weights, dtype: torch.dtype, first_row: int = 0, count: int | None = None) -> Tensor:
    """Rows ``first_row`` … of ``dense + sparse``: ``[count, in_features]`` of type ``dtype``, all by default.

    For the ``trellis`` kind both numbers are multiples of its row blocks.
    """
    count = w.out_features - first_row if count is None else count
    out = torch.empty(count, w.in_features, dtype=dtype, device=w.codes.device)
    if w.kind != "trellis":
        return _expand_rows(w, out, None, first_row)
    block_out, block_in = w.block_out, w.block_in
    tiles.expand_trellis[count // block_out, w.in_features // block_in](
        w.codes.view(torch.int16),
        w.params,
        w.signs_in,
        w.signs_out,
        w.sparse_indptr,
        w.sparse_entries,
        out,
        out.stride(0),
        first_row // block_out,
        w.in_features,
        BITS=w.bits,
        STATE_BITS=w.state_bits,
        BLOCK_OUT=block_out,
        BLOCK_IN=block_in,
        TILED=tiled(w.bits, block_out),
        EXACT=dtype != torch.bfloat16,
        RESIDUAL=w.sparse_entries.numel() > 0,
        WIDE=w.wide,
        num_warps=8 if block_out * block_in > 4096 else 4,
    )
    return out


def embedding(w: Weights, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` ``[n]`` of ``dense + sparse``, the float32 sum rounded once: ``[n, in_features]``."""
    out = torch.empty(ids.numel(), w.in_features, dtype=torch.float32, device=ids.device)
    return _expand_rows(w, out, ids, 0).to(dtype)


def _expand_rows(w: Weights, out: Tensor, ids: Tensor | None, first_row: int) -> Tensor:
    if out.numel() == 0:
        return out
    rows = 16
    steps = next(steps for steps in (1, 2, 4, _STEPS) if steps == _STEPS or steps * _COLUMNS >= w.in_features)
    tiles.expand_rows[-(-out.shape[0] // rows), -(-w.in_features // (_COLUMNS * steps))](
        w.codes,
        w.params,
        w.zeros,
        w.sparse_indptr,
        w.sparse_entries,
        w.codes if ids is None else ids,
        out,
        out.stride(0),
        first_row,
        out.shape[0],
        w.in_features,
        w.codes.shape[1],
        1 if w.lut else w.params.shape[1],
        max(w.group_size, 1),
        LUT=w.lut,
        BITS=w.bits,
        GATHER=ids is not None,
        RESIDUAL=w.sparse_entries.numel() > 0,
        WIDE=w.wide,
        ROWS=rows,
        COLUMNS=_COLUMNS,
        STEPS=steps,
    )
    return out


def linear(w: Weights, x: Tensor) -> Tensor:
    """``x · (dense + sparse)ᵀ`` of the ``uniform`` and ``lut`` kinds, weights rounded to the type of ``x``.

    Args:
        x: float16 or bfloat16 ``[batch, in_features]``, columns side by side.
    """
    batch = x.shape[0]
    y = torch.empty(batch, w.out_features, dtype=x.dtype, device=x.device)
    size = 16 if batch <= 16 else 32
    tiles.product[-(-w.out_features // 32), -(-batch // size)](
        x,
        w.codes,
        w.params,
        w.zeros,
        w.sparse_indptr,
        w.sparse_entries,
        y,
        x.stride(0),
        batch,
        w.out_features,
        w.in_features,
        w.codes.shape[1],
        1 if w.lut else w.params.shape[1],
        max(w.group_size, 1),
        LUT=w.lut,
        BITS=w.bits,
        RESIDUAL=w.sparse_entries.numel() > 0,
        WIDE=w.wide,
        BATCH=size,
        ROWS=32,
        COLUMNS=64,
        UPCAST=not x.is_cuda,
    )
    return y
