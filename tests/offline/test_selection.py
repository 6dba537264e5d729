"""Algorithms 1 and 2: budgets are met exactly, ratios follow sensitivity, detaching never repeats."""

import pytest
import torch

from vllm_requant.offline.lazy import Positions
from vllm_requant.offline.outliers import (
    adaptive_counts,
    largest_magnitude,
    largest_range_reduction,
    random_positions,
    squeezellm_positions,
    top_over_layers,
)
from vllm_requant.offline.significant import detach_steps

NUMEL = {"a": 10_000, "b": 40_000, "c": 1_000}


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0, 1, 230, 5000])
def test_counts_meet_the_budget(tau: float, budget: int) -> None:
    counts = adaptive_counts({"a": 1e-8, "b": 1e-6, "c": 3e-7}, NUMEL, budget, tau)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[name] <= NUMEL[name] for name in NUMEL)


def test_tau_zero_is_uniform_and_tau_one_proportional() -> None:
    score = {"a": 2.0, "b": 1.0, "c": 3.0}
    uniform = adaptive_counts(score, NUMEL, 510, 0.0)
    assert uniform == {"a": 100, "b": 400, "c": 10}
    weighted = adaptive_counts(score, NUMEL, 630, 1.0)
    assert weighted == {"a": 200, "b": 400, "c": 30}


def test_no_layer_takes_more_than_eight_times_its_share() -> None:
    counts = adaptive_counts({"a": 1.0, "b": 1e-9, "c": 1e3}, NUMEL, 510, 1.0)
    assert counts["c"] == 80
    assert sum(counts.values()) == 510


def test_scores_of_zero_fall_back_to_even_shares() -> None:
    assert adaptive_counts({"a": 0.0, "b": 0.0, "c": 0.0}, NUMEL, 510, 1.0) == {"a": 100, "b": 400, "c": 10}


def test_largest_magnitude() -> None:
    weights = {"a": torch.tensor([[0.1, -5.0, 2.0], [3.0, 0.0, -0.2]])}
    mask = largest_magnitude(weights, {"a": 2})["a"]
    assert mask.tolist() == [[False, True, False], [True, False, False]]


def test_top_over_layers_is_a_global_ranking() -> None:
    torch.manual_seed(0)
    scores = {"a": torch.rand(20, 30), "b": torch.rand(50, 7) * 3, "c": torch.rand(4, 4)}
    masks = top_over_layers(scores, 100)
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.sort(descending=True).values[99]
    for name, score in scores.items():
        assert torch.equal(masks[name], score >= threshold)
    assert not any(mask.any() for mask in top_over_layers(scores, 0).values())


def test_random_positions_have_the_share_and_nest() -> None:
    weights = {"a": torch.zeros(100, 100), "b": torch.zeros(30, 50)}
    small, large = random_positions(weights, 0.01, 7), random_positions(weights, 0.02, 7)
    assert int(small["a"].sum()) == 100
    assert int(large["a"].sum()) == 200
    assert (large["a"] | ~small["a"]).all()
    assert not torch.equal(random_positions(weights, 0.01, 8)["a"], small["a"])


def test_squeezellm_positions_are_its_rule() -> None:
    torch.manual_seed(0)
    weights = {"a": torch.randn(100, 100), "b": torch.randn(50, 100) * 3}
    fisher = {name: torch.rand_like(weight) for name, weight in weights.items()}
    masks = squeezellm_positions(weights, fisher, 0.01, 0.002)
    assert sum(int(mask.sum()) for mask in masks.values()) == 150 + 20 + 10
    # each layer's most sensitive weights are in
    for name, mask in masks.items():
        count = round(0.002 * mask.numel())
        assert mask.flatten()[fisher[name].flatten().topk(count).indices].all()
    # a threshold in units of the interquartile range treats both layers alike, whatever their scale
    assert abs(masks["a"].float().mean() - masks["b"].float().mean()) < 0.004


def test_range_rule_removes_what_spans_the_group() -> None:
    weight = torch.full((2, 64), 0.1)
    weight[0, 3], weight[0, 40] = 5.0, -5.0  # one extreme in each group of row 0
    weight[1, 10], weight[1, 11], weight[1, 60] = 4.0, 4.0, 3.0  # two equal extremes must go together
    mask = largest_range_reduction({"a": weight}, {"a": 5}, 32)["a"]
    assert mask.nonzero().tolist() == [[0, 3], [0, 40], [1, 10], [1, 11], [1, 60]]
    # a row with the same largest weights everywhere gains nothing from losing one
    even = torch.cat([weight[:1], torch.full((1, 64), 6.0)])
    assert largest_range_reduction({"a": even}, {"a": 2}, 32)["a"].nonzero().tolist() == [[0, 3], [0, 40]]
    assert largest_magnitude({"a": even}, {"a": 2})["a"][1].sum() == 2


def test_detach_spends_the_budget_once_each_and_measures_anew() -> None:
    torch.manual_seed(0)
    scores = [{"a": torch.rand(20, 20), "b": torch.rand(10, 30)} for _ in range(3)]
    outlier = Positions({"a": torch.arange(400).view(20, 20) < 5, "b": torch.zeros(10, 30, dtype=torch.bool)})
    seen = []

    def measure(masks: Positions, number: int) -> dict[str, torch.Tensor]:
        seen.append(masks)
        return scores[number]

    masks = detach_steps(measure, outlier, 100, 3)
    counts = [sum(step.counts.values()) for step in [*seen, masks]]
    assert counts == [5, 38, 71, 105]
    assert (masks["a"] | ~outlier["a"]).all()
    # the first round's choice is the top of the first scores over both layers, outliers apart
    flat = torch.cat([scores[0][name].masked_fill(outlier[name], -1).flatten() for name in outlier])
    chosen = torch.cat([(seen[1][name] & ~outlier[name]).flatten() for name in outlier])
    assert flat[chosen].min() >= flat[~chosen].max()
    assert not outlier["b"].any(), "the caller's positions are not changed"
