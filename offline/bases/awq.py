"""AWQ: activation-aware channel scales, then clipped group-wise ranges (arXiv 2306.00978)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ..folding import Fold
from ..statistics import InputStatistics
from .base import DenseLayer, LayerData, Need
from .uniform import UniformBase, block_loss, grouped, minmax_grid, nearest, rounded, searched_grid, to_layer

__all__ = ["FOLD_ROWS", "Awq"]

_RATIOS = 20
FOLD_ROWS = 512  # of a weight, evenly spaced, judge a candidate


class Awq(UniformBase):
    """Channel scales ``E|x|^α / mean|w|^β``, folded into the model; then each group's range is clipped.

    Both searches minimize the squared error of a layer's output. The authors' code measures it by running the
    judged module; here it follows exactly, over all calibration tokens, from the second moment of the inputs.
    """

    name: ClassVar[str] = "awq"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})
    folds: ClassVar[bool] = True

    def fold_scale(self, fold: Fold, inputs: Mapping[str, InputStatistics]) -> Tensor:
        """The scale of every channel of a place where channels can be rescaled.

        Args:
            fold: where.
            inputs: statistics by layer name, of the model as it is.

        Returns:
            float32 ``[channels]``, positive; ones where nothing is better.
        """
        weights = [_some_rows(layer.weight.data).float() for layer in fold.consumers.values()]
        statistics = [inputs[name] for name in fold.consumers]
        # experts see different tokens, other consumers all the same
        seen = torch.stack([each.mean_abs for each in statistics]).mean(0)
        activation = fold.per_channel(seen).clamp(min=1e-8)
        magnitude = fold.per_channel(self._relative_magnitude(weights)).clamp(min=1e-4)
        best, best_loss = torch.ones_like(activation), torch.inf
        candidates = [torch.ones_like(activation)]
        for step in range(1, _RATIOS + 1):
            ratio = step / _RATIOS
            candidates.append(activation**ratio)
            candidates.append(activation**ratio / magnitude ** (1 - ratio))
        for candidate in candidates:
            scale = candidate.clamp(min=1e-4)
            scale = scale / torch.sqrt(scale.max() * scale.min())
            loss = self._loss(weights, fold.spread(scale), statistics)
            if loss < best_loss:
                best, best_loss = scale, loss
        return best

    def _relative_magnitude(self, weights: list[Tensor]) -> Tensor:
        """Mean over all rows of |w| relative to the largest of its group: ``[in_features]``."""
        total = torch.zeros(weights[0].shape[1], device=weights[0].device)
        for weight in weights:
            parts = grouped(weight.abs(), self.group_size)
            relative = parts / parts.amax(2, keepdim=True).clamp(min=1e-12)
            total += relative.flatten(1)[:, : weight.shape[1]].sum(0)
        return total / sum(len(weight) for weight in weights)

    def _loss(self, weights: list[Tensor], scale: Tensor, statistics: list[InputStatistics]) -> float:
        loss = 0.0
        for weight, seen in zip(weights, statistics, strict=True):
            scaled = weight * scale
            grid = minmax_grid(scaled, self.group_size, self.width)
            error = (rounded(scaled, grid, self.group_size) / scale).sub_(weight)
            loss += seen.output_error(error)
        return loss

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        weight, hessian = layer.weight, layer.require_inputs().hessian
        grid = searched_grid(weight, self.group_size, self.width, block_loss(hessian, self.group_size), removed)
        return to_layer(self.spec(*weight.shape[::-1]), nearest(weight, grid, self.group_size), grid)


def _some_rows(weight: Tensor) -> Tensor:
    return weight[:: -(-len(weight) // FOLD_ROWS)]
