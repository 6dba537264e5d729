"""Shares of a total, from values that are seen once."""

import pytest
import torch

from vllm_requant.offline.coverage import SHARES, Coverage


def test_curve_is_that_of_the_sorted_values() -> None:
    values = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).exp().square()
    values[:100] = 0.0
    coverage = Coverage()
    for part in values.split(7_001):
        coverage.add(part)
    largest = values.sort(descending=True).values.double().cumsum(0) / values.sum(dtype=torch.float64)
    for share, found in coverage.curve():
        assert found == pytest.approx(float(largest[round(share * len(values)) - 1]), rel=0.02), share
    assert [share for share, _ in coverage.curve()] == list(SHARES)
    assert coverage.curve()[-1][1] == pytest.approx(1.0)


def test_nothing_at_all_has_a_curve() -> None:
    coverage = Coverage()
    coverage.add(torch.zeros(10))
    assert {found for _, found in coverage.curve()} == {0.0}
