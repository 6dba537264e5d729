"""SqueezeLLM's dense part: Fisher-weighted k-means of every output row (arXiv 2306.07629, section 4.1)."""

from typing import ClassVar

import torch
from torch import Tensor

from vllm_requant.format import LutSpec
from vllm_requant.kernels.bitstream import pack_codes

from .. import incidents
from .base import Base, DenseLayer, LayerData, Need
from .feedback import compensate
from .kmeans import assign, kmeans_rows

__all__ = ["SqueezeLLM", "feedback_codes", "least_squares_table"]

_REFIT_ROUNDS = 1  # more rounds gain little
_ROWS_AT_ONCE_ELEMENTS = 1 << 24  # one-hot codes held at a time


class SqueezeLLM(Base):
    """A table of ``2**bits`` centroids per output row.

    Args:
        bits: width of a code.
    """

    name: ClassVar[str] = "squeezellm"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FISHER})
    refit_needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})

    def spec(self, in_features: int, out_features: int) -> LutSpec:
        return LutSpec(bits=self.width, in_features=in_features, out_features=out_features)  # type: ignore[arg-type]

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        weight, fisher = layer.weight, layer.require_fisher()
        spec = self.spec(*weight.shape[::-1])
        counted = fisher if removed is None else fisher.masked_fill(removed, 0.0)
        if blind := int((counted == 0).all(1).sum()):
            incidents.note("rows without Fisher information", "their weights count alike", count=blind)
        table = kmeans_rows(weight, counted, 1 << self.width).to(torch.float16)
        # codes are nearest to the table as it is stored
        return self._layer(spec, assign(weight, table.float()), table)

    def refit(self, layer: LayerData, dense: DenseLayer, removed: Tensor) -> DenseLayer:
        """Codes with error feedback under the table of before, the best table for them, and codes once more.

        All steps lower the squared error of the layer's output, given by the second moment of its inputs.
        """
        weight, hessian = layer.weight, layer.require_inputs().hessian
        table = dense.tensors["lookup_table"].float().sort(dim=1).values
        for _ in range(_REFIT_ROUNDS):
            codes = feedback_codes(weight, hessian, table, removed)
            table = least_squares_table(weight, hessian, codes, table, removed).to(torch.float16).float()
        codes = feedback_codes(weight, hessian, table, removed)
        return self._layer(self.spec(*weight.shape[::-1]), codes, table.to(torch.float16))

    def _layer(self, spec: LutSpec, codes: Tensor, table: Tensor) -> DenseLayer:
        return DenseLayer(spec, {"qweight": pack_codes(codes.to(torch.uint8), self.width), "lookup_table": table})


def feedback_codes(weight: Tensor, hessian: Tensor, table: Tensor, removed: Tensor) -> Tensor:
    """Codes under a table per row, ascending, with error feedback: uint8 ``[rows, columns]``."""
    borders = (table[:, 1:] + table[:, :-1]) / 2

    def nearest(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        codes = (values[:, None] > borders).sum(1)
        return codes.to(torch.uint8), table.gather(1, codes[:, None])[:, 0]

    return compensate(weight, hessian, nearest, exact=removed)


def least_squares_table(weight: Tensor, hessian: Tensor, codes: Tensor, table: Tensor, removed: Tensor) -> Tensor:
    """The tables that minimize ``e H eᵀ`` of every row for given codes; ``e`` is 0 where the weight is exact.

    Args:
        weight: float32 ``[rows, columns]``.
        hessian: float32 ``[columns, columns]``.
        codes: uint8 ``[rows, columns]``.
        table: float32 ``[rows, entries]``, towards which entries that nothing uses are drawn.
        removed: bool ``[rows, columns]``.

    Returns:
        float32 ``[rows, entries]``, ascending.
    """
    entries = table.shape[1]
    kept = ~removed
    result = torch.empty_like(table)
    singular = 0
    at_once = max(1, _ROWS_AT_ONCE_ELEMENTS // (weight.shape[1] * entries))
    for first in range(0, len(weight), at_once):
        rows = slice(first, first + at_once)
        own = codes[rows].long()
        chosen = torch.nn.functional.one_hot(own, entries).float() * kept[rows, :, None]
        weighted = torch.einsum("ij,rje->rie", hessian, chosen)
        normal = torch.einsum("rie,rif->ref", chosen, weighted)
        # what the present table leaves over is solved for: better conditioned than the weight itself
        left = (weight[rows] - table[rows].gather(1, own)) * kept[rows]
        right = torch.einsum("rie,ri->re", weighted, left)
        ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-20)
        normal += ridge[:, None, None] * torch.eye(entries, device=weight.device)
        step, failed = torch.linalg.solve_ex(normal, right)
        solved = (failed == 0) & step.isfinite().all(1)
        singular += int((~solved).sum())
        result[rows] = torch.where(solved[:, None], table[rows] + step, table[rows])
    if singular:
        incidents.note("rows whose best table is not unique", "they keep the one of before", count=singular)
    return result.sort(dim=1).values
