"""Where bits pay most: a width for every layer under a budget for all of them together.

Costs come from one path integral, which splits ΔF over the layers exactly; other widths are scaled by the error that
quantization to them makes in the layer's output. Both are our own choice.
"""

import heapq
from collections.abc import Mapping

__all__ = ["allocate", "lower_hull"]


def lower_hull(size: Mapping[int, float], cost: Mapping[int, float]) -> list[int]:
    """Options on the lower convex hull of cost over size, by rising size: those that some price of a bit would pick.

    Args:
        size, cost: by option.
    """
    hull: list[int] = []
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
    size: Mapping[str, Mapping[int, float]], cost: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
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
