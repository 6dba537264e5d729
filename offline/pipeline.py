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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_requant.format import LayerSpec, QuantizedLayer

from . import outliers, pqi
from .allocation import allocate
from .bases import Awq, LayerData, Need, Rtn
from .cache import MomentsCache
from .folding import apply_fold, find_folds
from .metrics import METRICS, Sensitivity
from .models import CausalLM, ModelError, find_layers, head_module
from .progress import track
from .quantizer import Dense, LayerQuantizer, Masks
from .recipe import Recipe
from .significant import detach_steps
from .statistics import InputStatistics, input_statistics
from .tuning import norm_weights, tune

__all__ = ["Conversion", "convert", "plan"]

log = logging.getLogger(__name__)
_TOKENS_PER_FEATURE = 4


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

    With a target the widths are not known before anything is measured; the largest below it stands for them.

    Raises:
        ModelError: the architecture is not supported.
    """
    base = recipe.make_base(recipe.typical_bits)
    if base.folds:
        list(find_folds(model))  # refuses an architecture that it knows nothing about
    share = recipe.outliers + recipe.significant
    specs: dict[str, LayerSpec] = {}
    for name, layer in find_layers(model).items():
        try:
            spec = base.spec(layer.in_features, layer.out_features)
        except ValueError as error:
            raise ModelError(f"{name}: {error}; use another base") from None
        specs[name] = spec.model_copy(update={"nnz": round(share * spec.numel)})
    if recipe.lm_head_bits < 16:
        name, weight = head_module(model)
        specs[name] = Rtn(recipe.lm_head_bits, recipe.group_size).spec(weight.shape[1], weight.shape[0])
    return specs


def convert(lm: CausalLM, recipe: Recipe, tokens: Tensor | None, *, cache: Path | None = None) -> Conversion:
    """Convert a model.

    Args:
        lm: the model. A base that folds scales rescales it in place, which leaves what it computes unchanged up to
            rounding; tuning changes its norms; the weights of its layers are otherwise left as they are.
        recipe: what to do.
        tokens: int64 ``[num_samples, seq_len]``; None only if the recipe needs no calibration.
        cache: folder in which path integrals are kept, so that conversions that differ elsewhere share them.
    """
    if tokens is None and recipe.needs_calibration:
        raise ValueError("this recipe needs calibration tokens")
    return _Run(lm, recipe, tokens, MomentsCache(cache)).convert()


@dataclass
class _Run:
    """State of one conversion."""

    lm: CausalLM
    recipe: Recipe
    tokens: Tensor | None
    cache: MomentsCache
    seconds: dict[str, float] = field(default_factory=dict)
    integrals: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = self.lm.model
        self.layers = find_layers(self.model)
        self.passes = (
            pqi.Objective(self.model, self.layers, self.tokens, self.recipe.compute)
            if self.tokens is not None
            else None
        )
        self.numel = {name: layer.weight.numel() for name, layer in self.layers.items()}
        self.total = sum(self.numel.values())
        self.base = self.recipe.make_base(self.recipe.typical_bits)
        self.allocation: dict[str, Any] | None = None
        self.tuning: dict[str, Any] | None = None
        self.refit: dict[str, Any] | None = None
        self.metric = METRICS[self.recipe.metric]
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self.inputs: dict[str, InputStatistics] = {}
        self.start: pqi.GradientMoments | None = None
        self.candidates: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}
        self.loss_original: float | None = None
        self.relative_error: dict[str, float] = {}
        self.refits = self._refits()

    def convert(self) -> Conversion:
        if self.tokens is not None:
            with self._stage("original_loss"):
                self.loss_original = self.objective.loss(label="loss of the original")
        self._measure()
        # after folding: from here on the rescaled weights are the original
        self.weights: dict[str, Tensor] = {name: layer.weight.data for name, layer in self.layers.items()}
        self.quantizer = LayerQuantizer(self.recipe, self.weights, self.inputs, self.start)
        if self.recipe.target_bpw is not None:
            self._allocate(self.recipe.target_bpw)
        dense, masks = self._select()
        self.quantizer.forget()
        if self.recipe.tune_epochs:
            with self._stage("tuning"):
                dense = self._tune(dense, masks)
        with self._stage("residual"):
            layers = self._join(dense, masks)
        report = self._report(layers)
        if self.recipe.lm_head_bits < 16:
            with self._stage("lm_head"):
                name, weight = head_module(self.model)
                spec, tensors = Rtn(self.recipe.lm_head_bits, self.recipe.group_size).quantize(
                    LayerData(weight.float())
                )
                layers[name] = QuantizedLayer(spec, tensors)
                self._log_layer(name, layers[name], weight)
        return Conversion(layers, report)

    @property
    def objective(self) -> pqi.Objective:
        """The calibration loss; only for recipes that look at text."""
        assert self.passes is not None
        return self.passes

    # what is measured before anything is quantized ------------------------------------------------------------

    def _measure(self) -> None:
        needs = self.base.needs | (self.base.refit_needs if self.refits else frozenset())
        if Need.INPUTS in needs:
            assert self.tokens is not None
            with self._stage("inputs"):
                self.inputs = input_statistics(self.model, self.layers, self.tokens)
        if isinstance(self.base, Awq):
            with self._stage("fold"):
                self._fold(self.base)
        if Need.FISHER in needs or self.recipe.needs_start:
            with self._stage("gradients"):
                self.start = self.objective.gradients()

    def _fold(self, base: Awq) -> None:
        folds = list(find_folds(self.model))
        for fold in track(folds, "channel scales", total=len(folds)):
            scale = apply_fold(fold, base.fold_scale(fold, self.inputs), self.lm.dtype)
            rescaled = self.inputs[next(iter(fold.consumers))].scaled(1 / fold.spread(scale))
            self.inputs |= dict.fromkeys(fold.consumers, rescaled)

    # the choice of the widths ---------------------------------------------------------------------------------

    def _allocate(self, target: float) -> None:
        """Set the bits of every layer so that everything stored fits the target."""
        options = sorted(bits for bits in self.base.bits if bits < 8 or target > 4)
        specs = {
            bits: {
                name: self.recipe.make_base(bits).spec(la.in_features, la.out_features)
                for name, la in self.layers.items()
            }
            for bits in options
        }
        size = {name: {bits: 8.0 * specs[bits][name].dense_nbytes for bits in options} for name in self.layers}
        planned = plan(self.model, self.recipe)
        budget = target * self.total - 8 * sum(planned[name].sparse_nbytes for name in self.layers)
        fitting = [bits for bits in options if sum(size[name][bits] for name in size) <= budget]
        uniform = max(fitting, default=options[0])
        dense, error = {}, {}
        for bits in options:
            self.quantizer.bits = dict.fromkeys(self.layers, bits)
            dense[bits] = self._quantize(None, f"quantizing to {bits} bits")
            error[bits] = {name: self.quantizer.error(name, layer) for name, layer in dense[bits].items()}
        with self._stage("allocation"):
            none = self.quantizer.no_masks()
            predicted = self._integrate(
                self.quantizer.restored(dense[uniform], none), f"all layers at {uniform} bits"
            ).predicted()
            # single shares may come out negative by chance
            least = 1e-3 * sum(abs(value) for value in predicted.values()) / len(predicted)
            cost = {
                name: {bits: max(share, least) * error[bits][name] / error[uniform][name] for bits in options}
                for name, share in predicted.items()
            }
            chosen = allocate(size, cost, budget)
            losses = {
                "allocated": self._loss({name: dense[bits][name] for name, bits in chosen.items()}, none, "allocated"),
                f"uniform {uniform}": self._loss(dense[uniform], none, f"uniform {uniform}"),
            }
        # with a budget that one width fills there may be nothing to gain
        better = losses["allocated"] <= losses[f"uniform {uniform}"] or not fitting
        self.quantizer.bits = chosen if better else dict.fromkeys(self.layers, uniform)
        self.allocation = {"target_bpw": target, "losses": losses, "bits": self.quantizer.bits}
        counts = {bits: sum(b == bits for b in self.quantizer.bits.values()) for bits in options}
        log.info("allocation for %.3f bits per weight: layers by width %s, losses %s", target, counts, losses)

    # the choice of the sparse positions -----------------------------------------------------------------------

    def _select(self) -> tuple[Dense, Masks]:
        none = self.quantizer.no_masks()
        recipe = self.recipe
        if recipe.outlier_rule == "base":
            assert self.start is not None
            masks = outliers.squeezellm_positions(self.weights, self.start.square, recipe.outliers, recipe.significant)
            return self._quantize(masks, "quantizing"), masks
        if recipe.outliers > 0:
            dense, masks = self._outliers(none)
        else:
            dense, masks = self._quantize(None, "quantizing"), none
        budget = round(recipe.significant * self.total)
        if budget:
            masks = self._detach(dense, masks, budget)
        if self.refits:
            dense = self._refit(dense, masks)
        return dense, masks

    def _outliers(self, none: Masks) -> tuple[Dense, Masks]:
        """Algorithm 1: the candidate ratios are re-quantized and the lowest calibration loss wins."""
        if self.recipe.metric == "random":
            masks = outliers.random_positions(self.weights, self.recipe.outliers, self.recipe.seed)
            return self._quantize(masks, "quantizing"), masks
        pre = self._quantize(None, "pre-quantizing")
        with self._stage("outlier_ratio"):
            scores = self._scores(pre, none, "pre-quantized")
            mean_score = {name: float(score.mean(dtype=torch.float64)) for name, score in scores.items()}
            del scores, pre
        budget = round(self.recipe.outliers * self.total)
        best: tuple[float, Dense, Masks] | None = None
        for tau in outliers.TAUS:
            counts = outliers.adaptive_counts(mean_score, self.numel, budget, tau)
            masks = self._outlier_masks(counts)
            dense = self._quantize(masks, f"re-quantizing, τ = {tau:g}")
            with self._stage("outlier_ratio"):
                loss = self._loss(dense, masks, f"loss at τ = {tau:g}")
            self.candidates.append({"tau": tau, "calibration_loss": loss})
            log.info("outlier ratio: τ = %g gives calibration loss %.5f", tau, loss)
            if best is None or loss < best[0]:
                best, self.counts = (loss, dense, masks), counts
        assert best is not None
        return best[1], best[2]

    def _outlier_masks(self, counts: Mapping[str, int]) -> Masks:
        if self.recipe.outlier_rule == "magnitude":
            return outliers.largest_magnitude(self.weights, counts)
        group_size = self.recipe.group_size if "group_size" in self.base.options else None
        return outliers.largest_range_reduction(self.weights, counts, group_size)

    def _detach(self, dense: Dense, masks: Masks, budget: int) -> Masks:
        """Algorithm 2."""

        def measure(masks: Masks, number: int) -> dict[str, Tensor]:
            with self._stage("significant"):
                return self._scores(dense, masks, f"detach, round {number + 1}")

        return detach_steps(measure, masks, budget, self.recipe.rounds)

    def _refits(self) -> bool:
        """Whether to refit. Second moments from few tokens would fit the calibration set and nothing else."""
        if not self.recipe.refits or self.tokens is None:
            return False
        needed = _TOKENS_PER_FEATURE * max(layer.in_features for layer in self.layers.values())
        if Need.INPUTS in self.base.refit_needs and self.tokens.numel() < needed:
            log.info("no refit: it takes %d calibration tokens, there are %d", needed, self.tokens.numel())
            return False
        return True

    def _refit(self, dense: Dense, masks: Masks) -> Dense:
        """Quantize anew around the sparse part. Its positions fit the errors of before, so the loss decides."""
        with self._stage("refit"):
            refitted = self.quantizer.refit(dense, masks, "re-fitting around the sparse part")
        with self._stage("refit_loss"):
            before, after = (
                self._loss(dense, masks, "loss before refit"),
                self._loss(refitted, masks, "loss after refit"),
            )
        log.info("refit: calibration loss %.5f before, %.5f after", before, after)
        self.refit = {"calibration_loss_before": before, "calibration_loss_after": after, "kept": after < before}
        return refitted if after < before else dense

    def _tune(self, dense: Dense, masks: Masks) -> Dense:
        tuned, divergence = tune(self.objective, dense, masks, epochs=self.recipe.tune_epochs)
        for parameter in norm_weights(self.model, self.layers):
            parameter.data = parameter.data.to(self.lm.dtype).float()  # as they will be stored
        span = min(len(self.objective.tokens), len(divergence))
        first, last = (sum(part) / span for part in (divergence[:span], divergence[-span:]))
        log.info(
            "tuning: divergence from the original %.4f nats a token in the first pass, %.4f in the last", first, last
        )
        self.tuning = {"epochs": self.recipe.tune_epochs, "divergence": divergence}
        return tuned

    # pieces ---------------------------------------------------------------------------------------------------

    def _quantize(self, removed: Masks | None, label: str) -> Dense:
        with self._stage("quantize"):
            return self.quantizer.quantize(removed, label)

    def _scores(self, dense: Dense, masks: Masks, label: str) -> dict[str, Tensor]:
        """The metric of every weight for the step from w to w̃."""
        restored = self.quantizer.restored(dense, masks)
        path = self._integrate(restored, label) if self.metric.needs_path else None
        return {
            name: self.metric.score(
                Sensitivity.of(name, weight, restored[name] - weight, self.start, path, self.generator)
            )
            for name, weight in self.weights.items()
        }

    def _integrate(self, restored: Mapping[str, Tensor], label: str) -> pqi.PathIntegral:
        assert self.loss_original is not None
        integral = self.objective.integrate(
            restored,
            rule=self.recipe.quadrature,
            nodes=self.recipe.nodes,
            squares=self.metric.needs_squares or self.cache.enabled,
            cache=self.cache,
            label=f"integral ({label})",
        )
        loss = self.objective.loss(restored, f"actual loss ({label})")
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

    def _loss(self, dense: Dense, masks: Masks, label: str) -> float:
        return self.objective.loss(self.quantizer.restored(dense, masks), label)

    def _join(self, dense: Dense, masks: Masks) -> dict[str, QuantizedLayer]:
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
            "allocation": self.allocation,
            "refit": self.refit,
            "tuning": self.tuning,
        }
        if self.tokens is not None:
            assert self.loss_original is not None
            # the stored weights, rounding of the residual included
            stored = {name: layer.weight() for name, layer in layers.items()}
            with self._stage("final_loss"):
                loss = self.objective.loss(stored, "loss of the result")
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
