"""The torch ops ``requant::{uniform,lut,trellis}_linear`` and ``requant::{uniform,lut}_embedding``.

They are opaque to torch.compile. An op takes the run-time tensors that :func:`vllm_requant.kernels.repack` made for
the device of ``x``. Which code runs for which batch size is decided inside the op, because vLLM traces a model once
with a symbolic batch size. On the CPU the native kernels run; elsewhere the tensors are the canonical ones and plain
torch runs, without a synchronisation with the host.
"""

import torch
from torch import Tensor
from torch.library import Library

from . import cpu, reference

__all__ = ["FUSED_BATCH", "add_sparse_", "dequantize"]

FUSED_BATCH = 16
"""Largest batch for which the CPU multiplies codes; above it torch multiplies dequantized panels."""

PANEL_BYTES = 4 << 20
"""Size of a dequantized panel: it should stay in the cache between being written and being multiplied."""

_SPARSE = "Tensor sparse_indptr, Tensor sparse_indices, Tensor sparse_values"
_SCHEMAS = {
    "uniform_linear": f"(Tensor x, Tensor qweight, Tensor scales, Tensor qzeros, {_SPARSE}, "
    "int bits, int group_size) -> Tensor",
    "lut_linear": f"(Tensor x, Tensor qweight, Tensor lookup_table, {_SPARSE}, int bits) -> Tensor",
    "trellis_linear": "(Tensor x, Tensor qweight, Tensor scales, Tensor signs_in, Tensor signs_out, "
    f"{_SPARSE}, int bits, int state_bits) -> Tensor",
    "uniform_embedding": f"(Tensor ids, Tensor qweight, Tensor scales, Tensor qzeros, {_SPARSE}, "
    "int bits, int group_size, int in_features, ScalarType dtype) -> Tensor",
    "lut_embedding": f"(Tensor ids, Tensor qweight, Tensor lookup_table, {_SPARSE}, "
    "int bits, int in_features, ScalarType dtype) -> Tensor",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- CPU ---------------------------------------------------------------------------------------------------


def _check_cpu(weights: cpu.Weights, dtype: torch.dtype, bits: int, group_size: int, in_features: int) -> None:
    """Refuse what would make a kernel read outside a tensor."""
    if dtype not in _FLOATS:
        raise TypeError(f"the kernels compute in float32, bfloat16 or float16, not {dtype}")
    rows = weights[1].shape[0]
    columns = 1 << bits if group_size == 0 else -(-in_features // group_size)
    expected = rows * cpu.row_bytes(bits, in_features) + cpu.CODE_SLACK
    if weights[0].numel() != expected or weights[1].shape[1] != columns:
        raise ValueError(f"the weight does not have {in_features} input features, {bits} bits, group {group_size}")
    for tensor in weights:
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError("run-time tensors must be contiguous")


def _linear_cpu(kind: str, x: Tensor, weights: cpu.Weights, bits: int, group_size: int) -> Tensor:
    in_features, out_features = x.shape[-1], weights[1].shape[0]
    _check_cpu(weights, x.dtype, bits, group_size, in_features)
    flat = x.reshape(-1, in_features).contiguous()
    if flat.shape[0] <= FUSED_BATCH:
        y = cpu.linear(kind, flat, weights, bits=bits, group_size=group_size)
    else:
        y = _linear_by_panels(kind, flat, weights, bits, group_size)
    return y.view(*x.shape[:-1], out_features)


def _linear_by_panels(kind: str, x: Tensor, weights: cpu.Weights, bits: int, group_size: int) -> Tensor:
    # weights may leave float16's range (15 steps of a large scale), bfloat16's they cannot
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    wide = x.to(dtype)
    out_features, in_features = weights[1].shape[0], x.shape[1]
    panel = max(64, PANEL_BYTES // (in_features * dtype.itemsize) // 64 * 64)
    buffer = torch.empty(min(panel, out_features), in_features, dtype=dtype)
    y = torch.empty(x.shape[0], out_features, dtype=dtype)
    for first in range(0, out_features, panel):
        rows = buffer[: out_features - first]
        cpu.dequantize(kind, weights, rows, bits=bits, group_size=group_size, first=first)
        torch.mm(wide, rows.t(), out=y[:, first : first + panel])
    return y.to(x.dtype)


def _trellis_linear_cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    state_bits: int,
) -> Tensor:
    sparse = (sparse_indptr, sparse_indices, sparse_values)
    weights = cpu.TrellisWeights(qweight, scales, signs_in, signs_out, *sparse, bits, state_bits)
    _check_trellis(weights, x)
    flat = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = (
        cpu.trellis_linear(flat, weights)
        if flat.shape[0] <= FUSED_BATCH
        else _trellis_by_panels(flat, weights, x.dtype)
    )
    return y.to(x.dtype).view(*x.shape[:-1], weights.out_features)


def _check_trellis(weights: cpu.TrellisWeights, x: Tensor) -> None:
    """Refuse what would make a kernel read outside a tensor."""
    if x.dtype not in _FLOATS:
        raise TypeError(f"the kernels compute in float32, bfloat16 or float16, not {x.dtype}")
    blocks, tiles, size = weights.qweight.shape
    if x.shape[-1] != weights.in_features or size != 16 * weights.bits or blocks != weights.scales.shape[0]:
        raise ValueError(f"the weight does not have {x.shape[-1]} input features and {weights.bits} bits")
    if tiles * reference.TILE != weights.in_features * weights.block_out:
        raise ValueError("the tiles of the weight do not cover it")


def _trellis_by_panels(x: Tensor, weights: cpu.TrellisWeights, dtype: torch.dtype) -> Tensor:
    narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    rotated = cpu.trellis_rotate(x.clone(), weights.signs_in, weights.block_in).to(narrow)
    rows, columns = weights.out_features, weights.in_features
    panel = max(128, PANEL_BYTES // (columns * 4) // 128 * 128)
    buffer = torch.empty(min(panel, rows), columns)
    y = torch.empty(x.shape[0], rows)
    for first in range(0, rows, panel):
        part = cpu.trellis_dequantize(weights, buffer[: rows - first], first)
        y[:, first : first + panel] = rotated @ part.to(narrow).t()
    y = cpu.trellis_rotate(y, weights.signs_out, weights.block_out, signs_last=True)
    if weights.values.numel():
        cpu.add_sparse_product(y, x, weights)
    return y


def _embedding_cpu(
    kind: str,
    ids: Tensor,
    weights: cpu.Weights,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_cpu(weights, dtype, bits, group_size, in_features)
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(flat.numel(), in_features, dtype=dtype)
    cpu.dequantize(kind, weights, out, bits=bits, group_size=group_size, ids=flat)
    return out.view(*ids.shape, in_features)


def _uniform_linear_cpu(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    weights = (qweight, scales, qzeros, sparse_indptr, sparse_indices, sparse_values)
    return _linear_cpu("uniform", x, weights, bits, group_size)


def _lut_linear_cpu(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
) -> Tensor:
    weights = (qweight, lookup_table, None, sparse_indptr, sparse_indices, sparse_values)
    return _linear_cpu("lut", x, weights, bits, 0)


def _uniform_embedding_cpu(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    weights = (qweight, scales, qzeros, sparse_indptr, sparse_indices, sparse_values)
    return _embedding_cpu("uniform", ids, weights, bits, group_size, in_features, dtype)


def _lut_embedding_cpu(
    ids: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    weights = (qweight, lookup_table, None, sparse_indptr, sparse_indices, sparse_values)
    return _embedding_cpu("lut", ids, weights, bits, 0, in_features, dtype)


# ---- any other device: canonical tensors, plain torch ------------------------------------------------------


def add_sparse_(weight: Tensor, indptr: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """:func:`reference.add_sparse_` without a synchronisation, on indices as :func:`repack` stores them.

    Args:
        weight: contiguous float32 ``[rows, columns]``, changed in place and returned.
        indptr: int32 ``[rows + 1]``; all three are empty without a sparse part.
        indices: int16 (the bits of a uint16) or int32 ``[nnz]``.
        values: float16 ``[nnz]``.
    """
    nnz = values.numel()
    if nnz:
        columns = indices.to(torch.int64)
        if indices.dtype == torch.int16:
            columns = columns & 0xFFFF
        element = torch.arange(nnz, device=values.device, dtype=torch.int32)
        row = torch.searchsorted(indptr[1:].contiguous(), element, right=True)
        weight.view(-1).scatter_add_(0, row * weight.shape[1] + columns, values.float())
    return weight


def dequantize(
    kind: str,
    dense: tuple[Tensor, ...],
    sparse: tuple[Tensor, Tensor, Tensor],
    *,
    bits: int,
    group_size: int,
    in_features: int,
) -> Tensor:
    """float32 ``[out_features, in_features]`` of tensors that were repacked for another device than the CPU."""
    if kind == "uniform":
        weight = reference.dequantize_uniform(*dense, bits=bits, group_size=group_size, in_features=in_features)
    else:
        weight = reference.dequantize_lut(*dense, bits=bits, in_features=in_features)
    return add_sparse_(weight, *sparse)


def _uniform_linear_torch(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    group_size: int,
) -> Tensor:
    dense, sparse = (qweight, scales, qzeros), (sparse_indptr, sparse_indices, sparse_values)
    weight = dequantize("uniform", dense, sparse, bits=bits, group_size=group_size, in_features=x.shape[-1])
    return reference.linear(x, weight)


def _lut_linear_torch(
    x: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
) -> Tensor:
    dense, sparse = (qweight, lookup_table), (sparse_indptr, sparse_indices, sparse_values)
    weight = dequantize("lut", dense, sparse, bits=bits, group_size=0, in_features=x.shape[-1])
    return reference.linear(x, weight)


def _trellis_linear_torch(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    signs_in: Tensor,
    signs_out: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    state_bits: int,
) -> Tensor:
    in_features, out_features = signs_in.numel(), signs_out.numel()
    rotated = reference.rotated_trellis(qweight, scales, bits=bits, state_bits=state_bits, in_features=in_features)
    # signs carry the factor of the transform, so that the orthonormal one needs it taken out
    block_in, block_out = in_features // scales.shape[1], out_features // scales.shape[0]
    turned = reference.hadamard_blocks(x.float() * signs_in * block_in**0.5, block_in)
    y: Tensor = reference.hadamard_blocks(turned @ rotated.t(), block_out) * signs_out * block_out**0.5
    if sparse_values.numel():
        residual = torch.zeros(out_features, in_features, device=x.device)
        y = y + x.float() @ add_sparse_(residual, sparse_indptr, sparse_indices, sparse_values).t()
    return y.to(x.dtype)


def _uniform_embedding_torch(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor,
    qzeros: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    group_size: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    dense, sparse = (qweight, scales, qzeros), (sparse_indptr, sparse_indices, sparse_values)
    weight = dequantize("uniform", dense, sparse, bits=bits, group_size=group_size, in_features=in_features)
    return weight[ids].to(dtype)


def _lut_embedding_torch(
    ids: Tensor,
    qweight: Tensor,
    lookup_table: Tensor,
    sparse_indptr: Tensor,
    sparse_indices: Tensor,
    sparse_values: Tensor,
    bits: int,
    in_features: int,
    dtype: torch.dtype,
) -> Tensor:
    dense, sparse = (qweight, lookup_table), (sparse_indptr, sparse_indices, sparse_values)
    weight = dequantize("lut", dense, sparse, bits=bits, group_size=0, in_features=in_features)
    return weight[ids].to(dtype)


# ---- shapes for torch.compile ------------------------------------------------------------------------------


def _linear_fake(x: Tensor, qweight: Tensor, scales: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], scales.shape[0])


def _trellis_linear_fake(
    x: Tensor, qweight: Tensor, scales: Tensor, signs_in: Tensor, signs_out: Tensor, *_: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], signs_out.shape[0])


def _embedding_fake(ids: Tensor, *rest: object) -> Tensor:
    *_, in_features, dtype = rest
    assert isinstance(in_features, int | torch.SymInt) and isinstance(dtype, torch.dtype)
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


# ---- registration ------------------------------------------------------------------------------------------

if not hasattr(torch.ops.requant, "uniform_linear"):
    _library = Library("requant", "FRAGMENT")
    for _name, _on_cpu, _elsewhere, _fake in (
        ("uniform_linear", _uniform_linear_cpu, _uniform_linear_torch, _linear_fake),
        ("lut_linear", _lut_linear_cpu, _lut_linear_torch, _linear_fake),
        ("trellis_linear", _trellis_linear_cpu, _trellis_linear_torch, _trellis_linear_fake),
        ("uniform_embedding", _uniform_embedding_cpu, _uniform_embedding_torch, _embedding_fake),
        ("lut_embedding", _lut_embedding_cpu, _lut_embedding_torch, _embedding_fake),
    ):
        _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name, _on_cpu, "CPU")
        _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")
        torch.library.register_fake(f"requant::{_name}", _fake, lib=_library)
    # The registrations live as long as the object. A second import, also of this folder under the name
    # `kernels`, which the root of the checkout offers, finds the ops and must find them alive.
    setattr(torch.ops.requant, "registrations", _library)  # noqa: B010 (a namespace made at run time)
