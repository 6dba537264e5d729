"""What a weight's quantization costs: the measures by which weights can be ranked.

All of them come from the same passes: the gradients at the original weights, and the integral along the path to the
quantized ones.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .pqi import GradientMoments, PathIntegral, element_pqi, signed_share

__all__ = ["METRICS", "Metric", "Sensitivity"]


class Sensitivity(NamedTuple):
    """What is known about one layer.

    Attributes:
        weight: w, float32 ``[out_features, in_features]``.
        delta: w̃ − w.
        start_gradient, start_square: moments of the gradient at w; None if the metric needs no start.
        path_gradient, path_square: moments of the path-averaged gradient; None if it needs no path.
        generator: for the random control.
    """

    weight: Tensor
    delta: Tensor
    start_gradient: Tensor | None
    start_square: Tensor | None
    path_gradient: Tensor | None
    path_square: Tensor | None
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        name: str,
        weight: Tensor,
        delta: Tensor,
        start: GradientMoments | None,
        path: PathIntegral | None,
        generator: torch.Generator,
    ) -> "Sensitivity":
        """Pick one layer out of the moments of all, which may lie on another device."""
        at_start = start or GradientMoments({}, {})
        along = path.moments if path is not None else GradientMoments({}, {})

        def here(moments: Mapping[str, Tensor]) -> Tensor | None:
            return moments[name].to(weight.device) if name in moments else None

        return cls(
            weight,
            delta,
            here(at_start.gradient),
            here(at_start.square),
            here(along.gradient),
            here(along.square),
            generator,
        )


class Metric(NamedTuple):
    """A measure.

    Attributes:
        score: non-negative, of every weight of a layer; comparable between layers.
        splits: what the layer as a whole adds to the loss, up to a factor common to all layers; by name. Where there
            are several, what each leads to is measured.
        needs_start: whether it looks at the gradients at w.
        needs_path: whether it looks at the path integral.
        needs_squares: whether it looks at the path's second moments.
        path_is_for_layers: the path integral, if needed, does not influence the scores.
    """

    score: Callable[[Sensitivity], Tensor]
    splits: Mapping[str, Callable[[Sensitivity], float]]
    needs_start: bool = False
    needs_path: bool = False
    needs_squares: bool = False
    path_is_for_layers: bool = False

    def level(self, layer: Sensitivity) -> float:
        """S_l of algorithm 1: the mean over the layer's weights of what layers are compared by."""
        if self.path_is_for_layers:
            return next(iter(self.splits.values()))(layer) / layer.weight.numel()
        return float(self.score(layer).mean(dtype=torch.float64))


def _given(moment: Tensor | None) -> Tensor:
    if moment is None:
        raise ValueError("the metric needs a moment that was not collected")
    return moment


def _path_share(layer: Sensitivity) -> float:
    """The layer's signed part of ΔF, which the integral splits exactly."""
    return signed_share(_given(layer.path_gradient), layer.delta)


def _pqi(layer: Sensitivity) -> Tensor:
    return element_pqi(_given(layer.path_gradient), layer.delta)


def _path_fisher(layer: Sensitivity) -> Tensor:
    return layer.delta.square().mul_(_given(layer.path_square))


def _fisher(layer: Sensitivity) -> Tensor:
    return layer.delta.square().mul_(_given(layer.start_square))


def _first_order(layer: Sensitivity) -> Tensor:
    return (layer.delta * _given(layer.start_gradient)).abs_()


def _total(score: Callable[[Sensitivity], Tensor]) -> Callable[[Sensitivity], float]:
    return lambda layer: float(score(layer).sum(dtype=torch.float64))


METRICS: dict[str, Metric] = {
    # arXiv 2503.01901: |Δ · path-averaged gradient|, averaged over the set before the absolute value
    "pqi": Metric(_pqi, {"PQI": _path_share}, needs_path=True),
    # ours: PQI, which splits ΔF exactly, for layers; Fisher's second moment, which is less noisy, for single weights
    "pqi-fisher": Metric(
        _fisher,
        {"PQI": _path_share, "Fisher": _total(_fisher)},
        needs_start=True,
        needs_path=True,
        path_is_for_layers=True,
    ),
    # ours: PQI's path with Fisher's second moment, which over-fits a small calibration set less
    "path-fisher": Metric(_path_fisher, {"PQI": _path_share}, needs_path=True, needs_squares=True),
    # the diagonal second-order estimate with the empirical Fisher information for the Hessian (SqueezeLLM)
    "fisher": Metric(_fisher, {"Fisher": _total(_fisher)}, needs_start=True),
    "first-order": Metric(_first_order, {"first order": _total(_first_order)}, needs_start=True),
    # controls: what can be done without text, and what chance does
    "magnitude": Metric(
        lambda s: s.weight.abs(), {"error": lambda s: float(s.delta.square().sum(dtype=torch.float64))}
    ),
    "random": Metric(
        lambda s: torch.rand(s.weight.shape, generator=s.generator).to(s.weight.device),
        {"chance": lambda s: float(torch.rand((), generator=s.generator)) * s.weight.numel()},
    ),
}
