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

from .progress import track

__all__ = [
    "QUADRATURES",
    "PathIntegral",
    "calibration_loss",
    "fisher_information",
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


def fisher_information(model: Any, layers: Mapping[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher information: ``Σ_s g_s²``, one gradient per sequence, in float32."""
    device = next(model.parameters()).device
    total = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    with _gradients_of(layers):
        for row in track(tokens, "Fisher information", total=len(tokens)):
            token_loss(model, row[None].to(device)).backward()
            for name, layer in layers.items():
                assert layer.weight.grad is not None
                total[name].addcmul_(layer.weight.grad, layer.weight.grad)
                layer.weight.grad = None
    return total


@dataclass(frozen=True)
class PathIntegral:
    """The integral of the gradient along w → w̃, with its displacement.

    Attributes:
        gradient: ``Σ_k a_k ∇F(w + t_k Δ)`` by layer, float32.
        delta: Δ by layer, float32.
    """

    gradient: dict[str, Tensor]
    delta: dict[str, Tensor]

    def score(self, name: str) -> Tensor:
        """PQI of every weight of a layer, non-negative."""
        return (self.gradient[name] * self.delta[name]).abs_()

    def predicted(self) -> dict[str, float]:
        """Signed share of ΔF of every layer; the sum predicts ΔF."""
        return {
            name: float(torch.dot(gradient.flatten().double(), self.delta[name].flatten().double()))
            for name, gradient in self.gradient.items()
        }


def integrate(
    model: Any,
    layers: Mapping[str, nn.Linear],
    quantized: Mapping[str, Tensor],
    tokens: Tensor,
    *,
    rule: str = "gauss",
    nodes: int = 4,
    label: str = "post-quantization integral",
) -> PathIntegral:
    """Integrate the gradient from the model's weights to ``quantized``.

    Args:
        model: holds the original weights w; they are restored afterwards.
        layers: what is moved.
        quantized: w̃ by layer, float32 ``[out_features, in_features]``.
        tokens: int64 ``[num_samples, seq_len]``.

    Returns:
        The path integral; costs ``nodes · num_samples`` forward and backward passes.
    """
    device = next(model.parameters()).device
    points, weights = quadrature(rule, nodes)
    original = {name: layer.weight.data for name, layer in layers.items()}
    delta = {name: quantized[name].to(device) - original[name] for name in layers}
    moving = {name: weight.clone() for name, weight in original.items()}
    steps = [(t, a, row) for t, a in zip(points, weights, strict=True) for row in tokens]
    with weights_replaced(layers, moving), _gradients_of(layers):
        placed = None
        for t, a, row in track(steps, label, total=len(steps)):
            if t != placed:
                for name, weight in moving.items():
                    torch.add(original[name], delta[name], alpha=t, out=weight)
                placed = t
            # autograd sums over nodes and sequences by itself
            (token_loss(model, row[None].to(device)) * (a / len(tokens))).backward()
        gradient = {}
        for name, layer in layers.items():
            assert layer.weight.grad is not None
            gradient[name] = layer.weight.grad
    return PathIntegral(gradient, delta)
