"""The sparse positions, every layer's precision being given: algorithms 1 and 2, or the base's own rule."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from . import outliers
from .bases import BASES
from .measurements import Measurements
from .quantizer import Dense, LayerQuantizer, Masks
from .recipe import Recipe
from .significant import detach_steps
from .stages import Stages

__all__ = ["Search", "Selection", "Selector"]

log = logging.getLogger(__name__)


class Selection(NamedTuple):
    """Quantized layers, the positions at which they are exact, and what led there, for the report."""

    dense: Dense
    masks: Masks
    report: dict[str, Any]


@dataclass
class Search(ABC):
    """A way to a selection.

    Attributes:
        recipe, quantizer, measurements, stages: of the conversion.
        candidates: that were measured, for the report.
    """

    recipe: Recipe
    quantizer: LayerQuantizer
    measurements: Measurements
    stages: Stages
    candidates: list[dict[str, Any]] = field(default_factory=list)

    @abstractmethod
    def select(self) -> Selection:
        """Search."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return self.quantizer.weights

    def quantize(self, removed: Masks | None, label: str) -> Dense:
        """Quantize all layers; see :meth:`LayerQuantizer.quantize`."""
        with self.stages.stage("quantize"):
            return self.quantizer.quantize(removed, label)


@dataclass
class Selector(Search):
    """Chooses the sparse positions of layers whose precision is fixed.

    Attributes:
        counts: outliers by layer.
    """

    counts: dict[str, int] = field(default_factory=dict)

    def select(self) -> Selection:
        """Run both algorithms."""
        recipe = self.recipe
        assert recipe.significant is not None
        if recipe.outlier_rule == "base":
            assert self.measurements.start is not None
            fisher = self.measurements.start.square
            masks = outliers.squeezellm_positions(self.weights, fisher, recipe.outliers, recipe.significant)
            return Selection(self.quantize(masks, "quantizing"), masks, {})
        if recipe.outliers > 0:
            dense, masks = self._outliers()
        else:
            dense, masks = self.quantize(None, "quantizing"), self.quantizer.no_masks()
        budget = round(recipe.significant * sum(weight.numel() for weight in self.weights.values()))
        if budget:
            masks = self._detach(dense, masks, budget)
        return Selection(dense, masks, {"outlier_ratio_candidates": self.candidates, "outliers": self.counts})

    def _outliers(self) -> tuple[Dense, Masks]:
        """Algorithm 1: the candidate ratios are re-quantized and the lowest calibration loss wins."""
        if self.recipe.metric == "random":
            masks = outliers.random_positions(self.weights, self.recipe.outliers, self.recipe.seed)
            return self.quantize(masks, "quantizing"), masks
        pre = self.quantize(None, "pre-quantizing")
        with self.stages.stage("outlier_ratio"):
            restored = self.quantizer.restored(pre, self.quantizer.no_masks())
            level = self.measurements.levels(restored, self.measurements.path(restored, "pre-quantized"))
            del restored, pre
        numel = {name: weight.numel() for name, weight in self.weights.items()}
        budget = round(self.recipe.outliers * sum(numel.values()))
        best: tuple[float, Dense, Masks] | None = None
        for tau in outliers.TAUS:
            counts = outliers.adaptive_counts(level, numel, budget, tau)
            masks = self._outlier_masks(counts)
            dense = self.quantize(masks, f"re-quantizing, τ = {tau:g}")
            with self.stages.stage("outlier_ratio"):
                loss = self.measurements.loss(self.quantizer.restored(dense, masks), f"τ = {tau:g}")
            self.candidates.append({"tau": tau, "calibration_loss": loss})
            log.info("outlier ratio: τ = %g gives calibration loss %.5f", tau, loss)
            if best is None or loss < best[0]:
                best, self.counts = (loss, dense, masks), counts
        assert best is not None
        return best[1], best[2]

    def _outlier_masks(self, counts: Mapping[str, int]) -> Masks:
        if self.recipe.outlier_rule == "magnitude":
            return outliers.largest_magnitude(self.weights, counts)
        group_size = self.recipe.group_size if "group_size" in BASES[self.recipe.base].options else None
        return outliers.largest_range_reduction(self.weights, counts, group_size)

    def _detach(self, dense: Dense, masks: Masks, budget: int) -> Masks:
        """Algorithm 2."""

        def measure(masks: Masks, number: int) -> Mapping[str, Tensor]:
            with self.stages.stage("significant"):
                restored = self.quantizer.restored(dense, masks)
                path = self.measurements.path(restored, f"detach, round {number + 1}", for_scores=True)
                return self.measurements.scores(restored, path)

        return detach_steps(measure, masks, budget, self.recipe.rounds)
