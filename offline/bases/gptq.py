"""GPTQ: group-wise asymmetric codes with error feedback (arXiv 2210.17323)."""

from typing import ClassVar

from torch import Tensor

from .base import DenseLayer, LayerData, Need
from .feedback import compensate
from .uniform import UniformBase, column_groups, diagonal_loss, searched_grid, to_layer

__all__ = ["Gptq"]


class Gptq(UniformBase):
    """Grids are fixed first, each range shrunk to where the error weighted with ``H_jj`` is least; columns are
    then visited by decreasing ``H_jj``. Groups stay where they are, so the format needs no permutation.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        weight, hessian = layer.weight, layer.require_inputs().hessian
        grid = searched_grid(weight, self.group_size, self.width, diagonal_loss(hessian, self.group_size), removed)
        group = column_groups(weight.shape[1], self.group_size, weight.device)
        wide = grid.columns(group)
        by_column = [part.t().contiguous() for part in (wide.scales, wide.zeros)]

        def nearest(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero = (part[column] for part in by_column)
            codes = (values / scale).round_().add_(zero).clamp_(0, grid.largest)
            return codes, (codes - zero).mul_(scale)

        codes = compensate(weight, hessian, nearest, exact=removed)
        return to_layer(self.spec(*weight.shape[::-1]), codes, grid)
