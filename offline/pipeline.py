"""The six steps of ReQuant (arXiv 2503.01901, section on the pipeline), from a loaded model to quantized layers.

1. pre-quantize with the base                     4. re-quantize with the outliers removed
2. algorithm 1: outlier ratio of every layer      5. algorithm 2: detach significant weights step by step
3. pick outliers inside each layer                6. dense + outliers + significant weights

With a target size a search takes the place of steps 1 to 5 (:mod:`.budget`). What follows either, refit and tuning,
is our own choice. Nothing here touches files.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vllm_requant.format import LayerSpec, QuantizedLayer
from vllm_requant.format.durable import write_safetensors

from . import incidents
from .bases import Awq, LayerData, Need, Rtn, relative_error
from .budget import BudgetSearch
from .cache import TensorCache, fingerprint, matrices_changed
from .calibration import CalibrationError
from .folding import Fold, apply_fold, find_folds
from .lazy import each
from .mapped import map_tensors
from .measurements import Measurements
from .models import CausalLM, find_layers, head_module
from .path import NOT_FINITE
from .plan import check_stream, tokens_to_refit, with_target
from .pqi import GradientMoments, Objective
from .progress import track
from .quantizer import Dense, LayerQuantizer, Masks
from .ranks import current_ranks
from .recipe import Recipe, RecipeError
from .selection import Search, Selection, Selector
from .stages import Stages
from .statistics import InputStatistics, guided_statistics, input_statistics
from .streaming import StreamedObjective, Walk
from .tuning import norm_weights, tune

__all__ = ["Conversion", "convert"]

log = logging.getLogger(__name__)
Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        layers: quantized layers by module name, the head last if it was asked for; made whenever one is asked for, if
            the model is larger than memory.
        specs: of the layers.
        report: what was measured on the way; becomes ``requant_report.json``.
        incidents: numerical trouble that was met, by kind; becomes part of the provenance.
    """

    layers: Mapping[str, QuantizedLayer]
    specs: dict[str, LayerSpec]
    report: dict[str, Any]
    incidents: list[dict[str, Any]] = field(default_factory=list)


def convert(
    lm: CausalLM, recipe: Recipe, tokens: Tensor | None, *, cache: TensorCache | None = None, low_memory: bool = False
) -> Conversion:
    """Convert a model.

    Args:
        lm: the model, on the device that is to do the work. A base that folds scales rescales it in place, which
            leaves what it computes unchanged up to rounding; tuning changes its norms; the weights of its layers are
            otherwise left as they are.
        recipe: what to do.
        tokens: int64 ``[num_samples, seq_len]``; None only if the recipe needs no calibration.
        cache: keeps all results that take long, so that a conversion that stopped goes on with them, and conversions
            that differ elsewhere share them.
        low_memory: compute activations twice instead of keeping them, and keep what is collected about weights and
            inputs in the memory of the host; for a model that a GPU just holds.
    """
    if lm.mapped:
        check_stream(lm.source, recipe, lm.device)
    if lm.mapped and (cache is None or not cache.enabled):
        raise ValueError("a model that stays in its files needs a cache for what is computed of it")
    if tokens is None and recipe.needs_calibration:
        raise ValueError("this recipe needs calibration tokens")
    return _Run(lm, with_target(lm.model, recipe.on(lm.device)), tokens, cache or TensorCache(), low_memory).convert()


@dataclass
class _Run:
    """State of one conversion."""

    lm: CausalLM
    recipe: Recipe
    tokens: Tensor | None
    cache: TensorCache
    low_memory: bool
    stages: Stages = field(default_factory=Stages)
    specs: dict[str, LayerSpec] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=lambda: {"refit": None, "tuning": None})

    def __post_init__(self) -> None:
        self.model = self.lm.model
        self.layers = find_layers(self.model)
        self.lazy = self.lm.mapped
        passes = self.lm.passes
        self.walk = None if passes == "whole" else Walk(self._scratch / "between", sharded=passes == "sharded")
        self.base = self.recipe.make_base()
        self.inputs: Mapping[str, InputStatistics] = {}
        self.objective: Objective | None = None
        if self.tokens is not None:
            apart = self.recipe.path_samples or None  # with None both slices hold everything
            kind = functools.partial(StreamedObjective, walk=self.walk) if self.walk else Objective
            self.objective = kind(
                self.model,
                self.layers,
                self.tokens[:apart],
                labels=self.recipe.labels,
                compute=self.recipe.compute,
                checkpointing=self.low_memory,
                accumulate_on="cpu" if self.low_memory else None,
                lazy=self.lazy,
            )
            self.tokens = self.tokens[apart:]  # what statistics and tuning see
        self.refits = self._refits()

    @property
    def _scratch(self) -> Path:
        """Of a model that is larger than memory, what lies between blocks and what is rescaled."""
        assert self.cache.folder is not None
        return self.cache.folder / "scratch"

    def convert(self) -> Conversion:
        with incidents.collecting() as found:
            layers = self._convert()
        everywhere = {incident for own in current_ranks().gather(found) for incident in own}
        self.report["incidents"] = incidents.describe(everywhere)
        return Conversion(layers, self.specs, self.report, incidents.summary(everywhere))

    def _convert(self) -> Mapping[str, QuantizedLayer]:
        loss_original = None
        if self.objective is not None:
            with self.stages.stage("original_loss"):
                loss_original = self._original_loss()
        start = self._measure()
        if self.objective is not None:
            # tuning changes the norms, and the fold of a base has done so before
            norms = tuple((p, p.data.clone()) for p in norm_weights(self.model, self.layers))
            self.objective = replace(self.objective, originals=norms)
        # after folding: from here on the rescaled weights are the original
        self.weights: dict[str, Tensor] = {name: layer.weight.data for name, layer in self.layers.items()}
        self.quantizer = LayerQuantizer(
            self.recipe,
            self.weights,
            self.inputs,
            start,
            self.cache,
            # the paper's algorithms look at the base's own errors, the search for a size at those that will remain
            refit_first=self.refits and self.recipe.has_target,
            lazy=self.lazy,
        )
        self.measurements = Measurements(self.recipe, self.objective, self.weights, start, self.cache, loss_original)
        selection = self._select()
        self.report |= selection.report
        dense, masks = selection.dense, selection.masks
        if self.refits:
            dense = self._refit(dense, masks)
        self.quantizer.forget()
        if self.recipe.tune_epochs:
            with self.stages.stage("tuning"):
                dense = self._tune(dense, masks)
        with self.stages.stage("residual"):
            layers = self._finished(dense, masks)
        if self.objective is not None:
            # the stored weights, rounding of the residual included
            dtype = torch.float32 if self.recipe.compute == "float32" else self.lm.dtype

            def digest(name: str) -> str:
                layer = layers[name]
                return fingerprint(layer.tensors, spec=layer.spec, dtype=dtype)

            stored = each(layers, lambda name: layers[name].weight().to(dtype), lazy=self.lazy, digest=digest)
            with self.stages.stage("final_loss"):
                loss = self.measurements.loss(stored, "result")
            if not math.isfinite(loss):
                raise RecipeError(
                    "the converted model's loss on the calibration set is not finite: its activations overflow; "
                    "try more --bits, another --base, or --compute float32"
                )
            self.report |= {
                "calibration_loss_original": loss_original,
                "calibration_loss": loss,
                "delta_loss": loss - (loss_original or 0.0),
            }
        self._add_layers(layers)
        if self.recipe.lm_head_bits < 16:
            with self.stages.stage("lm_head"):
                name, weight = head_module(self.model)
                spec, tensors = Rtn(self.recipe.lm_head_bits, self.recipe.group_size).quantize(
                    LayerData(weight.float())
                )
                head = QuantizedLayer(spec, tensors).to("cpu")
                self._add_layers({name: head}, weight)
                blocks = layers
                layers = each([*blocks, name], lambda asked: blocks.get(asked, head), lazy=self.lazy)
        self.report |= {"integrals": self.measurements.integrals, "stages": self.stages.report()}
        return layers

    def _finished(self, dense: Dense, masks: Masks) -> Mapping[str, QuantizedLayer]:
        """Dense and sparse parts together."""

        def build(name: str) -> QuantizedLayer:
            spec, tensors = dense[name]
            return QuantizedLayer.build(spec, tensors, weight=self.weights[name], mask=masks[name]).to("cpu")

        return each(dense, build, lazy=self.lazy)

    # what is measured before anything is quantized ------------------------------------------------------------

    def _original_loss(self) -> float:
        """F at w, on sequences of which the original makes something finite."""
        assert self.objective is not None
        # with the model's own predictions as labels it says nothing of the sequences
        text = replace(self.objective, labels="text").loss(cache=self.cache, label="loss of the original")
        if not math.isfinite(text):
            self.objective = self._without_bad_sequences(self.objective, 0)
        elif self.objective.labels == "text":
            return text
        return self.objective.loss(cache=self.cache, label="loss of the original")

    def _on_good_sequences(self, measure: Callable[[], Measured]) -> Measured:
        """What is measured on the sequences to which things are fitted; if it is not finite, without the bad ones."""
        with incidents.collecting() as found:
            measured = measure()
        if any(incident.trouble == NOT_FINITE for incident in found):
            assert self.tokens is not None
            before = len(self.tokens)
            self.tokens = self._without_bad_sequences(self._fitted, self.recipe.path_samples or 0).tokens
            if len(self.tokens) < before:
                return measure()
        incidents.remember(found)
        return measured

    def _without_bad_sequences(self, objective: Objective, first: int) -> Objective:
        """Leave out sequences of which the original's loss is not finite: they would be all that is left of a sum.

        Args:
            first: number of the objective's first sequence in the calibration set.
        """
        good = objective.good_sequences(cache=self.cache)
        for number in (~good).nonzero()[:, 0].tolist():
            where = f"calibration sequence {first + number}"
            incidents.note("the original's loss is not finite", "the sequence is left out", where=where)
        if not good.any():
            raise CalibrationError(
                "the original model's loss is not finite on any calibration sequence; give another "
                "--calibration-dataset, or --compute float32"
            )
        return replace(objective, tokens=objective.tokens[good])

    def _measure(self) -> GradientMoments | None:
        """Statistics of the inputs, the fold that a base asks for, and gradients at the original weights."""
        needs = self.base.needs | (self.base.refit_needs if self.refits else frozenset())
        start = None
        if Need.INPUTS in needs:
            with self.stages.stage("inputs"):
                start = self._on_good_sequences(self._measure_inputs)
        if isinstance(self.base, Awq):
            with self.stages.stage("fold"):
                self._fold(self.base)
            start = None  # gradients are those of other weights now
        if Need.FISHER not in needs and not self.recipe.needs_start:
            return None
        if start is None:
            with self.stages.stage("gradients"):
                start = self._on_good_sequences(lambda: self._fitted.gradients(cache=self.cache))
        return start

    @property
    def _fitted(self) -> Objective:
        """F on the sequences to which things are fitted."""
        assert self.objective is not None
        assert self.tokens is not None
        return replace(self.objective, tokens=self.tokens)

    def _measure_inputs(self) -> GradientMoments | None:
        """Statistics of the inputs, and the gradients if that takes a backward pass."""
        assert self.tokens is not None
        if self.recipe.hessian == "guided":
            start, self.inputs = guided_statistics(self._fitted, cache=self.cache)
            return start
        self.inputs = input_statistics(
            self.model,
            self.layers,
            self.tokens,
            compute=self.recipe.compute,
            accumulate_on=self._fitted.accumulators,
            cache=self.cache,
            walk=self.walk,
        )
        return None

    def _fold(self, base: Awq) -> None:
        inputs = self.inputs
        spread: dict[str, Tensor] = {}
        folds = list(find_folds(self.model))
        for fold in track(folds, "channel scales", total=len(folds)):
            seen = {name: inputs[name].to(layer.weight.device) for name, layer in fold.consumers.items()}
            scale = apply_fold(fold, self._fold_scale(base, fold, seen), self.lm.dtype)
            spread |= dict.fromkeys(fold.consumers, 1 / fold.spread(scale))
            if self.walk is not None:
                self._write_folded(fold)
                self.walk.forget()
        matrices_changed(self.model)

        def folded(name: str) -> InputStatistics:
            statistics = inputs[name]
            return statistics.scaled(spread[name].to(statistics.hessian.device)) if name in spread else statistics

        self.inputs = each(inputs, folded, lazy=self.lazy)

    def _write_folded(self, fold: Fold) -> None:
        """Rescaled weights are as large as the model, and go back to files."""
        names = {layer: name for name, layer in self.layers.items()}
        for module in (fold.producer, *fold.consumers.values()):
            if module in names:
                path = self._scratch / f"folded.{names[module]}.safetensors"
                if current_ranks().first:
                    write_safetensors(path, {"weight": module.weight.data})
                current_ranks().wait()
                module.weight = nn.Parameter(map_tensors(path)["weight"], requires_grad=False)

    def _fold_scale(self, base: Awq, fold: Fold, seen: Mapping[str, InputStatistics]) -> Tensor:
        weights = {name: layer.weight.data for name, layer in fold.consumers.items()}
        hessians = {name: each.hessian for name, each in seen.items()}
        magnitudes = {name: each.mean_abs for name, each in seen.items()}
        return self.cache.get(
            f"fold/{next(iter(weights))}",
            lambda: fingerprint(weights, hessians, magnitudes, **vars(base)),
            next(iter(weights.values())).device,
            lambda: {"scale": base.fold_scale(fold, seen)},
        )["scale"]

    # what is chosen -------------------------------------------------------------------------------------------

    def _select(self) -> Selection:
        search: type[Search] = Selector if self.recipe.target_bpw is None else BudgetSearch
        return search(self.recipe, self.quantizer, self.measurements, self.stages).select()

    def _refits(self) -> bool:
        """Whether to refit. Second moments from few tokens would fit the calibration set and nothing else."""
        if not self.recipe.refits or self.tokens is None:
            return False
        needed = tokens_to_refit(self.model, self.layers)
        if Need.INPUTS in self.base.refit_needs and self.tokens.numel() < needed:
            log.info("no refit: it takes %d calibration tokens, there are %d", needed, self.tokens.numel())
            return False
        return True

    def _refit(self, dense: Dense, masks: Masks) -> Dense:
        """Quantize anew around the sparse part. Its positions fit the errors of before, so the loss decides."""
        with self.stages.stage("refit"):
            refitted = self.quantizer.refit(dense, masks, "re-fitting around the sparse part")
        with self.stages.stage("refit_loss"):
            before, after = (
                self.measurements.loss(self.quantizer.restored(candidate, masks), f"{when} refit")
                for candidate, when in ((dense, "before"), (refitted, "after"))
            )
        log.info("refit: calibration loss %.5f before, %.5f after", before, after)
        self.report["refit"] = {
            "calibration_loss_before": before,
            "calibration_loss_after": after,
            "kept": after < before,
        }
        return refitted if after < before else dense

    def _tune(self, dense: Dense, masks: Masks) -> Dense:
        """Tune scales, tables and norms. Steps that are too large for a good model make it worse: the loss decides."""
        assert self.objective is not None
        before = self.measurements.loss(self.quantizer.restored(dense, masks), "before tuning")
        tuned, divergence = tune(self._fitted, dense, masks, epochs=self.recipe.tune_epochs, cache=self.cache)
        for parameter, _ in self.objective.originals:
            parameter.data.copy_(parameter.data.to(self.lm.dtype))  # as they will be stored
        after = self.measurements.loss(self.quantizer.restored(tuned, masks), "after tuning")
        kept = after < before
        if not kept:
            for parameter, original in self.objective.originals:
                parameter.data.copy_(original)
        log.info("tuning: calibration loss %.5f before, %.5f after", before, after)
        self.report["tuning"] = {
            "epochs": self.recipe.tune_epochs,
            "divergence": divergence,
            "calibration_loss_before": before,
            "calibration_loss_after": after,
            "kept": kept,
        }
        return tuned if kept else dense

    # the report -----------------------------------------------------------------------------------------------

    def _add_layers(self, layers: Mapping[str, QuantizedLayer], weight: Tensor | None = None) -> None:
        """Log layers and add them to the report; ``weight`` is the original of one that is not in a block."""
        entries = self.report.setdefault("layers", {})
        for name, layer in layers.items():
            spec = self.specs[name] = layer.spec
            original = self.weights[name] if weight is None else weight
            error = relative_error(layer.weight(), original.cpu().float())
            entries[name] = {"bits_per_weight": spec.bits_per_weight, "nnz": spec.nnz, "relative_error": error}
            log.info(
                "%-40s %-7s %d bit  nnz %-7d %.3f bits/weight  relative error %.4f",
                name,
                spec.kind,
                spec.bits,
                spec.nnz,
                spec.bits_per_weight,
                error,
            )
