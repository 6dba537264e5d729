"""Run-time layout of the weights on a GPU: what the kernels of this package read, made from the canonical tensors.

The ``uniform`` and ``lut`` kinds lie in tiles of 16 rows and 64 columns, missing ones being code 0, and an even number
of tiles beside each other: two of them, a *record*, are what is fetched at a time. A warp reads a tile
at once, lane ``l`` the codes of the rows ``l // 4`` and ``l // 4 + 8`` and of the columns ``16 f + 4 (l % 4) + i``,
``f`` and ``i`` in 0 … 3. Neighbouring columns ``i`` and ``i + 1`` of a row make a *pair*; pair ``4 f + i + h`` of a
lane, ``i`` even, is of row half ``h``. That is how the tensor cores want a 16 × 16 operand, four of them a tile. A
lane's 32 codes fill ``bits`` words; the codes ``a`` and ``b`` of a pair lie there

* ``uniform``, 2, 3 and 4 bit: at bit :func:`place` of a word and 16 bits above it, in circles: that is where, at most a
  rotation away, a code is in the mantissa of a float16; at 3 bit one pair of 16 has its bits in three words;
* ``uniform``, 8 bit: in four bytes a word, in order;
* ``lut``: side by side, ``a | b << bits``, in 32/(2 bits) fields a word; what three words leave at 3 bit, their bits 30
  and 31, are bits ``2 j`` and ``2 j + 1`` of the 16th pair.

The words of the 32 lanes are stored so that a warp reads consecutive addresses with the widest loads there are: four
words a lane, then the next four; or two; or two and then one.

A ``trellis`` with 128 rows a string lies in steps of 8 columns. Lane ``l`` has of the columns ``l % 4`` and
``l % 4 + 4`` the bits of the windows ``16 (l // 4)`` … ``+ 15``: at 2 and 4 bit as they are, at 3 bit first 32 bits of
either, then 16 bits of both in one word.
"""

import torch
from torch import Tensor

from ..bitstream import unpack_codes

__all__ = [
    "COLUMNS",
    "ROWS",
    "by_lanes",
    "group_pairs",
    "residual_entries",
    "tile_codes",
    "tile_strings",
    "tiles_of",
]

ROWS, COLUMNS = 16, 64
"""Of a tile."""
_CHUNK = 1 << 24  # codes that are repacked at once: some 300 MB of intermediate tensors


def tiles_of(rows: int, columns: int) -> tuple[int, int]:
    """Row tiles and column tiles of a weight."""
    return -(-rows // ROWS), 2 * -(-columns // (2 * COLUMNS))


def by_lanes(words: Tensor) -> Tensor:
    """Order the words of lanes for wide loads: int32 ``[..., 32, words]`` to ``[..., 32 · words]``."""
    count = words.shape[-1]
    if count % 4 == 0:
        by_fours: Tensor = words.unflatten(-1, (count // 4, 4)).transpose(-2, -3).flatten(-3)
        return by_fours
    if count == 2:
        return words.flatten(-2)
    return torch.cat([words[..., :2].flatten(-2), words[..., 2]], -1)


def tile_codes(kind: str, qweight: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Codes of the ``uniform`` or ``lut`` kind.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]``, row bit streams.

    Returns:
        int32 ``[row tiles, column tiles, 32 · bits]``.
    """
    row_tiles, tiles = tiles_of(qweight.shape[0], in_features)
    out = torch.empty(row_tiles, tiles, 32 * bits, dtype=torch.int32, device=qweight.device)
    step = max(1, _CHUNK // (ROWS * COLUMNS * tiles))
    for first in range(0, out.shape[0], step):
        codes = unpack_codes(qweight[first * ROWS : (first + step) * ROWS], bits, in_features)
        count = out[first : first + step].shape[0]
        full = torch.zeros(count * ROWS, tiles * COLUMNS, dtype=torch.int32, device=codes.device)
        full[: codes.shape[0], :in_features] = codes
        # row half, row, column tile, fragment, lane of a row, pair of columns, column
        pairs = full.view(count, 2, 8, tiles, 4, 4, 2, 2).permute(0, 3, 2, 5, 4, 6, 1, 7)
        pairs = pairs.reshape(count, tiles, 32, ROWS, 2)
        out[first : first + step] = by_lanes(_words(kind, pairs[..., 0], pairs[..., 1], bits))
    return out


def place(bits: int, pair: int) -> tuple[int, int] | None:
    """Word and bit of the first code of a pair of the ``uniform`` kind; None for one that is in three words."""
    columns, half = pair // 2, pair % 2
    if bits == 8:
        return columns, 16 * half
    if bits == 4:
        return columns // 2, 2 + 4 * (columns % 2) + 8 * half
    if bits == 2:
        return half, 2 + 2 * columns
    if columns < 6:
        return columns % 3, 1 + 3 * (columns // 3 + 3 * half)
    return None if pair == 15 else (pair - 12, 7)


def _words(kind: str, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Pairs int32 ``[..., 16]``, either code, to words ``[..., bits]``."""
    words = torch.zeros(*low.shape[:-1], bits, dtype=torch.int32, device=low.device)

    def put(value: Tensor, word: int, bit: int) -> None:
        bit %= 32
        words[..., word] |= value << bit
        if bit > 32 - bits:
            words[..., word] |= value >> (32 - bit)

    for pair in range(16):
        a, b = low[..., pair], high[..., pair]
        if kind == "lut":
            both, fields = a | b << bits, 32 // (2 * bits)
            if pair < fields * bits:
                words[..., pair // fields] |= both << (pair % fields * 2 * bits)
            else:
                for j in range(3):
                    words[..., j] |= (both >> (2 * j) & 3) << 30
            continue
        where = place(bits, pair)
        if where is None:
            for j in range(3):
                words[..., j] |= (a >> j & 1) << 16 | (b >> j & 1)
        else:
            put(a, *where)
            put(b, where[0], where[1] + (8 if bits == 8 else 16))
    return words


def group_pairs(values: Tensor) -> Tensor:
    """What belongs to rows and groups, in the order of the lanes.

    Args:
        values: ``[out_features, groups]``: scales, or zero points.

    Returns:
        ``[row tiles, groups, 8, 2]`` of the same type: rows ``r`` and ``r + 8`` side by side; zero where no row is.
    """
    rows, groups = values.shape
    full = torch.zeros(-(-rows // ROWS) * ROWS, groups, dtype=values.dtype, device=values.device)
    full[:rows] = values
    return full.view(-1, 2, 8, groups).permute(0, 3, 2, 1).contiguous()


def tile_strings(qweight: Tensor, *, bits: int) -> Tensor:
    """Strings of the ``trellis`` kind.

    Args:
        qweight: uint8 ``[row blocks, in_features, 16 · bits]``, strings of 128 rows; in_features a multiple of 8.
        bits: 2, 3 or 4.

    Returns:
        int32 ``[row blocks, in_features / 8, 32 · bits]``.
    """
    blocks, columns = qweight.shape[:2]
    # step, column half, lane of a row, row, 16 bits
    halves = qweight.contiguous().view(torch.int16).view(blocks, columns // 8, 2, 4, 8, bits)
    halves = halves.permute(0, 1, 4, 3, 2, 5).reshape(blocks, columns // 8, 32, 2, bits)
    if bits == 3:
        halves = torch.cat([halves[..., :2].flatten(-2), halves[..., 2]], -1)
    return by_lanes(halves.flatten(3).contiguous().view(torch.int32)).contiguous()


def residual_entries(indices: Tensor, values: Tensor, in_features: int) -> Tensor:
    """A column and its value side by side.

    Args:
        indices: uint16 or int32 ``[nnz]``.
        values: float16 ``[nnz]``.

    Returns:
        int32 ``[nnz]``, the value's bits in the upper half; where a column may exceed 16 bits, int64, 32 bits for each.
    """
    wide = in_features > 1 << 16
    bits = values.view(torch.int16).to(torch.int64) & 0xFFFF
    columns = indices.to(torch.int32).to(torch.int64)
    entries = columns | bits << (32 if wide else 16)
    return entries if wide else entries.to(torch.int32)
