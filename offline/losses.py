"""Losses of a sequence's predictions, a few positions at a time.

Predictions are as wide as the vocabulary: in float32 those of one sequence are often larger than all else that a pass
holds, and each step of a softmax over all of them at once goes through the memory again. Here a few positions go all
the way to their loss and its gradient before the next.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["cross_entropy", "divergence", "sequence_loss"]

_VALUES_AT_ONCE = 1 << 19  # on a CPU: what a core's cache holds
_VALUES_AT_ONCE_ELSEWHERE = 1 << 26


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy.

    Args:
        logits: ``[tokens, vocabulary]`` of any floating type.
        targets: int64 ``[tokens]``, the token that came.

    Returns:
        float32 scalar, in nats; differentiable once with respect to the logits.
    """
    loss: Tensor = _MeanLoss.apply(logits, targets)
    return loss


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Mean Kullback–Leibler divergence KL(reference ‖ predictions).

    Args:
        logits: ``[tokens, vocabulary]`` of any floating type.
        reference: logits of the reference, likewise; no gradient flows to it.

    Returns:
        float32 scalar, in nats; differentiable once with respect to the logits.
    """
    loss: Tensor = _MeanLoss.apply(logits, reference)
    return loss


def sequence_loss(logits: Tensor, tokens: Tensor, reference: Tensor | None) -> Tensor:
    """The loss of a sequence's predictions: from the text, or from a reference if there is one.

    Args:
        logits: ``[seq_len − 1, vocabulary]``, for all but the first token.
        tokens: int64 ``[seq_len]``, on any device.
        reference: logits of the reference, or None.
    """
    return cross_entropy(logits, tokens[1:].to(logits.device)) if reference is None else divergence(logits, reference)


class _MeanLoss(torch.autograd.Function):
    """What is expected of a token is another token, if the second argument has one dimension, or logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, expected: Tensor) -> Tensor:
        tokens, vocabulary = logits.shape
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        values = _VALUES_AT_ONCE if logits.device.type == "cpu" else _VALUES_AT_ONCE_ELSEWHERE
        at_once = max(1, values // vocabulary)
        for first in range(0, tokens, at_once):
            rows = slice(first, first + at_once)
            predicted = torch.log_softmax(logits[rows].float(), dim=-1)
            if expected.ndim == 1:
                came = expected[rows, None]
                total -= predicted.gather(1, came).sum(dtype=torch.float64)
                slope = predicted.exp_().scatter_add_(1, came, torch.full_like(predicted[:, :1], -1.0))
            else:
                wanted = torch.log_softmax(expected[rows].float(), dim=-1)
                probability = wanted.exp()
                total += wanted.sub_(predicted).mul_(probability).sum(dtype=torch.float64)
                slope = predicted.exp_().sub_(probability)
            if gradient is not None:
                gradient[rows] = slope.div_(tokens)
        ctx.gradient = gradient
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grad_outputs[0]), None
