"""Algorithm 2: step-wise detach of significant weights.

The ranking is global over all layers; that, like the metric being switchable, is our own choice.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from .lazy import LazyMapping, Positions
from .outliers import top_over_layers

__all__ = ["detach_step", "detach_steps"]


def detach_step(scores: Mapping[str, Tensor], detached: Positions, count: int) -> Positions:
    """Positions of the ``count`` largest scores that are not detached yet."""
    # −1 keeps what is detached already behind live weights of score 0
    live = LazyMapping(detached, lambda name: scores[name].masked_fill(detached[name], -1.0))
    return top_over_layers(live, count)


def detach_steps(
    measure: Callable[[Positions, int], Mapping[str, Tensor]],
    detached: Positions,
    budget: int,
    rounds: int,
) -> Positions:
    """Spend ``budget`` in ``rounds`` equal steps of β, measuring anew before each.

    Args:
        measure: non-negative scores by layer for the given positions and round; the caller knows the model.
        detached: what is at full precision already (the outliers).
        budget: weights to detach in all.
        rounds: r_s / β; the paper uses 2.

    Returns:
        Positions with the significant weights added.
    """
    for number in range(rounds):
        step = budget * (number + 1) // rounds - budget * number // rounds
        detached = detached | detach_step(measure(detached, number), detached, step)
    return detached
