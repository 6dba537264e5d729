"""Stacking quantized layers by output row: what vLLM's fused layers and padded vocabularies need."""

from collections.abc import Sequence

import torch

from ..format import LayerSpec, LutSpec, QuantizedLayer, UniformSpec
from ..format.schema import SPARSE_TENSORS
from ..kernels.bitstream import pack_codes, row_bytes

__all__ = ["concat_rows", "group_size", "same_format", "synthetic_layer", "zero_layer"]


def group_size(spec: LayerSpec) -> int:
    """The group size of a kind that has groups, else 0."""
    return spec.group_size if isinstance(spec, UniformSpec) else 0


def same_format(a: LayerSpec, b: LayerSpec) -> bool:
    """Whether two layers can be stacked: same kind, bits, group size and input features."""
    return (a.kind, a.bits, group_size(a), a.in_features) == (b.kind, b.bits, group_size(b), b.in_features)


def concat_rows(layers: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """Stack layers of one format: output features in order, sparse parts joined.

    Args:
        layers: at least one; all pass :func:`same_format` with the first.

    Returns:
        A layer with the sum of ``out_features`` and of ``nnz``; the only layer itself when there is one.

    Raises:
        ValueError: the formats differ, or the sum of ``nnz`` leaves int32.
    """
    first = layers[0]
    if len(layers) == 1:
        return first
    if not all(same_format(first.spec, layer.spec) for layer in layers):
        raise ValueError("only layers of one kind, bits, group size and input width can be stacked")
    nnz = sum(layer.spec.nnz for layer in layers)
    if nnz > torch.iinfo(torch.int32).max:
        raise ValueError(f"{nnz} sparse elements in one stacked layer exceed int32 row pointers")
    spec = first.spec.model_copy(update={"out_features": sum(layer.spec.out_features for layer in layers), "nnz": nnz})
    tensors = {name: torch.cat([layer.tensors[name] for layer in layers]) for name in spec.dense_tensors()}
    if nnz:
        indptr = [torch.zeros(1, dtype=torch.int32)]
        for layer in layers:
            base = indptr[-1][-1]
            rows = layer.spec.out_features
            indptr.append(layer.sparse.indptr[1:] + base if layer.sparse else base.expand(rows))
        parts = [layer.sparse for layer in layers if layer.sparse]
        joined = (
            torch.cat(indptr),
            torch.cat([p.indices for p in parts]),
            torch.cat([p.values for p in parts]),
        )
        tensors |= dict(zip(SPARSE_TENSORS, joined, strict=True))
    return QuantizedLayer(spec, tensors)


def zero_layer(spec: LayerSpec, rows: int) -> QuantizedLayer:
    """``rows`` output features of the same format whose weights are exactly zero."""
    spec = spec.model_copy(update={"out_features": rows, "nnz": 0})
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in spec.tensors().items()}
    if isinstance(spec, UniformSpec):
        # code 0 minus zero point 0 is zero under any scale, but a scale must be positive
        tensors["scales"].fill_(1)
    return QuantizedLayer(spec, tensors)


def synthetic_layer(spec: LayerSpec) -> QuantizedLayer:
    """A valid layer with arbitrary small weights and exactly ``spec.nnz`` sparse elements, evenly spread.

    It has the memory and the work of the real one, for ``--load-format dummy`` and for dry runs.
    """
    rows, columns = spec.out_features, spec.in_features
    # one row of codes for all: random numbers for a whole vocabulary would take longer than loading it
    codes = torch.arange(columns).remainder(1 << spec.bits)[None]
    qweight = pack_codes(codes, spec.bits).expand(rows, row_bytes(columns, spec.bits)).contiguous()
    if isinstance(spec, LutSpec):
        entries = torch.linspace(-1e-3, 1e-3, 1 << spec.bits, dtype=torch.float16)
        tensors = {"qweight": qweight, "lookup_table": entries.expand(rows, -1).contiguous()}
    else:
        zeros = pack_codes(torch.full((1, spec.groups), 1 << (spec.bits - 1)), spec.bits)
        tensors = {
            "qweight": qweight,
            "scales": torch.full((rows, spec.groups), 1e-4, dtype=torch.float16),
            "qzeros": zeros.expand(rows, -1).contiguous(),
        }
    if spec.nnz:
        tensors |= dict(zip(SPARSE_TENSORS, _even_csr(rows, columns, spec.nnz, spec.index_dtype), strict=True))
    return QuantizedLayer(spec, tensors)


def _even_csr(
    rows: int, columns: int, nnz: int, index_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # rows differ by at most one element, and nnz ≤ rows · columns, so a row never needs more than its columns
    indptr = torch.arange(rows + 1).mul_(nnz).div_(rows, rounding_mode="floor")
    counts = indptr.diff()
    position = torch.arange(nnz) - torch.repeat_interleave(indptr[:-1], counts)
    indices = position.mul_(columns).div_(torch.repeat_interleave(counts, counts), rounding_mode="floor")
    return indptr.to(torch.int32), indices.to(index_dtype), torch.full((nnz,), 1e-3, dtype=torch.float16)
