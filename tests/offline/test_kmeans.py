"""The k-means is the exact optimum."""

import ckwrap
import numpy as np
import pytest
import torch

from vllm_requant.offline.bases.kmeans import assign, kmeans_rows, objective


@pytest.mark.parametrize("clusters", [2, 4, 8, 16])
def test_equals_an_exact_oracle(clusters: int) -> None:
    torch.manual_seed(clusters)
    values = torch.randn(12, 300)
    # as uneven as Fisher information
    weight = torch.randn(12, 300).pow(2) * torch.rand(1, 300).pow(4)
    ours = objective(values, weight, kmeans_rows(values, weight, clusters))
    for row in range(len(values)):
        exact = ckwrap.ckmeans(values[row].double().numpy(), clusters, weights=weight[row].double().numpy())
        centres = torch.tensor(np.sort(exact.centers), dtype=torch.float32)[None]
        oracle = objective(values[row : row + 1], weight[row : row + 1], centres)
        assert float(ours[row]) <= float(oracle) * (1 + 1e-5)


def test_does_not_depend_on_the_order_of_columns() -> None:
    torch.manual_seed(0)
    values, weight = torch.randn(4, 100), torch.rand(4, 100)
    order = torch.randperm(100)
    shuffled = kmeans_rows(values[:, order], weight[:, order], 8)
    torch.testing.assert_close(shuffled, kmeans_rows(values, weight, 8), rtol=1e-5, atol=1e-6)


def test_points_of_weight_zero_do_not_matter() -> None:
    torch.manual_seed(0)
    values, weight = torch.randn(3, 64), torch.rand(3, 64)
    expected = kmeans_rows(values, weight, 4)
    values = torch.cat([values, torch.full((3, 5), 1e4)], dim=1)
    weight = torch.cat([weight, torch.zeros(3, 5)], dim=1)
    assert torch.equal(kmeans_rows(values, weight, 4), expected)


def test_a_row_of_zero_weights_counts_as_ones() -> None:
    values = torch.randn(2, 50)
    assert torch.equal(
        kmeans_rows(values, torch.zeros_like(values), 4), kmeans_rows(values, torch.ones_like(values), 4)
    )


def test_fewer_points_than_clusters() -> None:
    values = torch.tensor([[3.0, 1.0, 1.0]])
    centroids = kmeans_rows(values, torch.ones_like(values), 8)
    assert float(objective(values, torch.ones_like(values), centroids)) == 0
    assert torch.equal(centroids, centroids.sort(dim=1).values)


def test_assign_picks_the_nearest() -> None:
    torch.manual_seed(0)
    values, centroids = torch.randn(5, 40), torch.randn(5, 8).sort(dim=1).values
    distance = (values[:, :, None] - centroids[:, None, :]).abs()
    chosen = torch.gather(distance, 2, assign(values, centroids)[:, :, None])[:, :, 0]
    torch.testing.assert_close(chosen, distance.amin(2))


def test_weights_of_any_range_give_finite_ascending_centroids() -> None:
    """Where small weights vanish beside large ones in double precision, an interval may seem to weigh nothing."""
    torch.manual_seed(0)
    values = torch.randn(50, 400)
    weight = 10.0 ** torch.randint(-30, 20, (50, 400))
    centroids = kmeans_rows(values, weight, 16)
    assert torch.isfinite(centroids).all()
    assert (centroids[:, 1:] >= centroids[:, :-1]).all()
    assert (centroids.amin(1) >= values.amin(1)).all() and (centroids.amax(1) <= values.amax(1)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_weights_are_refused(bad: float) -> None:
    weight = torch.ones(2, 8)
    weight[1, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        kmeans_rows(torch.randn(2, 8), weight, 4)
