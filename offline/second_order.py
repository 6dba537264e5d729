"""What the gradient and the Hessian at the original weights say of a step: the estimates that PQI does without."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .pqi import Objective
from .progress import track

__all__ = ["Expansion", "expand"]


class Expansion(NamedTuple):
    """``⟨∇F, Δ⟩`` and ``½ ⟨Δ, H Δ⟩``, gradient and Hessian at the original weights."""

    first: float
    second: float


def expand(
    objective: Objective, end: Mapping[str, Tensor], groups: Sequence[Sequence[str]]
) -> tuple[list[Expansion], Expansion]:
    """Expand F around w, in float32, by Hessian-vector products.

    Args:
        objective: F, with the text as labels.
        end: w̃ by layer.
        groups: of layers that take their step together, disjoint.

    Returns:
        The terms of each group's step alone, and those of all steps at once.
    """
    number = {name: at for at, group in enumerate(groups) for name in group}
    start = {name: objective.layers[name].weight.data.float() for name in number}
    delta = {name: end[name].float() - weight for name, weight in start.items()}
    first, second, total = torch.zeros(len(groups)), torch.zeros(len(groups)), 0.0
    for tokens in track(objective.tokens, "Hessian-vector products", total=len(objective.tokens)):
        tokens = tokens.to(objective.device)
        # of the position on each group's way; what is differentiated twice is the loss by these few numbers
        t = torch.zeros(len(groups), device=objective.device, requires_grad=True)
        moved = {f"{name}.weight": start[name] + t[at] * delta[name] for name, at in number.items()}
        with sdpa_kernel(SDPBackend.MATH):  # the others can be differentiated once only
            logits = functional_call(objective.model, moved, (tokens[None],), {"use_cache": False}).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits.float(), tokens[1:])
            (slope,) = torch.autograd.grad(loss, t, create_graph=True)
            first += slope.detach().cpu()
            for at in range(len(groups)):
                (row,) = torch.autograd.grad(slope[at], t, retain_graph=True)
                second[at] += row[at].cpu()
                total += float(row.sum())
    count = len(objective.tokens)
    alone = [Expansion(float(a) / count, float(b) / count / 2) for a, b in zip(first, second, strict=True)]
    return alone, Expansion(float(first.sum()) / count, total / count / 2)
