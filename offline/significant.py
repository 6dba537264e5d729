"""Algorithm 2: step-wise detach of significant weights.

The ranking is global over all layers; that, like the metric being switchable, is our own choice.
"""

from collections.abc import Callable, Mapping

from torch import Tensor

from .outliers import top_over_layers
from .pqi import PathIntegral

__all__ = ["detach_step", "detach_steps"]


def detach_step(integral: PathIntegral, detached: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Positions of the ``count`` largest PQI that are not detached yet, as bool masks."""
    scores = {
        # a detached weight has Δ = 0 already; −1 also keeps it behind live weights of score 0
        name: integral.score(name).masked_fill_(mask.to(integral.delta[name].device), -1.0)
        for name, mask in detached.items()
    }
    return top_over_layers(scores, count)


def detach_steps(
    integrate: Callable[[dict[str, Tensor], int], PathIntegral],
    detached: Mapping[str, Tensor],
    budget: int,
    rounds: int,
) -> tuple[dict[str, Tensor], list[PathIntegral]]:
    """Spend ``budget`` in ``rounds`` equal steps of β, measuring anew before each.

    Args:
        integrate: path integral for the given masks and round; the caller knows the model.
        detached: masks of what is at full precision already (the outliers).
        budget: weights to detach in all.
        rounds: r_s / β; the paper uses 2.

    Returns:
        Masks with the significant weights added, and the path integral of every round.
    """
    masks = {name: mask.clone() for name, mask in detached.items()}
    integrals = []
    for number in range(rounds):
        step = budget * (number + 1) // rounds - budget * number // rounds
        integral = integrate(masks, number)
        integrals.append(integral)
        for name, chosen in detach_step(integral, masks, step).items():
            masks[name] |= chosen.to(masks[name].device)
    return masks, integrals
