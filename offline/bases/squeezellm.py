"""SqueezeLLM's dense part: Fisher-weighted k-means of every output row (arXiv 2306.07629, section 4.1)."""

from typing import ClassVar

import torch
from torch import Tensor

from vllm_requant.format import LutSpec
from vllm_requant.kernels.bitstream import pack_codes

from .base import Base, DenseLayer, LayerData, Need
from .kmeans import assign, kmeans_rows

__all__ = ["SqueezeLLM"]


class SqueezeLLM(Base):
    """A table of ``2**bits`` centroids per output row.

    Args:
        bits: width of a code.
        group_size: not used by this base; tables are per row.
    """

    name: ClassVar[str] = "squeezellm"
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4)
    grouped: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({Need.FISHER})

    def __init__(self, bits: int, group_size: int) -> None:
        self.width = bits

    def spec(self, in_features: int, out_features: int) -> LutSpec:
        return LutSpec(bits=self.width, in_features=in_features, out_features=out_features)  # type: ignore[arg-type]

    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        weight, fisher = layer.weight, layer.require_fisher()
        spec = self.spec(*weight.shape[::-1])
        counted = fisher if removed is None else fisher.masked_fill(removed, 0.0)
        table = kmeans_rows(weight, counted, 1 << self.width).to(torch.float16)
        # codes are nearest to the table as it is stored
        codes = assign(weight, table.float())
        return DenseLayer(spec, {"qweight": pack_codes(codes.to(torch.uint8), self.width), "lookup_table": table})
