"""The interface of a dense quantizer."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor

from vllm_requant.format import LayerSpec, QuantizedLayer

__all__ = ["Base", "DenseLayer"]


class DenseLayer(NamedTuple):
    """The dense part of a layer: its spec (``nnz`` 0) and canonical tensors by suffix."""

    spec: LayerSpec
    tensors: dict[str, Tensor]

    def weight(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""
        return QuantizedLayer(self.spec, self.tensors).dense_weight()


class Base(ABC):
    """A dense quantizer of one weight matrix.

    Attributes:
        name: as on the command line.
        bits: allowed widths.
        grouped: whether ``group_size`` means anything to it.
        needs_fisher: whether :meth:`quantize` wants the Fisher information of the weights.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    grouped: ClassVar[bool]
    needs_fisher: ClassVar[bool]

    @abstractmethod
    def __init__(self, bits: int, group_size: int) -> None: ...

    @abstractmethod
    def spec(self, in_features: int, out_features: int) -> LayerSpec:
        """The spec of a layer of that shape; sizes are known from it before any weight is."""

    @abstractmethod
    def quantize(self, weight: Tensor, *, removed: Tensor | None = None, fisher: Tensor | None = None) -> DenseLayer:
        """Quantize one matrix.

        Args:
            weight: float32 ``[out_features, in_features]``.
            removed: bool of the same shape: positions that the sparse part will hold. They must not influence
                ranges or centroids; their codes are those nearest to the weight.
            fisher: float32 of the same shape, non-negative, when ``needs_fisher``.
        """
