"""The interface of a dense quantizer."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vllm_requant.format import LayerSpec, QuantizedLayer

from ..statistics import InputStatistics

__all__ = ["EXPECTED_ERROR_ROWS", "Base", "DenseLayer", "LayerData", "Need", "relative_error"]

EXPECTED_ERROR_ROWS = 128  # that stand for all in an expected error


class DenseLayer(NamedTuple):
    """The dense part of a layer: its spec (``nnz`` 0) and canonical tensors by suffix."""

    spec: LayerSpec
    tensors: dict[str, Tensor]

    def weight(self) -> Tensor:
        """float32 ``[out_features, in_features]``."""
        return QuantizedLayer(self.spec, self.tensors).dense_weight()


def relative_error(quantized: Tensor, weight: Tensor) -> float:
    """Norm of the difference over that of the weight, float32 of one shape; a weight of zeros counts as tiny."""
    return float(torch.linalg.vector_norm(quantized - weight) / torch.linalg.vector_norm(weight).clamp(min=1e-30))


class Need(Enum):
    """What a base wants to be measured on the calibration set."""

    FISHER = "Fisher information of the weights"
    INPUTS = "statistics of the layers' inputs"


@dataclass(frozen=True)
class LayerData:
    """A layer as a base sees it.

    Attributes:
        weight: float32 ``[out_features, in_features]``.
        fisher: of the weights, same shape, non-negative; for bases that need it.
        inputs: statistics of the inputs; for bases that need them.
    """

    weight: Tensor
    fisher: Tensor | None = None
    inputs: InputStatistics | None = None

    def rows(self, most: int) -> "LayerData":
        """At most so many rows, evenly spaced."""
        step = -(-len(self.weight) // most)
        fisher = None if self.fisher is None else self.fisher[::step]
        return LayerData(self.weight[::step].contiguous(), fisher=fisher, inputs=self.inputs)

    def error(self, weight: Tensor) -> float:
        """How wrong another weight is: by the layer's output, or by Fisher information, or by itself, as is known."""
        error = weight - self.weight
        if self.inputs is not None:
            return self.inputs.output_error(error)
        squared = error.square() if self.fisher is None else error.square() * self.fisher
        return float(squared.sum(dtype=torch.float64))

    @property
    def known(self) -> frozenset[Need]:
        """What was measured of the layer."""
        measured = {Need.FISHER: self.fisher, Need.INPUTS: self.inputs}
        return frozenset(need for need, value in measured.items() if value is not None)

    def require_fisher(self) -> Tensor:
        if self.fisher is None:
            raise ValueError("this base needs the Fisher information")
        return self.fisher

    def require_inputs(self) -> InputStatistics:
        if self.inputs is None:
            raise ValueError("this base needs the statistics of the inputs")
        return self.inputs


class Base(ABC):
    """A dense quantizer of one weight matrix.

    Attributes:
        name: as on the command line.
        bits: allowed widths.
        options: choices of a recipe, beside bits, that mean anything to it: "group_size", "state_bits".
        usual_shares: of outliers and of significant weights, where a recipe names none.
        needs: what :meth:`quantize` wants to find in its :class:`LayerData`.
        can_refit: whether :meth:`refit` has anything to offer.
        refit_needs: what :meth:`refit` wants in addition.
        folds: whether the model is to be rescaled (:mod:`..folding`) before anything else is done with it.
    """

    name: ClassVar[str]
    bits: ClassVar[tuple[int, ...]]
    options: ClassVar[tuple[str, ...]] = ()
    usual_shares: ClassVar[tuple[float, float]] = (0.0045, 0.0005)  # the paper's SqueezeLLM setting
    needs: ClassVar[frozenset[Need]] = frozenset()
    can_refit: ClassVar[bool] = True
    refit_needs: ClassVar[frozenset[Need]] = frozenset()
    folds: ClassVar[bool] = False

    def __init__(self, bits: int) -> None:
        self.width = bits

    @abstractmethod
    def spec(self, in_features: int, out_features: int) -> LayerSpec:
        """The spec of a layer of that shape; sizes are known from it before any weight is."""

    @abstractmethod
    def quantize(self, layer: LayerData, removed: Tensor | None = None) -> DenseLayer:
        """Quantize one matrix.

        Args:
            layer: the weight and what :attr:`needs` names.
            removed: bool of the weight's shape: positions that the sparse part will hold. They must not influence
                ranges or centroids; their codes are those nearest to the weight.
        """

    def expected_error(self, layer: LayerData) -> float:
        """About the error that :meth:`quantize` makes, up to a factor that is the same at all precisions.

        It is cheap, so that many precisions can be weighed before one is chosen.
        """
        some = layer.rows(EXPECTED_ERROR_ROWS)
        return some.error(self.quantize(some).weight())

    def refit(self, layer: LayerData, dense: DenseLayer, removed: Tensor) -> DenseLayer:
        """Quantize again once the sparse part is known, with whatever lets the dense part make up for its errors.

        Args:
            layer: as in :meth:`quantize`, with what :attr:`refit_needs` names.
            dense: the layer as it was quantized before.
            removed: positions that are exact.
        """
        return self.quantize(layer, removed)
