"""Round to nearest: group-wise asymmetric min/max, the baseline of every comparison."""

from typing import ClassVar

import torch
from torch import Tensor

from vllm_requant.format import UniformSpec
from vllm_requant.kernels.bitstream import pack_codes

from .base import Base, DenseLayer

__all__ = ["Rtn"]

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16


class Rtn(Base):
    """Codes ``round(w / scale) + zero_point`` with the range of each group spanned by its extremes and zero.

    Args:
        bits: width of a code.
        group_size: input features that share a scale and a zero point; a multiple of 32.
    """

    name: ClassVar[str] = "rtn"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    grouped: ClassVar[bool] = True
    needs_fisher: ClassVar[bool] = False

    def __init__(self, bits: int, group_size: int) -> None:
        self.width, self.group_size = bits, group_size

    def spec(self, in_features: int, out_features: int) -> UniformSpec:
        return UniformSpec(
            bits=self.width,  # type: ignore[arg-type]
            group_size=self.group_size,
            in_features=in_features,
            out_features=out_features,
        )

    def quantize(self, weight: Tensor, *, removed: Tensor | None = None, fisher: Tensor | None = None) -> DenseLayer:
        rows, columns = weight.shape
        spec = self.spec(columns, rows)
        largest = (1 << self.width) - 1
        # zeros in the tail group's padding and at removed positions leave a range that contains zero unchanged
        counted = weight if removed is None else weight.masked_fill(removed, 0.0)
        padded = torch.nn.functional.pad(counted, (0, spec.groups * self.group_size - columns))
        grouped = padded.view(rows, spec.groups, self.group_size)
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        # the scale is rounded to its stored type first, so that codes are nearest to what will be decoded
        scales = ((high - low) / largest).to(torch.float16).clamp(min=_SMALLEST_SCALE)
        zeros = torch.round(-low / scales.float()).clamp(0, largest)
        group = torch.arange(columns, device=weight.device) // self.group_size
        codes = torch.round(weight / scales.float()[:, group]) + zeros[:, group]
        return DenseLayer(
            spec,
            {
                "qweight": pack_codes(codes.clamp(0, largest).to(torch.uint8), self.width),
                "scales": scales,
                "qzeros": pack_codes(zeros.to(torch.uint8), self.width),
            },
        )
