"""Algorithm 2: step-wise detach of significant weights.

The ranking is global over all layers; that, like the metric being switchable, is our own choice.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from .outliers import top_over_layers

__all__ = ["detach_step", "detach_steps"]

Masks = dict[str, Tensor]


def detach_step(scores: Mapping[str, Tensor], detached: Mapping[str, Tensor], count: int) -> Masks:
    """Positions of the ``count`` largest scores that are not detached yet, as bool masks."""
    # −1 keeps what is detached already behind live weights of score 0
    return top_over_layers({name: scores[name].masked_fill(mask, -1.0) for name, mask in detached.items()}, count)


def detach_steps(
    measure: Callable[[Masks, int], Mapping[str, Tensor]],
    detached: Mapping[str, Tensor],
    budget: int,
    rounds: int,
) -> Masks:
    """Spend ``budget`` in ``rounds`` equal steps of β, measuring anew before each.

    Args:
        measure: non-negative scores by layer for the given masks and round; the caller knows the model.
        detached: masks of what is at full precision already (the outliers).
        budget: weights to detach in all.
        rounds: r_s / β; the paper uses 2.

    Returns:
        Masks with the significant weights added.
    """
    masks = {name: mask.clone() for name, mask in detached.items()}
    for number in range(rounds):
        step = budget * (number + 1) // rounds - budget * number // rounds
        for name, chosen in detach_step(measure(masks, number), masks, step).items():
            masks[name] |= chosen
    return masks
