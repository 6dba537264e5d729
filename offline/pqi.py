"""The post-quantization integral (arXiv 2503.01901): what each weight's quantization costs, along the whole path.

With F the mean token cross-entropy on the calibration set and Δ = w̃ − w,

    ΔF = ∫₀¹ ⟨∇F(w + tΔ), Δ⟩ dt ≈ Σ_k a_k ⟨∇F(w + t_k Δ), Δ⟩
    PQI_i = | Δ_i · Σ_k a_k ∂F/∂w_i (w + t_k Δ) |

The gradient is averaged over the set before the absolute value is taken. Gauss–Legendre nodes are our own choice;
the paper uses 32 equally spaced points. So is the choice of labels: with the original model's predictions in the
place of the text's next tokens, F is the divergence from the original plus a constant, and the integral is free of
what the text's own surprise does to the gradient.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .cache import Snapshot, TensorCache, fingerprint, model_fingerprint
from .coverage import Coverage
from .lazy import LazyMapping
from .losses import divergence, sequence_loss
from .models import computing_in
from .path import LayerMoments, LayerSums, MovingLayer, moving_layers, results
from .progress import track
from .ranks import current_ranks

__all__ = [
    "LABELS",
    "QUADRATURES",
    "Breakdown",
    "GradientMoments",
    "Objective",
    "PathIntegral",
    "element_pqi",
    "quadrature",
    "signed_share",
]

LABELS = ("text", "model")
Kept = Mapping[str, Mapping[str, Tensor]]
"""Tensors of every layer, by what they are"""
QUADRATURES = ("gauss", "midpoint", "uniform")
_KEPT_BYTES = 2**30  # of the original's predictions, which every loss and every walk of a path asks for


def quadrature(rule: str, nodes: int) -> tuple[list[float], list[float]]:
    """Nodes ``t_k`` in [0, 1] and weights ``a_k`` that sum to 1.

    Args:
        rule: "gauss" (Gauss–Legendre, exact for polynomials of degree ``2·nodes − 1``), "midpoint", or "uniform"
            (the plain mean at equally spaced points including both ends, as in the paper's table 3).
        nodes: gradient evaluations, at least 1 ("uniform": 2).
    """
    if rule == "gauss":
        points, weights = np.polynomial.legendre.leggauss(nodes)
        return ((points + 1) / 2).tolist(), (weights / 2).tolist()
    if rule == "midpoint":
        return [(k + 0.5) / nodes for k in range(nodes)], [1 / nodes] * nodes
    if rule == "uniform":
        if nodes < 2:
            raise ValueError("the uniform rule includes both ends and needs at least 2 nodes")
        return [k / (nodes - 1) for k in range(nodes)], [1 / nodes] * nodes
    raise ValueError(f"unknown quadrature {rule!r}; choose one of {', '.join(QUADRATURES)}")


@dataclass(frozen=True)
class GradientMoments:
    """Moments over the calibration sequences of a gradient g_s of each sequence's loss; float32, by layer.

    Attributes:
        gradient: ``mean_s g_s``.
        square: ``mean_s g_s²``, or empty if it was not asked for. At the original weights this is the diagonal of the
            empirical Fisher information.
    """

    gradient: Mapping[str, Tensor]
    square: Mapping[str, Tensor]

    @classmethod
    def of(cls, kept: Kept) -> "GradientMoments":
        """From what is kept of every layer; other tensors are left alone."""

        def part(name: str) -> Mapping[str, Tensor]:
            if isinstance(kept, LazyMapping):
                return LazyMapping(kept, lambda layer: kept[layer][name])
            return {layer: tensors[name] for layer, tensors in kept.items() if name in tensors}

        return cls(part("gradient"), part("square"))


def signed_share(gradient: Tensor, delta: Tensor) -> float:
    """``⟨gradient, delta⟩`` in float64: what one layer adds to ΔF if the gradient is averaged along its path."""
    return float(torch.dot(gradient.flatten().double(), delta.to(gradient.device).flatten().double()))


def element_pqi(gradient: Tensor, delta: Tensor) -> Tensor:
    """PQI of every weight of a layer, from the path-averaged gradient and w̃ − w."""
    return (delta * gradient).abs_()


class Breakdown(NamedTuple):
    """A path integral in figures.

    Attributes:
        predicted: signed share of ΔF, by layer; the sum predicts ΔF.
        pqi: sum of PQI over the weights, by layer.
        coverage: shares of all weights, those of largest PQI, and the share of all PQI that they hold.
    """

    predicted: dict[str, float]
    pqi: dict[str, float]
    coverage: list[tuple[float, float]]


@dataclass(frozen=True)
class PathIntegral:
    """The gradient along the path w → w̃.

    Attributes:
        start, end: w and w̃ by layer.
        moments: of the path-averaged gradient of each sequence, ``ḡ_s = Σ_k a_k ∇F_s(w + t_k Δ)``.
    """

    start: Mapping[str, Tensor]
    end: Mapping[str, Tensor]
    moments: GradientMoments

    def predicted(self) -> dict[str, float]:
        """Signed share of ΔF of every layer; the sum predicts ΔF."""
        return {name: signed_share(gradient, delta) for name, gradient, delta in self._steps()}

    def breakdown(self) -> "Breakdown":
        """What every layer and the most sensitive weights contribute, one layer in memory at a time."""
        predicted, total, coverage = {}, {}, Coverage()
        for name, gradient, delta in self._steps():
            predicted[name] = signed_share(gradient, delta)
            elements = element_pqi(gradient.to(delta.device), delta)
            total[name] = float(elements.sum(dtype=torch.float64))
            coverage.add(elements)
        return Breakdown(predicted, total, coverage.curve())

    def _steps(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, path-averaged gradient and w̃ − w of every layer."""
        for name, start in self.start.items():
            yield name, self.moments.gradient[name], self.end[name].float() - start.float()


@dataclass(frozen=True)
class Objective:
    """F: the mean over calibration sequences of a mean over tokens, in nats.

    Attributes:
        model: holds the original weights w, which no method changes.
        layers: the layers whose weights F is looked at as a function of.
        tokens: int64 ``[num_samples, seq_len]``.
        labels: "text": F is the cross-entropy of the next token, as in the paper; "model": the Kullback–Leibler
            divergence of the predictions from those at w, which is 0 at w. Gradients at w are always the text's.
        compute: "float32", or "bfloat16" for mixed precision, about twice as fast and half the activations; F itself
            is then the loss in that precision, for the gradients and for the actual ΔF alike.
        checkpointing: keep the activations of block borders only and compute the others again.
        originals: parameters outside the layers that something has changed or will change, and what they are when the
            original predicts.
        lazy: leave what is computed of every layer on the disk, and read it when it is asked for.
        accumulate_on: device of the accumulated gradients; None for the model's. "cpu" frees the memory of a GPU.
    """

    model: Any
    layers: Mapping[str, nn.Linear]
    tokens: Tensor
    labels: str = "text"
    compute: str = "float32"
    checkpointing: bool = False
    accumulate_on: torch.device | str | None = None
    lazy: bool = False
    originals: tuple[tuple[nn.Parameter, Tensor], ...] = ()
    _logits: dict[bytes, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def accumulators(self) -> torch.device:
        """Where gradients are accumulated."""
        return torch.device(self.accumulate_on or self.device)

    @property
    def _rows(self) -> Tensor:
        """The sequences of this process."""
        rows: Tensor = current_ranks().mine(self.tokens)
        return rows

    @property
    def start(self) -> dict[str, Tensor]:
        """w by layer."""
        return {name: layer.weight.data for name, layer in self.layers.items()}

    def loss(
        self,
        weights: Mapping[str, Tensor] | None = None,
        *,
        cache: TensorCache | None = None,
        label: str = "calibration loss",
    ) -> float:
        """F at the given weights, or at w."""
        if weights is None and self.labels == "model":
            return 0.0
        return (cache or TensorCache()).number(
            "loss",
            lambda: self.fingerprint(at=None if weights is None else fingerprint(weights), labels=self.labels),
            lambda: float(np.mean(self._losses(weights or self.start, label))),
            together=True,
        )

    def good_sequences(self, *, cache: TensorCache | None = None) -> Tensor:
        """Bool ``[num_samples]``: sequences of which the original makes a finite loss of the text."""
        text = replace(self, labels="text")
        return (cache or TensorCache()).resume(
            "good_sequences",
            self.fingerprint,
            torch.device("cpu"),
            lambda _: {"good": torch.tensor(text._losses(self.start, "losses of the sequences")).isfinite()},
            together=True,
        )["good"]

    def _losses(self, weights: Mapping[str, Tensor], label: str) -> list[float]:
        """The loss of every sequence."""
        losses = []
        with torch.no_grad(), moving_layers(self.layers, weights) as states:
            for row in track(self._rows, label, total=len(self._rows), tokens_per_item=self.tokens.shape[1]):
                teacher = self._labels(row, states)
                for state in states.values():
                    state.t = 1.0
                losses.append(float(self._sequence_loss(row, teacher)))
        return current_ranks().whole(losses, len(self.tokens))

    def gradients(
        self, *, cache: TensorCache | None = None, label: str = "gradients of the original"
    ) -> GradientMoments:
        """First and second moments of the gradient at w: one forward and backward pass a sequence."""
        return GradientMoments.of(self.walk_start("gradients", None, cache=cache, label=label))

    def walk_start(
        self, stage: str, sums: Callable[[str], LayerSums] | None, *, cache: TensorCache | None, label: str
    ) -> Kept:
        """The passes of :meth:`gradients`, and what else is to be added up in them.

        Args:
            stage: names the results in the cache.
            sums: makes what looks at a layer's inputs and the gradients of its outputs.

        Returns:
            By layer "gradient", "square", and what the sums result in.
        """
        # against the model's own predictions all gradients would be zero
        text = replace(self, labels="text")
        return text._kept(stage, text.start, [(0.0, 1.0)], squares=True, sums=sums, cache=cache, label=label)

    def fingerprint(self, **settings: object) -> str:
        """Of all that a result at w depends on."""
        originals = {str(number): data for number, (_, data) in enumerate(self.originals)}
        model = model_fingerprint(self.model)
        return fingerprint(originals, self.tokens, model=model, compute=self.compute, **settings)

    def integrate(
        self,
        end: Mapping[str, Tensor],
        *,
        rule: str = "gauss",
        nodes: int = 4,
        squares: bool = False,
        cache: TensorCache | None = None,
        label: str = "post-quantization integral",
    ) -> PathIntegral:
        """Integrate the gradient from w to ``end``.

        Args:
            end: w̃ by layer, ``[out_features, in_features]``.
            rule, nodes: of the quadrature.
            squares: also collect second moments.
            cache: where results are kept.

        Returns:
            The path integral; costs ``nodes · num_samples`` forward and backward passes.
        """
        path = list(zip(*quadrature(rule, nodes), strict=True))
        kept = self._kept("integral", end, path, squares=squares, sums=None, cache=cache, label=label)
        return PathIntegral(self.start, end, GradientMoments.of(kept))

    def _kept(
        self,
        stage: str,
        end: Mapping[str, Tensor],
        path: list[tuple[float, float]],
        *,
        squares: bool,
        sums: Callable[[str], LayerSums] | None,
        cache: TensorCache | None,
        label: str,
    ) -> Kept:
        """What is collected on a path, by layer."""

        @functools.cache
        def key() -> str:
            return self.fingerprint(
                end=fingerprint(end) if any(t for t, _ in path) else None,
                path=path,
                squares=squares,
                labels=self.labels,
                sums=sums is not None,
            )

        return (cache or TensorCache()).by_layer(
            stage,
            key,
            self.layers,
            self.accumulators,
            lambda missing, snapshot: self._collect(end, path, squares, sums, label, missing, snapshot),
            lazy=self.lazy,
        )

    def _collect(
        self,
        end: Mapping[str, Tensor],
        path: list[tuple[float, float]],
        squares: bool,
        sums: Callable[[str], LayerSums] | None,
        label: str,
        missing: Collection[str],
        snapshot: Snapshot,
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Walk the path with all sequences; everything of all layers is added up at the same time."""
        count, seq_len = self.tokens.shape
        rows = self._rows
        with moving_layers(self.layers, end) as states, self._training():
            layers = {
                name: LayerMoments(layer, count, squares, self.accumulators, sums and sums(name))
                for name, layer in states.items()
            }
            state = {f"{part}.{name}": t for name, layer in layers.items() for part, t in layer.state().items()}
            first = snapshot.restore(state)
            passes = (len(rows) - first) * len(path)
            ticks = iter(track(range(passes), label, total=passes, tokens_per_item=seq_len))
            # each sequence walks the whole path before the next: its path-averaged gradient is what gets squared
            for number, row in enumerate(rows[first:], start=first):
                teacher = self._labels(row, states)
                for t, a in path:
                    next(ticks)
                    for layer in layers.values():
                        layer.at(t, a)
                    self._sequence_loss(row, teacher).backward()
                for layer in layers.values():
                    layer.end_sequence()
                snapshot.offer(number + 1, state)
            next(ticks, None)  # ends the bar
        yield from results(layers)

    def divergence(self, tokens: Tensor, teacher: Tensor) -> Tensor:
        """The Kullback–Leibler divergence of the model's predictions of a sequence from those of :meth:`teacher`."""
        return divergence(self._predict(tokens), teacher)

    @torch.no_grad()
    def teacher(self, tokens: Tensor, states: Mapping[str, MovingLayer]) -> Tensor:
        """The original's logits ``[seq_len − 1, vocabulary]``, the last token's left out; may leave the layers at w."""
        key = tokens.cpu().numpy().tobytes()
        logits = self._logits.get(key)
        if logits is None:
            logits = self._predict_original(tokens, states)
            if sum(kept.nbytes for kept in self._logits.values()) + logits.nbytes <= _KEPT_BYTES:
                self._logits[key] = logits
        return logits

    def _predict(self, tokens: Tensor) -> Tensor:
        """Logits for all but the first token of a sequence, in the type in which the model computes them."""
        tokens = tokens.to(self.device)
        with computing_in(self.compute, self.device):
            logits: Tensor = self.model(tokens[None]).logits[0, :-1]
        return logits

    def _predict_original(self, tokens: Tensor, states: Mapping[str, MovingLayer]) -> Tensor:
        for state in states.values():
            state.t = 0.0
        now = [parameter.data for parameter, _ in self.originals]
        for parameter, original in self.originals:
            parameter.data = original
        try:
            return self._predict(tokens)
        finally:
            for (parameter, _), data in zip(self.originals, now, strict=True):
                parameter.data = data

    def _labels(self, tokens: Tensor, states: Mapping[str, MovingLayer]) -> Tensor | None:
        return None if self.labels == "text" else self.teacher(tokens, states)

    def _sequence_loss(self, tokens: Tensor, teacher: Tensor | None) -> Tensor:
        """F of one sequence, int64 ``[seq_len]``."""
        return sequence_loss(self._predict(tokens), tokens, teacher)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Turn activation checkpointing on for a block."""
        if not self.checkpointing:
            yield
            return
        # transformers checkpoints in training mode only, which changes nothing else in models without dropout
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model.train()
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()
            self.model.eval()
