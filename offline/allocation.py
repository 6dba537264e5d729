"""Where bits pay most: an option for every layer, and a number of sparse weights, under a budget for all layers."""

import heapq
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["allocate", "lower_hull", "sparse_counts"]

_HALVINGS = 60
Option = TypeVar("Option")


def lower_hull(size: Mapping[Option, float], cost: Mapping[Option, float]) -> list[Option]:
    """Options on the lower convex hull of cost over size, by rising size: those that some price of a bit would pick.

    Args:
        size, cost: by option.
    """
    hull: list[Option] = []
    for option in sorted(size, key=lambda o: (size[o], cost[o])):
        if hull and cost[option] >= cost[hull[-1]]:
            continue  # larger, and no better
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            kept = (cost[before] - cost[last]) * (size[option] - size[last])
            if kept > (cost[last] - cost[option]) * (size[last] - size[before]):
                break
            hull.pop()
        hull.append(option)
    return hull


def allocate(
    size: Mapping[str, Mapping[Option, float]], cost: Mapping[str, Mapping[Option, float]], budget: float
) -> dict[str, Option]:
    """Choose an option for every layer.

    Starting from the smallest, the step that lowers the cost most for its size is taken as long as it fits; what is
    left over goes to smaller steps. The result is optimal up to the last step that did not fit.

    Args:
        size: bits of every option of every layer.
        cost: what each option adds to the loss.
        budget: bits of all layers together.

    Raises:
        ValueError: even the smallest options exceed the budget.
    """
    hulls = {name: lower_hull(size[name], cost[name]) for name in size}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(size[name][option] for name, option in chosen.items())
    if left < 0:
        raise ValueError(f"the smallest options take {budget - left:.0f} bits, more than the {budget:.0f} allowed")
    steps: list[tuple[float, str, int]] = []

    def offer(name: str, at: int) -> None:
        if at + 1 < len(hulls[name]):
            now, then = hulls[name][at], hulls[name][at + 1]
            gain = (cost[name][now] - cost[name][then]) / (size[name][then] - size[name][now])
            heapq.heappush(steps, (-gain, name, at))

    for name in hulls:
        offer(name, 0)
    while steps:
        _, name, at = heapq.heappop(steps)
        now, then = hulls[name][at], hulls[name][at + 1]
        price = size[name][then] - size[name][now]
        if price <= left:
            left -= price
            chosen[name] = then
            offer(name, at + 1)
    return chosen


def sparse_counts(
    scores: Mapping[str, Tensor], fixed: Mapping[str, float], element: float, budget: float
) -> dict[str, int]:
    """How many weights of each layer to detach, when a layer that has any also pays for its row pointers.

    At a price of a bit, a layer detaches what is worth more than an element, provided that all of it is worth more
    than the pointers too; the price is the lowest that the budget allows. What is left over then, because the next
    layer's pointers did not fit, goes to the layers that have paid for theirs.

    Args:
        scores: the layer's largest scores in descending order, non-negative, float32 ``[candidates]``.
        fixed: bits that a layer takes as soon as it has one sparse element.
        element: bits of an element.
        budget: bits of all layers together.

    Returns:
        Counts by layer, at most the number of candidates; they fit the budget.
    """
    values = {name: score.double().cpu() for name, score in scores.items()}
    gains = {name: torch.cumsum(value, 0) for name, value in values.items()}

    def at(price: float) -> dict[str, int]:
        counts = {}
        for name, value in values.items():
            count = int((value > price * element).sum())
            worth = float(gains[name][count - 1]) - price * (fixed[name] + count * element) if count else 0.0
            counts[name] = count if worth > 0 else 0
        return counts

    def cost(counts: Mapping[str, int]) -> float:
        return sum(fixed[name] + count * element for name, count in counts.items() if count)

    low, high = 0.0, max((float(value[0]) for value in values.values() if len(value)), default=0.0) / element
    if cost(at(low)) <= budget:
        return at(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(at(middle)) <= budget else (middle, high)
    counts = at(high)
    kept = [name for name, count in counts.items() if count]
    rest = [values[name][counts[name] :] for name in kept]
    more = min(max(int((budget - cost(counts)) / element), 0), sum(len(value) for value in rest))
    if more:
        won = torch.zeros(sum(len(value) for value in rest), dtype=torch.bool)
        won[torch.topk(torch.cat(rest), more).indices] = True
        for name, part in zip(kept, won.split([len(value) for value in rest]), strict=True):
            counts[name] += int(part.sum())
    return counts
