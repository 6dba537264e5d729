"""What a conversion measures on the calibration set: losses, path integrals, scores; and the record of them."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import incidents
from .cache import TensorCache
from .lazy import LazyMapping, each
from .metrics import METRICS, Sensitivity
from .observer import current_observer
from .pqi import GradientMoments, Objective, PathIntegral
from .recipe import Recipe

__all__ = ["Measurements"]

log = logging.getLogger(__name__)


@dataclass
class Measurements:
    """Measurements of one conversion.

    Attributes:
        recipe: how to measure.
        objective: F; None for a recipe that needs no calibration.
        weights: w by layer, ``[out_features, in_features]``.
        start: moments of the gradients at w, if they were collected.
        cache: where path integrals are kept.
        loss_original: F at w; None without calibration.
        integrals: for the report, in the order in which they were computed.
    """

    recipe: Recipe
    objective: Objective | None
    weights: Mapping[str, Tensor]
    start: GradientMoments | None
    cache: TensorCache
    loss_original: float | None
    integrals: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.metric = METRICS[self.recipe.metric]
        self._generator = torch.Generator().manual_seed(self.recipe.seed)

    def loss(self, restored: Mapping[str, Tensor], label: str) -> float:
        """F at quantized weights w̃, by layer; infinite if the model overflows there."""
        assert self.objective is not None
        loss = self.objective.loss(restored, cache=self.cache, label=f"loss, {label}")
        if math.isfinite(loss):
            return loss
        incidents.note("the loss at quantized weights is not finite", "it counts as infinite", where=label)
        return math.inf

    def integrate(self, restored: Mapping[str, Tensor], label: str) -> PathIntegral:
        """Integrate from w to w̃, and hold the predicted ΔF against the actual one."""
        assert self.objective is not None
        assert self.loss_original is not None
        integral = self.objective.integrate(
            restored,
            rule=self.recipe.quadrature,
            nodes=self.recipe.nodes,
            squares=self.metric.needs_squares or self.cache.enabled,
            cache=self.cache,
            label=f"integral, {label}",
        )
        loss = self.loss(restored, label)
        breakdown = integral.breakdown()
        predicted, actual = sum(breakdown.predicted.values()), loss - self.loss_original
        error = abs(predicted - actual) / abs(actual) if actual else math.nan
        log.info(
            "integral, %s: ΔF predicted %.5f, actual %.5f, relative error %.3f %%",
            label,
            predicted,
            actual,
            100 * error,
        )
        self.integrals.append(
            {
                "stage": label,
                "predicted": predicted,
                "actual": actual,
                "relative_error": error,
                "predicted_by_layer": breakdown.predicted,
                "pqi_by_layer": breakdown.pqi,
                "coverage": breakdown.coverage,
            }
        )
        current_observer().integrated(self.integrals[-1])
        return integral

    def sensitivity(self, name: str, restored: Mapping[str, Tensor], path: PathIntegral | None) -> Sensitivity:
        """What the metrics look at in one layer."""
        weight = self.weights[name]
        delta = restored[name].float() - weight.float()
        return Sensitivity.of(name, weight, delta, self.start, path, self._generator)

    def path(self, restored: Mapping[str, Tensor], label: str, *, for_scores: bool = False) -> PathIntegral | None:
        """The integral from w to w̃, if the recipe's metric looks at one; or only if its scores do."""
        unused = not self.metric.needs_path or (for_scores and self.metric.path_is_for_layers)
        return None if unused else self.integrate(restored, label)

    def scores(self, restored: Mapping[str, Tensor], path: PathIntegral | None) -> Mapping[str, Tensor]:
        """The recipe's metric of every weight for the step from w to w̃."""
        lazy = isinstance(restored, LazyMapping)
        return each(self.weights, lambda name: self.metric.score(self.sensitivity(name, restored, path)), lazy=lazy)

    def levels(self, restored: Mapping[str, Tensor], path: PathIntegral | None) -> dict[str, float]:
        """S_l of algorithm 1, by layer."""
        return {name: self.metric.level(self.sensitivity(name, restored, path)) for name in self.weights}

    def splits(self, restored: Mapping[str, Tensor], path: PathIntegral | None) -> dict[str, dict[str, float]]:
        """What every layer adds to the loss in the step from w to w̃, by the name of the split and by layer."""
        shares: dict[str, dict[str, float]] = {split: {} for split in self.metric.splits}
        for name in self.weights:
            layer = self.sensitivity(name, restored, path)
            for split, share in self.metric.splits.items():
                shares[split][name] = share(layer)
        return shares
