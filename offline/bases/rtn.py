"""Round to nearest: group-wise asymmetric min/max, the baseline of every comparison."""

from typing import ClassVar

from torch import Tensor

from .base import DenseLayer, LayerData
from .uniform import UniformBase, minmax_grid, nearest, to_layer

__all__ = ["Rtn"]


class Rtn(UniformBase):
    """Codes ``round(w / scale) + zero_point`` with the range of each group spanned by its extremes and zero."""

    name: ClassVar[str] = "rtn"

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        weight = layer.weight
        counted = weight if removed is None else weight.masked_fill(removed, 0.0)
        grid = minmax_grid(counted, self.group_size, self.width)
        return to_layer(self.spec(*weight.shape[::-1]), nearest(weight, grid, self.group_size), grid)
