"""Algorithm 1: which share of each layer's weights becomes outliers, and which weights those are.

The paper derives the ratio of a layer from the PQI of the pre-quantized model; the rule below is our own:
``r_l ∝ S_l^τ`` with S_l the mean PQI of the layer, clipped, scaled so that the budget is met exactly, τ chosen by
measurement. τ = 0 is the uniform ratio.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .bases.uniform import grouped
from .lazy import LazyMapping, Positions, small_indices

__all__ = [
    "TAUS",
    "adaptive_counts",
    "largest_magnitude",
    "largest_range_reduction",
    "random_positions",
    "squeezellm_positions",
    "top_over_layers",
]

TAUS = (0.0, 0.5, 1.0)
_MAX_REMOVED = 16  # outliers in one group at most, by the range rule
_OFFERS = 4  # times the winners are held while layers are ranked
_MAX_FACTOR = 8.0  # a layer gets at most this many times the overall ratio


def adaptive_counts(
    mean_score: Mapping[str, float], numel: Mapping[str, int], budget: int, tau: float
) -> dict[str, int]:
    """Outliers of each layer.

    Args:
        mean_score: S_l, the mean PQI of each layer.
        numel: weights of each layer.
        budget: outliers in all layers together.
        tau: exponent.

    Returns:
        Counts that sum to ``budget``, none above ``_MAX_FACTOR`` times the layer's even share.
    """
    total = sum(numel.values())
    if not 0 <= budget <= total:
        raise ValueError(f"a budget of {budget} outliers does not fit {total} weights")
    cap = {name: min(float(n), _MAX_FACTOR * budget * n / total) for name, n in numel.items()}
    wish = {name: max(mean_score[name], 0.0) ** tau * n for name, n in numel.items()}
    if not sum(wish.values()):
        wish = {name: float(n) for name, n in numel.items()}
    share: dict[str, float] = {}
    free, left = dict(wish), float(budget)
    # whoever would exceed the cap gets the cap; the rest is divided anew among the others
    while free:
        scale = left / sum(free.values()) if sum(free.values()) else 0.0
        over = [name for name, value in free.items() if value * scale > cap[name]]
        if not over:
            share |= {name: value * scale for name, value in free.items()}
            break
        for name in over:
            share[name] = cap[name]
            left -= cap[name]
            del free[name]
    return _round_to_sum(share, numel, budget)


def _round_to_sum(share: Mapping[str, float], numel: Mapping[str, int], budget: int) -> dict[str, int]:
    """Largest-remainder rounding."""
    counts = {name: min(int(value), numel[name]) for name, value in share.items()}
    by_remainder = sorted(share, key=lambda name: (counts[name] - share[name], name))
    missing = budget - sum(counts.values())
    while missing > 0:
        for name in by_remainder:
            if missing and counts[name] < numel[name]:
                counts[name] += 1
                missing -= 1
    return {name: counts[name] for name in numel}


def largest_magnitude(weights: Mapping[str, Tensor], counts: Mapping[str, int]) -> Positions:
    """Positions of the ``counts[name]`` largest ``|w|`` of every layer."""
    return Positions((name, _top(weight.abs(), counts[name])) for name, weight in weights.items())


def largest_range_reduction(
    weights: Mapping[str, Tensor], counts: Mapping[str, int], group_size: int | None
) -> Positions:
    """Positions whose removal shortens the range of their group most.

    The squared error of a group's grid grows with its squared range. Within a group the largest ``|w|`` go first; the
    gain of each is what it and the next ones save on average, so that two equal extremes are removed together.

    Args:
        weights: by layer.
        counts: positions to choose in each.
        group_size: columns that share a range; None for whole rows.
    """
    return Positions(
        (name, _top(_range_reduction(weight, group_size or weight.shape[1]), counts[name]))
        for name, weight in weights.items()
    )


def _range_reduction(weight: Tensor, group_size: int) -> Tensor:
    parts = grouped(weight.float(), group_size)
    depth = min(_MAX_REMOVED, group_size)
    order = parts.abs().topk(depth, dim=2).indices
    left, squared = parts.clone(), []
    for k in range(depth + 1):
        squared.append((left.amax(2).clamp(min=0) - left.amin(2).clamp(max=0)).square())
        if k < depth:
            left.scatter_(2, order[..., k : k + 1], 0.0)
    ranges = torch.stack(squared, dim=2)  # [rows, groups, depth + 1]
    gain = torch.zeros(*parts.shape[:2], depth, device=weight.device)
    for k in range(depth):
        steps = torch.arange(1, depth + 1 - k, device=weight.device)
        gain[..., k] = ((ranges[..., k : k + 1] - ranges[..., k + 1 :]) / steps).amax(2)
    # an element is not removed before the larger ones of its group
    gain = gain.cummin(2).values
    score = torch.zeros_like(parts).scatter_(2, order, gain)
    return score.flatten(1)[:, : weight.shape[1]].contiguous()


def random_positions(weights: Mapping[str, Tensor], share: float, seed: int) -> Positions:
    """The control: the same share of every layer, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    return Positions(
        (name, _top(torch.rand(weight.shape, generator=generator), round(share * weight.numel())).to(weight.device))
        for name, weight in weights.items()
    )


def squeezellm_positions(
    weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor], outliers: float, sensitive: float
) -> Positions:
    """SqueezeLLM's own sparse part, for comparison at equal size (arXiv 2306.07629, section 4.2).

    The ``sensitive`` share of each layer by Fisher information, and everything with
    ``|w| ≥ max(|Q1 − k·IQR|, |Q3 + k·IQR|)``, with one k for all layers, set so that ``outliers`` of all weights
    are found.
    """
    masks = Positions((name, _top(fisher[name], round(sensitive * w.numel()))) for name, w in weights.items())

    def score(name: str) -> Tensor:
        weight = weights[name]
        ordered = weight.flatten().float().sort().values
        q1, q3 = ordered[ordered.numel() // 4], ordered[ordered.numel() * 3 // 4]
        # the largest k for which the weight still counts as an outlier
        reach = (weight.abs() - torch.maximum(q3, -q1)) / (q3 - q1).clamp(min=1e-12)
        return reach.masked_fill(masks[name], -torch.inf)

    total = sum(weight.numel() for weight in weights.values())
    return masks | top_over_layers(LazyMapping(weights, score), round(outliers * total))


def top_over_layers(scores: Mapping[str, Tensor], count: int) -> Positions:
    """The ``count`` largest scores of all layers together; of equal ones, those of the first layers.

    Looks at each layer's scores once: it offers its own best ``count`` to the common ranking, of which no more than
    a few times ``count`` are held.
    """
    offers: dict[str, tuple[Tensor, Tensor]] = {}
    shapes: dict[str, torch.Size] = {}
    for name, score in scores.items():
        shapes[name] = score.shape
        values, indices = torch.topk(score.flatten(), min(count, score.numel()))
        offers[name] = values, small_indices(indices, score.shape)
        if sum(len(values) for values, _ in offers.values()) > _OFFERS * count:
            offers = _best_offers(offers, count)
    return Positions.of({name: (indices, shapes[name]) for name, (_, indices) in _best_offers(offers, count).items()})


def _best_offers(offers: Mapping[str, tuple[Tensor, Tensor]], count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The ``count`` largest values, and their indices, of all layers together."""
    values = torch.cat([values for values, _ in offers.values()])
    if len(values) <= count:
        return dict(offers)
    least = values.topk(count).values[-1] if count else values.new_tensor(torch.inf)
    room = count - int((values > least).sum())
    best = {}
    for name, (own, indices) in offers.items():
        equal = own == least
        won = (own > least) | (equal & (equal.cumsum(0) <= room))
        best[name] = own[won], indices[won]
        room -= int((equal & won).sum())
    return best


def _top(score: Tensor, count: int) -> Tensor:
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[torch.topk(score.flatten(), count).indices] = True
    return mask.view_as(score)
