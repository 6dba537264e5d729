"""Triton kernels on the layout of layout.py: weights expanded, and a product that fuses nothing but is portable.

They serve where the CUDA C++ kernels do not (no NVRTC, another vendor's GPU, strings of fewer than 128 rows, float32),
expand weights for large batches and look embeddings up. They run under Triton's interpreter.
"""

import triton
import triton.language as tl

__all__ = ["expand_rows", "expand_trellis", "product"]


@triton.jit
def _word(codes, tile, lane, word, mask, BITS: tl.constexpr):
    """Word number ``word`` of a lane in a tile, see :func:`layout.by_lanes`."""
    block = codes + tile * (32 * BITS)
    if BITS % 4 == 0:
        at = word // 4 * 128 + lane * 4 + word % 4
    elif BITS == 2:
        at = lane * 2 + word
    else:
        at = tl.where(word < 2, lane * 2 + word, 64 + lane)
    return tl.load(block + at, mask=mask, other=0)


@triton.jit
def _codes(codes, row, column, tiles, mask, LUT: tl.constexpr, BITS: tl.constexpr):
    """Codes of the elements ``row``, ``column`` (broadcast against each other): int32."""
    half, lane = row % 16 // 8, row % 8 * 4 + column % 16 // 4
    tile = (row // 16).to(tl.int64) * tiles + column // 64
    pair, side = column % 64 // 16 * 4 + column % 4 // 2 * 2 + half, column % 2
    if LUT:
        fields: tl.constexpr = 32 // (2 * BITS)
        word, bit = tl.minimum(pair // fields, BITS - 1), pair % fields * (2 * BITS) + side * BITS
    elif BITS == 8:
        word, bit = pair // 2, half * 16 + side * 8
    elif BITS == 4:
        word, bit = pair // 4, 2 + 4 * (pair // 2 % 2) + 8 * half + 16 * side
    elif BITS == 2:
        word, bit = half, 2 + pair // 2 * 2 + 16 * side
    else:
        word = tl.where(pair < 12, pair // 2 % 3, tl.minimum(pair - 12, 2))
        bit = tl.where(pair < 12, 1 + 3 * (pair // 6 + 3 * half), 7) + 16 * side
    # for any row and column: broadcast before the words are read
    word, bit = word + lane * 0, ((bit + lane * 0) % 32).to(tl.uint32)
    circle = _word(codes, tile, lane, word, mask, BITS).to(tl.uint32, bitcast=True)
    code = (circle >> bit | circle << ((32 - bit) % 32)).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)
    if BITS == 3:
        last = pair + lane * 0 == 15
        # what is left of three words
        first = _word(codes, tile, lane, lane * 0, mask & last, BITS)
        second = _word(codes, tile, lane, lane * 0 + 1, mask & last, BITS)
        third = _word(codes, tile, lane, lane * 0 + 2, mask & last, BITS)
        if LUT:
            six = (first >> 30 & 3) | (second >> 30 & 3) << 2 | (third >> 30 & 3) << 4
            rest = six >> (side * 3) & 7
        else:
            at = 16 - side * 16
            rest = (first >> at & 1) | (second >> at & 1) << 1 | (third >> at & 1) << 2
        code = tl.where(last, rest, code)
    return code


@triton.jit
def _dense(codes, tables, zeros, row, column, tiles, groups, group_size, mask, LUT: tl.constexpr, BITS: tl.constexpr):
    """float32 dense weights of the elements ``row``, ``column``."""
    code = _codes(codes, row, column, tiles, mask, LUT, BITS)
    if LUT:
        return tl.load(tables + (row.to(tl.int64) << BITS) + code, mask=mask, other=0.0).to(tl.float32)
    group = (row // 16).to(tl.int64) * groups + column // group_size
    at = group * 16 + row % 8 * 2 + row % 16 // 8
    scale = tl.load(tables + at, mask=mask, other=0.0).to(tl.float32)
    return (code - tl.load(zeros + at, mask=mask, other=0).to(tl.int32)).to(tl.float32) * scale


@triton.jit
def _entry(entries, at, mask, WIDE: tl.constexpr):
    """Columns (int64) and values (float32) of the residual."""
    entry = tl.load(entries + at, mask=mask, other=0)
    if WIDE:
        column, bits = entry & 0xFFFFFFFF, entry >> 32
    else:
        column, bits = (entry & 0xFFFF).to(tl.int64), entry >> 16
    return column, bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _add_residual(
    out, stride, place, row, inside, first, last, indptr, entries, WIDE: tl.constexpr, WIDTH: tl.constexpr
):
    """Add the residual of the rows ``row`` in the columns ``first`` … ``last - 1`` to the rows ``place`` of ``out``."""
    start = tl.load(indptr + row, mask=inside, other=0)
    stop = tl.load(indptr + row + 1, mask=inside, other=0)
    tl.debug_barrier()  # other threads wrote the dense weights
    for step in range(0, tl.max(stop - start), WIDTH):
        at = (start + step)[:, None] + tl.arange(0, WIDTH)[None, :]
        column, value = _entry(entries, at, at < stop[:, None], WIDE)
        mine = (at < stop[:, None]) & (column >= first) & (column < last)
        to = out + place.to(tl.int64)[:, None] * stride + column
        old = tl.load(to, mask=mine, other=0.0).to(tl.float32)
        tl.store(to, (old + value).to(out.dtype.element_ty), mask=mine)


@triton.jit
def expand_rows(
    codes,
    tables,
    zeros,
    indptr,
    entries,
    ids,
    out,
    stride,
    first_row,
    count,
    columns,
    tiles,
    groups,
    group_size,
    LUT: tl.constexpr,
    BITS: tl.constexpr,
    GATHER: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """``out[i] = dense + sparse`` of row ``ids[i]`` (GATHER) or ``first_row + i``.

    ROWS × (COLUMNS · STEPS) a program.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = place < count
    row = tl.load(ids + place, mask=inside, other=0).to(tl.int32) if GATHER else first_row + place
    begin = tl.program_id(1) * (COLUMNS * STEPS)
    for step in range(STEPS):
        column = begin + step * COLUMNS + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < columns)[None, :]
        weight = _dense(codes, tables, zeros, row[:, None], column[None, :], tiles, groups, group_size, mask, LUT, BITS)
        to = out + place.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(to, weight.to(out.dtype.element_ty), mask=mask)
    if RESIDUAL:
        _add_residual(out, stride, place, row, inside, begin, begin + COLUMNS * STEPS, indptr, entries, WIDE, 32)


@triton.jit
def product(
    x,
    codes,
    tables,
    zeros,
    indptr,
    entries,
    y,
    x_stride,
    batch,
    rows,
    columns,
    tiles,
    groups,
    group_size,
    LUT: tl.constexpr,
    BITS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
    BATCH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """``y[batch, rows] = x · (dense + sparse)ᵀ``: BATCH × ROWS a program, weights rounded to the type of ``x``.

    UPCAST for the interpreter, whose products of bfloat16 are not of their values.
    """
    m = tl.program_id(1) * BATCH + tl.arange(0, BATCH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x_row = x + m.to(tl.int64)[:, None] * x_stride
    sums = tl.zeros((BATCH, ROWS), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = (column < columns)[None, :]
        mask = (row < rows)[:, None] & inside
        weight = _dense(codes, tables, zeros, row[:, None], column[None, :], tiles, groups, group_size, mask, LUT, BITS)
        left = tl.load(x_row + column[None, :], mask=(m < batch)[:, None] & inside, other=0.0)
        right = tl.trans(weight.to(x.dtype.element_ty))
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        sums = tl.dot(left, right, sums)
    if RESIDUAL:
        start = tl.load(indptr + row, mask=row < rows, other=0)
        stop = tl.load(indptr + row + 1, mask=row < rows, other=0)
        for step in range(0, tl.max(stop - start)):
            there = start + step < stop
            column, value = _entry(entries, start + step, there, WIDE)
            left = tl.load(x_row + column[None, :], mask=(m < batch)[:, None] & there[None, :], other=0.0)
            sums += left.to(tl.float32) * value[None, :]
    to = y + m.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(to, sums.to(y.dtype.element_ty), mask=(m < batch)[:, None] & (row < rows)[None, :])


@triton.jit
def _sylvester(SIZE: tl.constexpr):
    """±1 as float16 ``[SIZE, SIZE]``, up to 128."""
    parity = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    parity = parity ^ (parity >> 4)
    parity = parity ^ (parity >> 2)
    parity = parity ^ (parity >> 1)
    return (1 - 2 * (parity & 1)).to(tl.float16)


@triton.jit
def _halfword(codes, block, column, q, columns, BITS: tl.constexpr, BLOCK_OUT: tl.constexpr, TILED: tl.constexpr):
    """16 bits of a string, from its bit ``16 q`` on: int32."""
    if TILED:
        # lane and word of layout.py, in halfwords
        lane, part, side = q // BITS * 4 + column % 4, q % BITS, column % 8 // 4
        if BITS == 3:
            at = tl.where(part < 2, lane * 4 + side * 2 + part, 128 + lane * 2 + side)
        else:
            at = lane * (2 * BITS) + side * BITS + part
        base = (block * (columns // 8) + column // 8) * (64 * BITS)
    else:
        at = q
        base = (block * (columns * BLOCK_OUT // 128) + column // (128 // BLOCK_OUT)) * (8 * BITS)
    return tl.load(codes + base.to(tl.int64) + at).to(tl.int32) & 0xFFFF


@triton.jit
def expand_trellis(
    codes,
    scales,
    signs_in,
    signs_out,
    indptr,
    entries,
    out,
    stride,
    first_block,
    columns,
    BITS: tl.constexpr,
    STATE_BITS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    TILED: tl.constexpr,
    EXACT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``out = dense + sparse`` of row blocks from ``first_block`` on; a BLOCK_OUT × BLOCK_IN block a program.

    ``codes`` are int16: halfwords. With EXACT the second transform takes two products, so that nothing is rounded
    before the scale; without, what the first one gives is rounded to 11 bits.
    """
    place, block_in = tl.program_id(0), tl.program_id(1)
    block = first_block + place
    r, c = tl.arange(0, BLOCK_OUT), tl.arange(0, BLOCK_IN)
    column = block_in * BLOCK_IN + c
    window = (column % (128 // BLOCK_OUT))[None, :] * BLOCK_OUT + r[:, None]
    bit = window * BITS
    low = _halfword(codes, block, column[None, :], bit // 16, columns, BITS, BLOCK_OUT, TILED)
    high = _halfword(codes, block, column[None, :], (bit // 16 + 1) % (8 * BITS), columns, BITS, BLOCK_OUT, TILED)
    words = (low | high << 16).to(tl.uint32, bitcast=True)
    state = (words >> (bit % 16).to(tl.uint32)) & ((1 << STATE_BITS) - 1)
    # 0x83DCD12D as the signed number of the same bits: a constant this large would make it 64 bits wide
    hashed = (state.to(tl.int32, bitcast=True) * -2082680531).to(tl.uint32, bitcast=True)
    value = (hashed & 0xFF) + ((hashed >> 8) & 0xFF) + ((hashed >> 16) & 0xFF) + (hashed >> 24)
    whole = (value.to(tl.int32) - 510).to(tl.float16)
    turned = tl.dot(_sylvester(BLOCK_OUT), whole)
    high_part = turned.to(tl.float16)
    transform = _sylvester(BLOCK_IN)
    weight = tl.dot(high_part, transform)
    if EXACT:
        weight = tl.dot((turned - high_part.to(tl.float32)).to(tl.float16), transform, weight)
    scale = tl.load(scales + block * (columns // BLOCK_IN) + block_in).to(tl.float32)
    row = block * BLOCK_OUT + r
    weight = weight * (tl.load(signs_out + row) * scale)[:, None] * tl.load(signs_in + column)[None, :]
    at = place * BLOCK_OUT + r
    to = out + at.to(tl.int64)[:, None] * stride + column[None, :]
    tl.store(to, weight.to(out.dtype.element_ty))
    if RESIDUAL:
        first = block_in * BLOCK_IN
        _add_residual(out, stride, at, row, r < BLOCK_OUT, first, first + BLOCK_IN, indptr, entries, WIDE, 16)
