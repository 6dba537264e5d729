"""The post-quantization integral (arXiv 2503.01901): what each weight's quantization costs, along the whole path.

With F the mean token cross-entropy on the calibration set and Δ = w̃ − w,

    ΔF = ∫₀¹ ⟨∇F(w + tΔ), Δ⟩ dt ≈ Σ_k a_k ⟨∇F(w + t_k Δ), Δ⟩
    PQI_i = | Δ_i · Σ_k a_k ∂F/∂w_i (w + t_k Δ) |

The gradient is averaged over the set before the absolute value is taken. Gauss–Legendre nodes are our own choice;
the paper uses 32 equally spaced points.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cache import MomentsCache, fingerprint
from .progress import track

__all__ = [
    "QUADRATURES",
    "GradientMoments",
    "PathIntegral",
    "calibration_loss",
    "gradient_moments",
    "integrate",
    "quadrature",
    "token_loss",
    "weights_replaced",
]

QUADRATURES = ("gauss", "midpoint", "uniform")


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


def token_loss(model: Any, tokens: Tensor) -> Tensor:
    """Mean next-token cross-entropy (nats) of one batch of sequences, int64 ``[batch, seq_len]``."""
    logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


@torch.no_grad()
def calibration_loss(model: Any, tokens: Tensor, label: str = "calibration loss") -> float:
    """F: mean over the sequences ``[num_samples, seq_len]`` of their mean token cross-entropy."""
    device = next(model.parameters()).device
    losses = [float(token_loss(model, row[None].to(device))) for row in track(tokens, label, total=len(tokens))]
    return float(np.mean(losses))


@contextmanager
def weights_replaced(layers: Mapping[str, nn.Linear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run a block with other weights in the layers; the previous ones come back afterwards."""
    saved = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = weights[name].to(saved[name].device)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = saved[name]


@contextmanager
def _gradients_of(layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Differentiate with respect to the weights of ``layers``, starting from and leaving no gradient."""
    for layer in layers.values():
        layer.weight.requires_grad_(True)
        layer.weight.grad = None
    try:
        yield
    finally:
        for layer in layers.values():
            layer.weight.requires_grad_(False)
            layer.weight.grad = None


@dataclass(frozen=True)
class GradientMoments:
    """Moments over the calibration sequences of a gradient g_s of each sequence's loss; float32, by layer.

    Attributes:
        gradient: ``mean_s g_s``.
        square: ``mean_s g_s²``, or empty if it was not asked for. At the original weights this is the diagonal of the
            empirical Fisher information.
    """

    gradient: dict[str, Tensor]
    square: dict[str, Tensor]

    @classmethod
    def zeros(cls, layers: Mapping[str, nn.Linear], *, squares: bool) -> "GradientMoments":
        gradient = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
        return cls(gradient, {name: torch.zeros_like(g) for name, g in gradient.items()} if squares else {})

    def flat(self) -> dict[str, Tensor]:
        """All tensors in one mapping, to be stored."""
        return {f"gradient.{n}": t for n, t in self.gradient.items()} | {
            f"square.{n}": t for n, t in self.square.items()
        }

    @classmethod
    def from_flat(cls, tensors: Mapping[str, Tensor]) -> "GradientMoments":
        """Inverse of :meth:`flat`."""
        parts: dict[str, dict[str, Tensor]] = {"gradient": {}, "square": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        return cls(**parts)

    def take(self, layers: Mapping[str, nn.Linear], share: float) -> None:
        """Add the gradients that the layers hold, weighted with ``share``, and clear them."""
        for name, layer in layers.items():
            grad = layer.weight.grad
            assert grad is not None
            if self.square:
                self.square[name].addcmul_(grad, grad, value=share)
            self.gradient[name].add_(grad, alpha=share)
            layer.weight.grad = None


def gradient_moments(model: Any, layers: Mapping[str, nn.Linear], tokens: Tensor) -> GradientMoments:
    """Moments of the gradient at the model's own weights: one forward and backward pass a sequence."""
    device = next(model.parameters()).device
    with _gradients_of(layers):
        moments = GradientMoments.zeros(layers, squares=True)
        for row in track(tokens, "gradients of the original", total=len(tokens)):
            token_loss(model, row[None].to(device)).backward()
            moments.take(layers, 1 / len(tokens))
    return moments


@dataclass(frozen=True)
class PathIntegral:
    """The gradient along the path w → w̃, with its displacement.

    Attributes:
        delta: Δ by layer, float32.
        moments: of the path-averaged gradient of each sequence, ``ḡ_s = Σ_k a_k ∇F_s(w + t_k Δ)``.
    """

    delta: dict[str, Tensor]
    moments: GradientMoments

    def predicted(self) -> dict[str, float]:
        """Signed share of ΔF of every layer; the sum predicts ΔF."""
        return {
            name: float(torch.dot(gradient.flatten().double(), self.delta[name].flatten().double()))
            for name, gradient in self.moments.gradient.items()
        }


def integrate(
    model: Any,
    layers: Mapping[str, nn.Linear],
    quantized: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    rule: str = "gauss",
    nodes: int = 4,
    squares: bool = False,
    cache: MomentsCache | None = None,
    label: str = "post-quantization integral",
) -> PathIntegral:
    """Integrate the gradient from the model's weights to ``quantized``.

    Args:
        model: holds the original weights w; they are restored afterwards.
        layers: what is moved.
        quantized: w̃ by layer, float32 ``[out_features, in_features]``.
        tokens: int64 ``[num_samples, seq_len]``.
        rule, nodes: of the quadrature.
        squares: also collect second moments.
        cache: where results are kept.

    Returns:
        The path integral; costs ``nodes · num_samples`` forward and backward passes.
    """
    device = next(model.parameters()).device
    path = list(zip(*quadrature(rule, nodes), strict=True))
    original = {name: layer.weight.data for name, layer in layers.items()}
    delta = {name: quantized[name].to(device) - original[name] for name in layers}
    moving = {name: weight.clone() for name, weight in original.items()}
    # a sequence walks the whole path before the next one starts: its path-averaged gradient is what gets squared
    steps = [(row, t, a) for row in tokens for t, a in path]

    def collect() -> dict[str, Tensor]:
        with weights_replaced(layers, moving), _gradients_of(layers):
            moments = GradientMoments.zeros(layers, squares=squares)
            for number, (row, t, a) in enumerate(track(steps, label, total=len(steps)), start=1):
                for name, weight in moving.items():
                    torch.add(original[name], delta[name], alpha=t, out=weight)
                # autograd sums over the nodes by itself
                (token_loss(model, row[None].to(device)) * a).backward()
                if number % len(path) == 0:
                    moments.take(layers, 1 / len(tokens))
        return moments.flat()

    def key() -> str:
        return fingerprint(model.state_dict(), delta, tokens, path=path, squares=squares)

    return PathIntegral(delta, GradientMoments.from_flat((cache or MomentsCache()).get(key, device, collect)))
