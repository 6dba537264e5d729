"""The meaning of every op, in plain torch, on the canonical (disk) tensors.

Nothing here is fast. Every other kernel, on every device, is correct when it agrees with these functions.
All weights are float32 and exact: a code minus a zero point times a float16 scale fits a float32, and so
does a float16 table entry; only adding the sparse residual rounds, once.
"""

import torch
from torch import Tensor

from .bitstream import unpack_codes

__all__ = ["add_sparse_", "dequantize_lut", "dequantize_uniform", "linear", "row_index"]


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
    weight = codes.float() - zeros.float()[:, group]
    return weight.mul_(scales.float()[:, group])


def dequantize_lut(qweight: Tensor, lookup_table: Tensor, *, bits: int, in_features: int) -> Tensor:
    """Dense weight of the ``lut`` kind: entry ``code`` of the row's own table.

    Args:
        qweight: uint8 ``[out_features, ceil(in_features · bits / 8)]``, row bit streams of codes.
        lookup_table: float16 ``[out_features, 2**bits]``.

    Returns:
        float32 ``[out_features, in_features]``, exact.
    """
    codes = unpack_codes(qweight, bits, in_features)
    return torch.gather(lookup_table.float(), 1, codes.long())


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
