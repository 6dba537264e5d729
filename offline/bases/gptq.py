"""GPTQ: group-wise asymmetric codes with error feedback (arXiv 2210.17323)."""

from typing import ClassVar

from torch import Tensor

from .base import DenseLayer, LayerData, Need
from .uniform import Grid, UniformBase, diagonal_loss, rounded, searched_grid

__all__ = ["Gptq"]


class Gptq(UniformBase):
    """Grids are fixed first, each range shrunk to where the error weighted with ``H_jj`` is least; columns are
    then visited by decreasing ``H_jj``. Groups stay where they are, so the format needs no permutation.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        return self.with_feedback(layer, self._grid(layer, removed), removed)

    def expected_error(self, layer: LayerData) -> float:
        """What rounding to nearest makes: feedback lowers it by about the same factor at all precisions."""
        return layer.error(rounded(layer.weight, self._grid(layer, None), self.group_size))

    def _grid(self, layer: LayerData, removed: Tensor | None) -> Grid:
        loss = diagonal_loss(layer.require_inputs().hessian, self.group_size)
        return searched_grid(layer.weight, self.group_size, self.width, loss, removed)
