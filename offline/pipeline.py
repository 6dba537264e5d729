"""The six steps of ReQuant (arXiv 2503.01901, section on the pipeline), from a loaded model to quantized layers.

1. pre-quantize with the base                     4. re-quantize with the outliers removed
2. algorithm 1: outlier ratio of every layer      5. algorithm 2: detach significant weights step by step
3. pick outliers inside each layer                6. dense + outliers + significant weights

Nothing here touches files.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_requant.format import LayerSpec, QuantizedLayer

from . import outliers, pqi
from .bases import DenseLayer, Rtn
from .models import CausalLM, find_layers, head_module
from .progress import track
from .recipe import Recipe
from .significant import detach_steps

__all__ = ["Conversion", "convert", "plan"]

log = logging.getLogger(__name__)
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        layers: quantized layers by module name, the head last if it was asked for.
        report: what was measured on the way; becomes ``requant_report.json``.
    """

    layers: dict[str, QuantizedLayer]
    report: dict[str, Any]


def plan(model: nn.Module, recipe: Recipe) -> dict[str, LayerSpec]:
    """Specs of all layers that a conversion would write, sparse elements spread evenly; the model may be on "meta".

    Raises:
        ModelError: the architecture is not supported.
    """
    base = recipe.make_base()
    share = recipe.outliers + recipe.significant
    specs: dict[str, LayerSpec] = {}
    for name, layer in find_layers(model).items():
        spec = base.spec(layer.in_features, layer.out_features)
        specs[name] = spec.model_copy(update={"nnz": round(share * spec.numel)})
    if recipe.lm_head_bits < 16:
        name, weight = head_module(model)
        specs[name] = Rtn(recipe.lm_head_bits, recipe.group_size).spec(weight.shape[1], weight.shape[0])
    return specs


def convert(lm: CausalLM, recipe: Recipe, tokens: Tensor | None) -> Conversion:
    """Convert a model.

    Args:
        lm: the model; its weights are the same afterwards.
        recipe: what to do.
        tokens: int64 ``[num_samples, seq_len]``; None only if the recipe needs no calibration.
    """
    if tokens is None and recipe.needs_calibration:
        raise ValueError("this recipe needs calibration tokens")
    return _Run(lm, recipe, tokens).convert()


@dataclass
class _Run:
    """State of one conversion."""

    lm: CausalLM
    recipe: Recipe
    tokens: Tensor | None
    seconds: dict[str, float] = field(default_factory=dict)
    integrals: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.lm.model
        self.layers = find_layers(self.model)
        self.weights: dict[str, Tensor] = {name: layer.weight.data for name, layer in self.layers.items()}
        self.numel = {name: weight.numel() for name, weight in self.weights.items()}
        self.total = sum(self.numel.values())
        self.fisher: dict[str, Tensor] | None = None
        self.candidates: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.loss_original: float | None = None
        self.relative_error: dict[str, float] = {}

    def convert(self) -> Conversion:
        base = self.recipe.make_base()
        if self.tokens is not None:
            with self._stage("original_loss"):
                self.loss_original = pqi.calibration_loss(self.model, self.tokens, "loss of the original")
        if base.needs_fisher:
            with self._stage("fisher"):
                assert self.tokens is not None
                self.fisher = pqi.fisher_information(self.model, self.layers, self.tokens)
        choose = {"requant": self._requant, "base": self._base_rule, "random": self._random}
        dense, masks = choose[self.recipe.selection]()
        with self._stage("residual"):
            layers = self._join(dense, masks)
        report = self._report(layers)
        if self.recipe.lm_head_bits < 16:
            with self._stage("lm_head"):
                name, weight = head_module(self.model)
                spec, tensors = Rtn(self.recipe.lm_head_bits, self.recipe.group_size).quantize(weight.float())
                layers[name] = QuantizedLayer(spec, tensors)
                self._log_layer(name, layers[name], weight)
        return Conversion(layers, report)

    # the three ways to choose the sparse positions ---------------------------------------------------------

    def _requant(self) -> tuple[dict[str, DenseLayer], Masks]:
        none: Masks = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        budget = round(self.recipe.significant * self.total)
        dense = self._quantize(None, "pre-quantizing")
        masks = none
        if self.recipe.outliers > 0:
            dense, masks = self._adaptive_outliers(dense, none)
        if budget:
            with self._stage("significant"):
                masks, _ = detach_steps(
                    lambda m, number: self._integrate(dense, m, f"detach, round {number + 1}"),
                    masks,
                    budget,
                    self.recipe.rounds,
                )
        return dense, masks

    def _adaptive_outliers(self, pre: dict[str, DenseLayer], none: Masks) -> tuple[dict[str, DenseLayer], Masks]:
        """Algorithm 1: the candidate ratios are re-quantized and the lowest calibration loss wins."""
        assert self.tokens is not None
        with self._stage("outlier_ratio"):
            integral = self._integrate(pre, none, "pre-quantized")
            mean_score = {name: float(integral.score(name).mean(dtype=torch.float64)) for name in self.weights}
            del integral
        budget = round(self.recipe.outliers * self.total)
        best: tuple[float, dict[str, DenseLayer], Masks] | None = None
        for tau in outliers.TAUS:
            counts = outliers.adaptive_counts(mean_score, self.numel, budget, tau)
            masks = outliers.largest_magnitude(self.weights, counts)
            dense = self._quantize(masks, f"re-quantizing, τ = {tau:g}")
            with self._stage("outlier_ratio"):
                loss = self._loss(dense, masks, f"loss at τ = {tau:g}")
            self.candidates.append({"tau": tau, "calibration_loss": loss})
            log.info("outlier ratio: τ = %g gives calibration loss %.5f", tau, loss)
            if best is None or loss < best[0]:
                best, self.counts = (loss, dense, masks), counts
        assert best is not None
        return best[1], best[2]

    def _base_rule(self) -> tuple[dict[str, DenseLayer], Masks]:
        assert self.fisher is not None
        masks = outliers.squeezellm_positions(self.weights, self.fisher, self.recipe.outliers, self.recipe.significant)
        return self._quantize(masks, "quantizing"), masks

    def _random(self) -> tuple[dict[str, DenseLayer], Masks]:
        removed = outliers.random_positions(self.weights, self.recipe.outliers, self.recipe.seed)
        both = self.recipe.outliers + self.recipe.significant
        # the same seed ranks the same, so the larger share contains the smaller one
        masks = outliers.random_positions(self.weights, both, self.recipe.seed)
        return self._quantize(removed, "quantizing"), masks

    # pieces ------------------------------------------------------------------------------------------------

    def _quantize(self, removed: Masks | None, label: str) -> dict[str, DenseLayer]:
        base = self.recipe.make_base()
        dense = {}
        with self._stage("quantize"):
            for name, weight in track(self.weights.items(), label, total=len(self.weights)):
                dense[name] = base.quantize(
                    weight,
                    removed=removed[name] if removed is not None else None,
                    fisher=self.fisher[name] if self.fisher is not None else None,
                )
        return dense

    def _restored(self, dense: Mapping[str, DenseLayer], masks: Masks) -> dict[str, Tensor]:
        """w̃: dense weights with the masked positions at full precision."""
        return {name: torch.where(masks[name], self.weights[name], dense[name].weight()) for name in dense}

    def _integrate(self, dense: Mapping[str, DenseLayer], masks: Masks, label: str) -> pqi.PathIntegral:
        assert self.tokens is not None
        assert self.loss_original is not None
        restored = self._restored(dense, masks)
        integral = pqi.integrate(
            self.model,
            self.layers,
            restored,
            self.tokens,
            rule=self.recipe.quadrature,
            nodes=self.recipe.nodes,
            label=f"integral ({label})",
        )
        with pqi.weights_replaced(self.layers, restored):
            loss = pqi.calibration_loss(self.model, self.tokens, f"actual loss ({label})")
        share = integral.predicted()
        predicted, actual = sum(share.values()), loss - self.loss_original
        error = abs(predicted - actual) / abs(actual) if actual else float("nan")
        log.info(
            "integral (%s): ΔF predicted %.5f, actual %.5f, relative error %.3f %%",
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
                "predicted_by_layer": share,
            }
        )
        return integral

    def _loss(self, dense: Mapping[str, DenseLayer], masks: Masks, label: str) -> float:
        assert self.tokens is not None
        with pqi.weights_replaced(self.layers, self._restored(dense, masks)):
            return pqi.calibration_loss(self.model, self.tokens, label)

    def _join(self, dense: Mapping[str, DenseLayer], masks: Masks) -> dict[str, QuantizedLayer]:
        layers = {}
        for name, (spec, tensors) in dense.items():
            weight = self.weights[name]
            layers[name] = QuantizedLayer.build(spec, tensors, weight=weight, mask=masks[name]).to("cpu")
            self._log_layer(name, layers[name], weight)
        return layers

    def _log_layer(self, name: str, layer: QuantizedLayer, weight: Tensor) -> None:
        spec = layer.spec
        self.relative_error[name] = _relative_error(layer, weight)
        log.info(
            "%-40s %-7s %d bit  nnz %-7d %.3f bits/weight  relative error %.4f",
            name,
            spec.kind,
            spec.bits,
            spec.nnz,
            spec.bits_per_weight,
            self.relative_error[name],
        )

    def _report(self, layers: Mapping[str, QuantizedLayer]) -> dict[str, Any]:
        report: dict[str, Any] = {
            "layers": {
                name: {
                    "bits_per_weight": layer.spec.bits_per_weight,
                    "nnz": layer.spec.nnz,
                    "outliers": self.counts.get(name),
                    "relative_error": self.relative_error[name],
                }
                for name, layer in layers.items()
            },
            "outlier_ratio_candidates": self.candidates,
            "integrals": self.integrals,
        }
        if self.tokens is not None:
            assert self.loss_original is not None
            # the stored weights, rounding of the residual included
            stored = {name: layer.weight() for name, layer in layers.items()}
            with self._stage("final_loss"), pqi.weights_replaced(self.layers, stored):
                loss = pqi.calibration_loss(self.model, self.tokens, "loss of the result")
            report |= {
                "calibration_loss_original": self.loss_original,
                "calibration_loss": loss,
                "delta_loss": loss - self.loss_original,
            }
        return report | {"seconds": {name: round(value, 1) for name, value in self.seconds.items()}}

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


def _relative_error(layer: QuantizedLayer, weight: Tensor) -> float:
    difference = torch.linalg.vector_norm(layer.weight() - weight.cpu().float())
    return float(difference / torch.linalg.vector_norm(weight.float()).clamp(min=1e-30))
