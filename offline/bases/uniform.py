"""Group-wise asymmetric grids: what rtn, gptq and awq share."""

from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_requant.format import UniformSpec
from vllm_requant.kernels.bitstream import pack_codes

from .base import Base, DenseLayer, LayerData, Need
from .feedback import compensate

__all__ = [
    "SMALLEST_SCALE",
    "Grid",
    "GroupLoss",
    "UniformBase",
    "block_loss",
    "column_groups",
    "diagonal_loss",
    "grouped",
    "minmax_grid",
    "nearest",
    "rounded",
    "searched_grid",
    "to_layer",
]

SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
GroupLoss = Callable[[Tensor], Tensor]
_SHRINKS = tuple(1 - 0.05 * step for step in range(11))


class UniformBase(Base):
    """A base of the ``uniform`` kind.

    Args:
        bits: width of a code.
        group_size: input features that share a scale and a zero point; a multiple of 32.
    """

    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    options: ClassVar[tuple[str, ...]] = ("group_size",)
    refit_needs: ClassVar[frozenset[Need]] = frozenset({Need.INPUTS})

    def __init__(self, bits: int, group_size: int) -> None:
        super().__init__(bits)
        self.group_size = group_size

    def spec(self, in_features: int, out_features: int) -> UniformSpec:
        return UniformSpec(
            bits=self.width,  # type: ignore[arg-type]
            group_size=self.group_size,
            in_features=in_features,
            out_features=out_features,
        )

    def refit(self, layer: LayerData, dense: DenseLayer, removed: Tensor) -> DenseLayer:
        """Ranges searched around the sparse part, and codes with error feedback that knows its positions."""
        loss = block_loss(layer.require_inputs().hessian, self.group_size)
        return self.with_feedback(
            layer, searched_grid(layer.weight, self.group_size, self.width, loss, removed), removed
        )

    def with_feedback(self, layer: LayerData, grid: "Grid", removed: Tensor | None) -> DenseLayer:
        """A layer whose codes on a given grid are chosen with error feedback."""
        weight = layer.weight
        by_group = [part.t().contiguous() for part in (grid.scales, grid.zeros)]

        def nearest(column: int, values: Tensor) -> tuple[Tensor, Tensor]:
            scale, zero = (part[column // self.group_size] for part in by_group)
            codes = (values / scale).round_().add_(zero).clamp_(0, grid.largest)
            return codes.to(torch.uint8), (codes - zero).mul_(scale)

        codes = compensate(weight, layer.require_inputs().hessian, nearest, exact=removed)
        return to_layer(self.spec(*weight.shape[::-1]), codes, grid)


class Grid(NamedTuple):
    """The representable values ``(code − zero) · scale`` of every group, codes from 0 to ``largest``.

    Attributes:
        scales: float32 ``[rows, groups]`` holding float16 values, positive.
        zeros: float32 ``[rows, groups]`` holding integers in ``[0, largest]``.
        largest: ``2**bits − 1``.
    """

    scales: Tensor
    zeros: Tensor
    largest: int

    def columns(self, group: Tensor) -> "Grid":
        """The grid of every column, ``[rows, columns]``; ``group`` int64 ``[columns]``."""
        return Grid(self.scales[:, group], self.zeros[:, group], self.largest)

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes as float32, of a weight of the grid's own shape."""
        return (torch.round(weight / self.scales) + self.zeros).clamp_(0, self.largest)

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zeros) * self.scales


def grouped(weight: Tensor, group_size: int) -> Tensor:
    """``[rows, columns]`` to ``[rows, groups, group_size]``, the tail group padded with zeros."""
    rows, columns = weight.shape
    groups = -(-columns // group_size)
    return torch.nn.functional.pad(weight, (0, groups * group_size - columns)).view(rows, groups, group_size)


def minmax_grid(weight: Tensor, group_size: int, bits: int, shrink: Tensor | float = 1.0) -> Grid:
    """Grids spanned by the extremes of each group and zero.

    Args:
        weight: float32 ``[rows, columns]``; positions that do not count hold 0, which every range contains.
        group_size: columns that share a scale.
        bits: width of a code.
        shrink: factor on both ends of the ranges, broadcast to ``[rows, groups]``.
    """
    largest = (1 << bits) - 1
    parts = grouped(weight, group_size)
    low, high = parts.amin(2).clamp(max=0) * shrink, parts.amax(2).clamp(min=0) * shrink
    # the scale is rounded to its stored type first, so that codes are nearest to what will be decoded
    scales = ((high - low) / largest).to(torch.float16).clamp(min=SMALLEST_SCALE).float()
    return Grid(scales, torch.round(-low / scales).clamp(0, largest), largest)


def diagonal_loss(hessian: Tensor, group_size: int) -> GroupLoss:
    """``Σ_j H_jj e_j²`` of every group."""
    importance = grouped(hessian.diagonal()[None], group_size)
    return lambda error: (error * error * importance).sum(2)


def block_loss(hessian: Tensor, group_size: int) -> GroupLoss:
    """``e_gᵀ H_gg e_g`` of every group: its own part of the squared output error."""
    columns = len(hessian)
    groups = -(-columns // group_size)
    padding = groups * group_size - columns
    padded = torch.nn.functional.pad(hessian, (0, padding, 0, padding)) if padding else hessian  # it may be large
    blocks = padded.view(groups, group_size, groups, group_size)
    index = torch.arange(groups, device=hessian.device)
    own = blocks[index, :, index].contiguous()  # [groups, group_size, group_size]

    def loss(error: Tensor) -> Tensor:
        by_group = error.transpose(0, 1)
        return (torch.bmm(by_group, own) * by_group).sum(2).t()

    return loss


def searched_grid(weight: Tensor, group_size: int, bits: int, loss: GroupLoss, removed: Tensor | None = None) -> Grid:
    """Grids whose ranges are shrunk, group by group, to where rounding to nearest loses least.

    Args:
        weight: float32 ``[rows, columns]``.
        group_size, bits: of the grid.
        loss: of an error ``[rows, groups, group_size]``, by group ``[rows, groups]``.
        removed: bool of the weight's shape: positions that neither span a range nor count as an error.

    Returns:
        The best of the min/max grid and ten that span 95 … 50 % of it.
    """
    counted = weight if removed is None else weight.masked_fill(removed, 0.0)
    best: tuple[Tensor, Grid] | None = None
    for shrink in _SHRINKS:
        grid = minmax_grid(counted, group_size, bits, shrink)
        error = rounded(weight, grid, group_size).sub_(weight)
        if removed is not None:
            error.masked_fill_(removed, 0.0)
        lost = loss(grouped(error, group_size))
        if best is None:
            best = lost, grid
            continue
        better = lost < best[0]
        scales, zeros = (torch.where(better, new, old) for new, old in zip(grid[:2], best[1][:2], strict=True))
        best = torch.where(better, lost, best[0]), Grid(scales, zeros, grid.largest)
    assert best is not None
    return best[1]


def column_groups(columns: int, group_size: int, device: torch.device) -> Tensor:
    """Group of every column: int64 ``[columns]``."""
    return torch.arange(columns, device=device) // group_size


def nearest(weight: Tensor, grid: Grid, group_size: int) -> Tensor:
    """Codes of a whole matrix: float32 ``[rows, columns]``."""
    return grid.columns(column_groups(weight.shape[1], group_size, weight.device)).codes(weight)


def rounded(weight: Tensor, grid: Grid, group_size: int) -> Tensor:
    """Nearest values of a whole matrix: float32 ``[rows, columns]``."""
    wide = grid.columns(column_groups(weight.shape[1], group_size, weight.device))
    return wide.values(wide.codes(weight))


def to_layer(spec: UniformSpec, codes: Tensor, grid: Grid) -> DenseLayer:
    """The canonical tensors of codes ``[rows, columns]`` on a grid."""
    return DenseLayer(
        spec,
        {
            "qweight": pack_codes(codes.to(torch.uint8), spec.bits),
            "scales": grid.scales.to(torch.float16).contiguous(),
            "qzeros": pack_codes(grid.zeros.to(torch.uint8), spec.bits),
        },
    )
