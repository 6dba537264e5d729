"""A layer against the weight that it was made of (SPEC.md, section 5)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.reference import row_index
from .layer import QuantizedLayer

__all__ = ["Comparison", "compare_layer"]


@dataclass(frozen=True)
class Comparison:
    """How far a layer is from its original.

    Attributes:
        broken: row and column of sparse elements at which the weight is not the original's up to one rounding of the
            stored value.
        mean_error: root mean square of ``W − w`` where there is no sparse element, as a share of that of ``w``.
        max_error: largest ``|W − w|`` there, in the same unit.
    """

    broken: list[tuple[int, int]]
    mean_error: float
    max_error: float


def compare_layer(layer: QuantizedLayer, original: Tensor) -> Comparison:
    """Compare with the 16-bit weight ``w``, ``[out_features, in_features]``; the layer has been checked."""
    original = original.float()
    dense = layer.dense_weight()
    error = dense - original
    broken: list[tuple[int, int]] = []
    if layer.sparse is not None:
        rows, columns = row_index(layer.sparse.indptr), layer.sparse.indices.long()
        missing, weight = -error[rows, columns], original[rows, columns]
        # half a unit in the last place: of the stored float16, of the smallest one, and of the float32 sum
        bound = missing.abs() * 2.0**-11 + 2.0**-25 + weight.abs() * 2.0**-23
        if layer.spec.kind == "trellis":
            bound += float(dense.abs().max()) * 2.0**-18  # the transforms' sums come in any order
        wrong = (layer.sparse.values.float() - missing).abs() > bound
        broken = list(zip(rows[wrong].tolist(), columns[wrong].tolist(), strict=True))
        error[rows, columns] = 0
    unit = max(float(original.square().mean().sqrt()), torch.finfo(torch.float32).tiny)
    elsewhere = max(error.numel() - layer.spec.nnz, 1)
    mean = float((error.square().sum() / elsewhere).sqrt())
    return Comparison(broken, mean / unit, float(error.abs().max()) / unit)
