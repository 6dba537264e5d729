"""Weighted one-dimensional k-means of many rows at once.

Lloyd's iteration on sorted rows: a cluster is an interval, so with prefix sums an iteration costs
``k · log(columns)`` a row and the sort dominates. Starts are spread by the cube-root law that holds for optimal
scalar quantizers at high resolution (Panter and Dite 1951), plus quantiles, and the best result of each row is kept.
"""

import torch
from torch import Tensor

__all__ = ["assign", "kmeans_rows", "objective"]

_CHUNK_ELEMENTS = 1 << 22
_HISTOGRAM_BINS = 256


def kmeans_rows(values: Tensor, sample_weight: Tensor, clusters: int, *, iterations: int = 60) -> Tensor:
    """Centroids of every row, minimizing ``Σ_j sample_weight_j · (value_j − nearest centroid)²``.

    Args:
        values: float32 ``[rows, columns]``.
        sample_weight: same shape, non-negative. A row of zeros counts as a row of ones.
        clusters: centroids a row.
        iterations: Lloyd steps from every start.

    Returns:
        float32 ``[rows, clusters]``, ascending.
    """
    chunk = max(1, _CHUNK_ELEMENTS // values.shape[1])
    pairs = zip(values.split(chunk), sample_weight.split(chunk), strict=True)
    return torch.cat([_kmeans_chunk(v, w, clusters, iterations) for v, w in pairs])


def assign(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid: int64 ``[rows, columns]``; ``centroids`` ascending ``[rows, clusters]``."""
    borders = (centroids[:, 1:] + centroids[:, :-1]) / 2
    return torch.searchsorted(borders.contiguous(), values.contiguous())


def objective(values: Tensor, sample_weight: Tensor, centroids: Tensor) -> Tensor:
    """The k-means objective of every row: float64 ``[rows]``."""
    nearest = torch.gather(centroids.double(), 1, assign(values, centroids))
    return (sample_weight.double() * (values.double() - nearest) ** 2).sum(1)


def _kmeans_chunk(values: Tensor, sample_weight: Tensor, clusters: int, iterations: int) -> Tensor:
    empty = sample_weight.sum(1, keepdim=True) == 0
    sample_weight = torch.where(empty, torch.ones_like(sample_weight), sample_weight)
    ordered, order = values.sort(dim=1)
    weight = torch.gather(sample_weight, 1, order).double()
    mass = torch.nn.functional.pad(weight.cumsum(1), (1, 0))
    moment = torch.nn.functional.pad((weight * ordered).cumsum(1), (1, 0))

    best, best_gain = None, None
    for start in _starts(ordered, weight, clusters):
        centroids = start
        for _ in range(iterations):
            cut = _cuts(ordered, centroids)
            cluster_mass = torch.gather(mass, 1, cut).diff(dim=1)
            cluster_moment = torch.gather(moment, 1, cut).diff(dim=1)
            # an empty cluster stays where it is and may catch points in a later step
            moved = torch.where(cluster_mass > 0, cluster_moment / cluster_mass.clamp(min=1e-300), centroids)
            moved = moved.sort(dim=1).values
            if torch.equal(moved, centroids):
                break
            centroids = moved
        # Σ w x² is the same for every start, so the largest Σ m²/M is the smallest objective
        cut = _cuts(ordered, centroids)
        cluster_mass = torch.gather(mass, 1, cut).diff(dim=1)
        cluster_moment = torch.gather(moment, 1, cut).diff(dim=1)
        gain = torch.where(cluster_mass > 0, cluster_moment**2 / cluster_mass.clamp(min=1e-300), 0.0).sum(1)
        if best is None or best_gain is None:
            best, best_gain = centroids, gain
        else:
            better = gain > best_gain
            best = torch.where(better[:, None], centroids, best)
            best_gain = torch.where(better, gain, best_gain)
    assert best is not None
    return best.float()


def _cuts(ordered: Tensor, centroids: Tensor) -> Tensor:
    """Borders of the clusters as positions in the sorted row: int64 ``[rows, clusters + 1]``."""
    borders = ((centroids[:, 1:] + centroids[:, :-1]) / 2).to(ordered.dtype).contiguous()
    inner = torch.searchsorted(ordered, borders)
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=ordered.shape[1])


def _starts(ordered: Tensor, weight: Tensor, clusters: int) -> list[Tensor]:
    """Initial centroids, float64 ``[rows, clusters]`` each."""
    rows, columns = ordered.shape
    # the range of what counts: points of weight zero must not stretch the histogram
    low = torch.where(weight > 0, ordered.double(), torch.inf).amin(1, keepdim=True)
    high = torch.where(weight > 0, ordered.double(), -torch.inf).amax(1, keepdim=True)
    width = (high - low).clamp(min=1e-30)
    place = ((ordered - low) / width * _HISTOGRAM_BINS).long().clamp(0, _HISTOGRAM_BINS - 1)
    histogram = torch.zeros(rows, _HISTOGRAM_BINS, dtype=torch.float64, device=ordered.device)
    histogram.scatter_add_(1, place, weight)
    centres = low + width * (torch.arange(_HISTOGRAM_BINS, device=ordered.device) + 0.5) / _HISTOGRAM_BINS
    targets = (torch.arange(clusters, dtype=torch.float64, device=ordered.device) + 0.5) / clusters
    starts = []
    for exponent in (1 / 3, 1 / 2, 1 / 5):
        density = (histogram / histogram.sum(1, keepdim=True)) ** exponent
        reach = density.cumsum(1)
        reach = reach / reach[:, -1:]
        bins = torch.searchsorted(reach.contiguous(), targets.expand(rows, clusters).contiguous())
        starts.append(torch.gather(centres, 1, bins.clamp(max=_HISTOGRAM_BINS - 1)))
    return starts
