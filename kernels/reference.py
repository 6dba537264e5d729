"""The meaning of every op, in plain torch, on the canonical (disk) tensors.

Nothing here is fast. Every other kernel, on every device, is correct when it agrees with these functions.
Weights are float32. Those of the ``uniform`` and ``lut`` kinds are exact: a code minus a zero point times a float16
scale fits a float32, and so does a float16 table entry; adding the sparse residual rounds, once. Those of the
``trellis`` kind are exact up to the sums of two Hadamard transforms.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .bitstream import unpack_codes

__all__ = [
    "TILE",
    "add_sparse_",
    "dequantize_lut",
    "dequantize_trellis",
    "dequantize_uniform",
    "hadamard_blocks",
    "linear",
    "rotated_trellis",
    "row_index",
    "signs",
    "trellis_code",
    "trellis_states",
]

TILE = 128
"""Weights in one circular string of the ``trellis`` kind."""
_ELEMENTS_AT_ONCE = 1 << 20
_LEVELS_A_PASS = 6  # matrices of at most 64 × 64: wider ones do more work than they save passes


def dequantize_uniform(
    qweight: Tensor, scales: Tensor, qzeros: Tensor, *, bits: int, group_size: int, in_features: int
) -> Tensor:
    """Dense weight of the ``uniform`` kind: ``(code − zero_point) · scale``, group by group.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]``, row bit streams of codes.
        scales: float16 ``[out_features, groups]``, ``groups = ceil(in_features / group_size)``.
        qzeros: uint8 ``[out_features, ceil(groups · bits / 8)]``, row bit streams of zero points.

    Returns:
        float32 ``[out_features, in_features]``, exact.
    """
    groups = scales.shape[1]
    codes = unpack_codes(qweight, bits, in_features)
    zeros = unpack_codes(qzeros, bits, groups)
    group = torch.arange(in_features, device=codes.device) // group_size
    weight = codes.float()
    for rows in _pieces(len(codes), in_features):
        weight[rows].sub_(zeros[rows].float()[:, group]).mul_(scales[rows].float()[:, group])
    return weight


def dequantize_lut(qweight: Tensor, lookup_table: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Dense weight of the ``lut`` kind: entry ``code`` of the row's own table.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]``, row bit streams of codes.
        lookup_table: float16 ``[out_features, 2**bits]``.

    Returns:
        float32 ``[out_features, in_features]``, exact.
    """
    codes, table = unpack_codes(qweight, bits, in_features), lookup_table.float()
    weight = torch.empty(codes.shape, device=codes.device)
    for rows in _pieces(len(codes), in_features):
        weight[rows] = torch.gather(table[rows], 1, codes[rows].long())
    return weight


def _pieces(rows: int, width: int) -> Iterator[slice]:
    """Rows of a matrix, so few at a time that what is made of them takes little memory beside it."""
    at_once = max(1, _ELEMENTS_AT_ONCE // max(width, 1))
    for first in range(0, rows, at_once):
        yield slice(first, first + at_once)


def trellis_code(state_bits: int) -> Tensor:
    """Value of every trellis state: the sum of the four bytes of ``0x83DCD12D · state mod 2³²``, less its mean 510.

    Returns:
        float32 ``[2**state_bits]``, integers in [−510, 510].
    """
    product = torch.arange(1 << state_bits, dtype=torch.int64).mul_(0x83DCD12D)
    shifts = torch.tensor([0, 8, 16, 24])
    value: Tensor = ((product[:, None] >> shifts) & 0xFF).sum(1).float() - 510
    return value


def trellis_states(qweight: Tensor, *, bits: int, state_bits: int) -> Tensor:
    """The window of every weight in circular strings of ``TILE · bits`` bits.

    Args:
        qweight: uint8 ``[..., TILE · bits / 8]``.

    Returns:
        int64 ``[..., TILE]``; state ``v`` holds bits ``v·bits … v·bits + state_bits − 1``, least significant first.
    """
    size = qweight.shape[-1]
    wrapped = torch.cat([qweight, qweight[..., :4]], dim=-1).to(torch.int64)
    words = sum(wrapped[..., i : i + size] << (8 * i) for i in range(4))  # the 32 bits from every byte on
    assert isinstance(words, Tensor)
    first = torch.arange(TILE, device=qweight.device) * bits
    return (words[..., first // 8] >> (first % 8)) & ((1 << state_bits) - 1)


def hadamard_blocks(x: Tensor, block: int) -> Tensor:
    """Orthonormal Sylvester–Hadamard transform of every run of ``block`` elements in the last dimension."""
    levels = block.bit_length() - 1
    # a product with a small matrix passes over x once, butterflies once for every factor of two
    passes = -(-levels // _LEVELS_A_PASS)
    y, width = x, 1
    for index in range(passes):
        matrix = _sylvester((levels + passes - 1 - index) // passes, x)
        y = y.reshape(-1, len(matrix)) @ matrix if width == 1 else matrix @ y.reshape(-1, len(matrix), width)
        width *= len(matrix)
    return y.reshape(x.shape)


def _sylvester(levels: int, like: Tensor) -> Tensor:
    """The orthonormal matrix ``[2**levels, 2**levels]``, with the type and device of another tensor."""
    matrix = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    for _ in range(levels):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(1 << levels)


def signs(packed: Tensor, count: int) -> Tensor:
    """±1 as float32 ``[count]``; a set bit is −1."""
    return 1 - 2 * unpack_codes(packed[None], 1, count)[0].float()


def rotated_trellis(qweight: Tensor, scales: Tensor, *, bits: int, state_bits: int, in_features: int) -> Tensor:
    """Weight of the ``trellis`` kind in its rotated coordinates: float32 ``[out_features, in_features]``, exact."""
    rows, tiles = qweight.shape[:2]
    columns = in_features // tiles
    code = trellis_code(state_bits).to(qweight.device)
    value = torch.empty(rows, tiles, TILE, device=qweight.device)
    for part in _pieces(rows, tiles * TILE):
        value[part] = code[trellis_states(qweight[part], bits=bits, state_bits=state_bits)]
    # within a tile rows run fastest
    weight = value.view(rows, tiles, columns, TILE // columns).permute(0, 3, 1, 2).reshape(-1, in_features)
    block_out, block_in = weight.shape[0] // scales.shape[0], in_features // scales.shape[1]
    return weight * scales.float().repeat_interleave(block_out, 0).repeat_interleave(block_in, 1)


def dequantize_trellis(
    qweight: Tensor,
    scales: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    *,
    bits: int,
    state_bits: int,
    in_features: int,
) -> Tensor:
    """Dense weight of the ``trellis`` kind: ``S_out · H_out · A · H_in · S_in`` with A from the trellis.

    Args:
        qweight: uint8 ``[row blocks, tiles, TILE · bits / 8]``; a tile has as many rows as a row block.
        scales: float16 ``[row blocks, column blocks]``.
        signs_in, signs_out: uint8, a bit for every input and output feature; a set bit is −1.

    Returns:
        float32 ``[out_features, in_features]``.
    """
    weight = rotated_trellis(qweight, scales, bits=bits, state_bits=state_bits, in_features=in_features)
    rows = weight.shape[0]
    weight = hadamard_blocks(weight, in_features // scales.shape[1]) * signs(signs_in, in_features)
    weight = hadamard_blocks(weight.t().contiguous(), rows // scales.shape[0]) * signs(signs_out, rows)
    return weight.t().contiguous()


def row_index(indptr: Tensor) -> Tensor:
    """Row of every element of a CSR matrix: int64 ``[nnz]`` from int32 ``[rows + 1]`` row pointers."""
    counts = indptr[1:].long() - indptr[:-1].long()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=indptr.device), counts)


def add_sparse_(weight: Tensor, indptr: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """Add the sparse residual to ``weight`` in place and return it.

    Args:
        weight: float32 ``[out_features, in_features]``.
        indptr: int32 ``[out_features + 1]``.
        indices: uint16 or int32 ``[nnz]``, strictly increasing within a row.
        values: float16 ``[nnz]``.
    """
    if values.numel():
        # positions are unique, so no element is added to twice and the order cannot matter
        weight[row_index(indptr), indices.to(torch.int64)] += values.float()
    return weight


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x · weightᵀ`` accumulated in float32 and rounded to ``x.dtype``.

    Args:
        x: ``[..., in_features]``, float32, bfloat16 or float16.
        weight: float32 ``[out_features, in_features]``.
    """
    return torch.nn.functional.linear(x.float(), weight).to(x.dtype)
