"""Stacking quantized layers by output row: what vLLM's fused layers and padded vocabularies need."""

from collections.abc import Sequence

import torch

from .kinds import KINDS
from .layer import QuantizedLayer
from .schema import SPARSE_TENSORS, LayerSpec

__all__ = ["can_stack", "concat_rows", "same_format", "synthetic_layer", "zero_layer"]


def same_format(a: LayerSpec, b: LayerSpec) -> bool:
    """Whether two layers are of one format: equal but for output features and sparse elements."""
    blank = {"out_features": 1, "nnz": 0}
    return a.model_copy(update=blank) == b.model_copy(update=blank)


def can_stack(a: QuantizedLayer, b: QuantizedLayer) -> bool:
    """Whether two layers can be stacked: of one format, and equal in what stacked layers share."""
    shared = KINDS[a.spec.kind].shared
    return same_format(a.spec, b.spec) and all(torch.equal(a.tensors[name], b.tensors[name]) for name in shared)


def concat_rows(layers: Sequence[QuantizedLayer]) -> QuantizedLayer:
    """Stack layers of one format: output features in order, sparse parts joined.

    Args:
        layers: at least one; all pass :func:`can_stack` with the first.

    Returns:
        A layer with the sum of ``out_features`` and of ``nnz``; the only layer itself when there is one.

    Raises:
        ValueError: the formats differ, or the sum of ``nnz`` leaves int32.
    """
    first = layers[0]
    if len(layers) == 1:
        return first
    if not all(can_stack(first, layer) for layer in layers):
        raise ValueError("only layers of one kind, bits, group size, input width and input signs can be stacked")
    nnz = sum(layer.spec.nnz for layer in layers)
    if nnz > torch.iinfo(torch.int32).max:
        raise ValueError(f"{nnz} sparse elements in one stacked layer exceed int32 row pointers")
    spec = first.spec.model_copy(update={"out_features": sum(layer.spec.out_features for layer in layers), "nnz": nnz})
    shared = KINDS[spec.kind].shared
    tensors = {
        name: first.tensors[name] if name in shared else torch.cat([layer.tensors[name] for layer in layers])
        for name in spec.dense_tensors()
    }
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
    return QuantizedLayer(spec, KINDS[spec.kind].zeros(spec))


def synthetic_layer(spec: LayerSpec) -> QuantizedLayer:
    """A valid layer whose dense part is zero, with exactly ``spec.nnz`` small sparse elements, evenly spread.

    It has the memory and the work of the real one, for ``--load-format dummy`` and for dry runs.
    """
    tensors = dict(KINDS[spec.kind].zeros(spec))
    if spec.nnz:
        csr = _even_csr(spec.out_features, spec.in_features, spec.nnz, spec.index_dtype)
        tensors |= dict(zip(SPARSE_TENSORS, csr, strict=True))
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
