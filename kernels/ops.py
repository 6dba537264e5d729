"""The torch ops ``requant::{uniform,lut,trellis}_linear``, ``requant::{uniform,lut}_embedding``, and on the CPU
``requant::packed_linear`` and ``requant::packed_embedding``.

They are opaque to torch.compile. An op takes the run-time tensors that :func:`vllm_requant.kernels.repack` made for
the device of ``x``: on the CPU one block of memory for any kind, elsewhere the canonical tensors, on which plain torch
computes without a synchronisation with the host. Which code runs for which batch size is decided inside the op, because
vLLM traces a model once with a symbolic batch size.

``packed_linear`` is native (cpu/torch_ops.cpp). What it does not do itself, large batches and strided inputs, it hands
to ``packed_linear_any``.
"""

import threading

import torch
from torch import Tensor
from torch.library import Library

from . import cpu, reference

__all__ = ["add_sparse_", "dequantize", "planes_for"]

PANEL_BYTES = 4 << 20
"""Size of a dequantized panel: it should stay in the cache between being written and being multiplied."""
ROW_STEP, ROW_BLOCK = 16, 512
"""Rows of bfloat16 products are a multiple of the one, at most the other: oneDNN generates code for every number
of rows that it meets, and keeps it: prompts of all lengths would take the better part of a gigabyte."""

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
_PACKED_SCHEMAS = {
    "packed_linear": "(Tensor x, Tensor packed, int out_features, int planes) -> Tensor",
    "packed_linear_any": "(Tensor x, Tensor packed, int out_features, int planes) -> Tensor",
    "packed_embedding": "(Tensor ids, Tensor packed, int in_features, ScalarType dtype) -> Tensor",
}
_workspace = threading.local()
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- CPU ---------------------------------------------------------------------------------------------------


def planes_for(dtype: torch.dtype, activation_bits: int = 16) -> int:
    """Bytes of an activation in integer products: those bits for 16-bit types; 24 hold a float32 as its sums do.

    Raises:
        TypeError: the kernels do not compute in that type.
        ValueError: neither 8 nor 16 bits.
    """
    if dtype not in _FLOATS:
        raise TypeError(f"the kernels compute in float32, bfloat16 or float16, not {dtype}")
    if activation_bits not in (8, 16):
        raise ValueError(f"activation_bits is {activation_bits}, must be 8 or 16")
    return 3 if dtype == torch.float32 else activation_bits // 8


def _packed_linear_any(x: Tensor, packed: Tensor, out_features: int, planes: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] <= cpu.fused_batch(packed, x.dtype):
        y = cpu.linear(flat, packed, out_features=out_features, planes=planes)
    elif cpu.is_trellis(packed):
        y = _trellis_by_panels(flat, packed, out_features)
    else:
        y = _linear_by_panels(flat, packed, out_features)
    return y.view(*x.shape[:-1], out_features)


def _panel_dtype(x: Tensor) -> torch.dtype:
    """In which the product with panels is computed. Weights may leave float16's range, bfloat16's they cannot."""
    return torch.bfloat16 if x.dtype == torch.bfloat16 and cpu.multiplies_bfloat16() else torch.float32


def _panel(elements: int, dtype: torch.dtype) -> Tensor:
    """Memory for a panel, the thread's own, kept for the next one: fresh memory costs a page fault every 4 KiB."""
    nbytes = elements * dtype.itemsize
    memory: Tensor | None = getattr(_workspace, "memory", None)
    if memory is None or memory.numel() < nbytes:
        memory = _workspace.memory = torch.empty(nbytes, dtype=torch.uint8)
    return memory[:nbytes].view(dtype)


def _linear_by_panels(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    dtype, in_features = _panel_dtype(x), x.shape[1]
    wide = _padded(x, dtype)
    panel = max(64, PANEL_BYTES // (in_features * dtype.itemsize) // 64 * 64)
    buffer = _panel(min(panel, out_features) * in_features, dtype).view(-1, in_features)
    y = torch.empty(len(wide), out_features, dtype=dtype)
    for first in range(0, out_features, panel):
        rows = cpu.dequantize(packed, buffer[: out_features - first], first=first)
        _multiply(wide, rows.t(), y[:, first : first + panel])
    return y[: len(x)].to(x.dtype)


def _trellis_by_panels(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    dtype = _panel_dtype(x)
    wide, columns = x.float(), x.shape[1]
    rotated = _padded(cpu.trellis_rotate(wide.clone(), packed), dtype)
    panel = max(128, PANEL_BYTES // (columns * dtype.itemsize) // 128 * 128)
    buffer = _panel(columns * min(panel, out_features), dtype)
    y = torch.empty(len(rotated), out_features, dtype=dtype)
    for first in range(0, out_features, panel):
        count = min(panel, out_features - first)
        part = cpu.trellis_dequantize(packed, buffer[: columns * count].view(columns, count), first)
        _multiply(rotated, part, y[:, first : first + count])
    return cpu.trellis_rotate_back(y[: len(x)].float(), wide, packed).to(x.dtype)


def _padded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in the type of panels, with rows of zeros up to a multiple of :data:`ROW_STEP` if that is bfloat16."""
    count = -(-len(x) // ROW_STEP) * ROW_STEP if dtype == torch.bfloat16 else len(x)
    if count == len(x):
        return x.to(dtype)
    wide = torch.empty(count, x.shape[1], dtype=dtype)
    wide[: len(x)] = x
    wide[len(x) :] = 0
    return wide


def _multiply(x: Tensor, panel: Tensor, y: Tensor) -> None:
    """``y = x · panel``, at most :data:`ROW_BLOCK` rows at a time."""
    for first in range(0, len(x), ROW_BLOCK):
        torch.mm(x[first : first + ROW_BLOCK], panel, out=y[first : first + ROW_BLOCK])


def _packed_embedding(ids: Tensor, packed: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    flat = ids.reshape(-1).to(torch.int64).contiguous()
    out = torch.empty(flat.numel(), in_features, dtype=dtype)
    return cpu.dequantize(packed, out, ids=flat).view(*ids.shape, in_features)


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


def _packed_linear_fake(x: Tensor, packed: Tensor, out_features: int, planes: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


# ---- registration ------------------------------------------------------------------------------------------

if not hasattr(torch.ops.requant, "uniform_linear"):
    _library = Library("requant", "FRAGMENT")
    for _name, _elsewhere, _fake in (
        ("uniform_linear", _uniform_linear_torch, _linear_fake),
        ("lut_linear", _lut_linear_torch, _linear_fake),
        ("trellis_linear", _trellis_linear_torch, _trellis_linear_fake),
        ("uniform_embedding", _uniform_embedding_torch, _embedding_fake),
        ("lut_embedding", _lut_embedding_torch, _embedding_fake),
    ):
        _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(_name, _elsewhere, "CompositeExplicitAutograd")
        torch.library.register_fake(f"requant::{_name}", _fake, lib=_library)
    for _name, _schema in _PACKED_SCHEMAS.items():
        _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake("requant::packed_linear", _packed_linear_fake, lib=_library)
    torch.library.register_fake("requant::packed_linear_any", _packed_linear_fake, lib=_library)
    torch.library.register_fake("requant::packed_embedding", _embedding_fake, lib=_library)
    _library.impl("packed_linear_any", _packed_linear_any, "CPU")
    _library.impl("packed_embedding", _packed_embedding, "CPU")
    # The registrations live as long as the object. A second import, also of this folder under the name
    # `kernels`, which the root of the checkout offers, finds the ops and must find them alive.
    setattr(torch.ops.requant, "registrations", _library)  # noqa: B010 (a namespace made at run time)
