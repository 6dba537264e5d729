"""GPTQ: group-wise asymmetric codes with error feedback (arXiv 2210.17323)."""

from typing import ClassVar

from torch import Tensor

from .base import DenseLayer, LayerData, Need
from .uniform import UniformBase, diagonal_loss, searched_grid

__all__ = ["Gptq"]


class Gptq(UniformBase):
    """Grids are fixed first, each range shrunk to where the error weighted with ``H_jj`` is least; columns are
    then visited by decreasing ``H_jj``. Groups stay where they are, so the format needs no permutation.
    """

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        loss = diagonal_loss(layer.require_inputs().hessian, self.group_size)
        return self.with_feedback(
            layer, searched_grid(layer.weight, self.group_size, self.width, loss, removed), removed
        )
