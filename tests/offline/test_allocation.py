"""The allocation fits its budget and no other of its kind is better."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_requant.offline.allocation import allocate, lower_hull, sparse_counts


def test_hull_drops_what_no_price_would_choose() -> None:
    size = {2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0}
    assert lower_hull(size, {2: 16.0, 3: 4.0, 4: 1.0, 5: 0.25}) == [2, 3, 4, 5]
    assert lower_hull(size, {2: 10.0, 3: 9.9, 4: 1.0, 5: 0.5}) == [2, 4, 5]
    assert lower_hull(size, {2: 1.0, 3: 2.0, 4: 3.0, 5: 0.5}) == [2, 5]
    assert lower_hull(size, {2: 1.0, 3: 2.0, 4: 3.0, 5: 1.0}) == [2]


def test_sensitive_layers_get_the_bits() -> None:
    size = {name: {bits: bits * 100.0 for bits in (2, 3, 4)} for name in "abc"}
    cost = {
        name: {bits: weight * 4.0**-bits for bits in (2, 3, 4)} for name, weight in zip("abc", (1, 5, 100), strict=True)
    }
    assert allocate(size, cost, 600) == {"a": 2, "b": 2, "c": 2}
    assert allocate(size, cost, 700) == {"a": 2, "b": 2, "c": 3}
    assert allocate(size, cost, 900) == {"a": 2, "b": 3, "c": 4}
    assert allocate(size, cost, 1e9) == {"a": 4, "b": 4, "c": 4}
    with pytest.raises(ValueError, match="600 bits, more than the 599"):
        allocate(size, cost, 599)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_near_the_best_of_all(data: st.DataObject) -> None:
    """Within one step of one layer of the optimum found by trying everything."""
    names = "abcd"[: data.draw(st.integers(1, 4))]
    number = st.floats(0.01, 10)
    size, cost = {}, {}
    for name in names:
        weights, slope = data.draw(st.integers(1, 9)), data.draw(number)
        size[name] = {bits: bits * float(weights) for bits in (2, 3, 4)}
        cost[name] = {bits: slope * data.draw(st.floats(0.9, 1.1)) * 4.0**-bits for bits in (2, 3, 4)}
    smallest = sum(options[2] for options in size.values())
    budget = smallest + data.draw(st.floats(0, 30))

    def total(table: dict[str, dict[int, float]], choice: dict[str, int]) -> float:
        return sum(table[name][option] for name, option in choice.items())

    chosen = allocate(size, cost, budget)
    assert total(size, chosen) <= budget + 1e-9
    everything = (dict(zip(names, options, strict=True)) for options in itertools.product((2, 3, 4), repeat=len(names)))
    best = min(total(cost, choice) for choice in everything if total(size, choice) <= budget + 1e-9)
    largest_step = max(cost[name][2] - cost[name][3] for name in names)
    assert total(cost, chosen) <= best + largest_step + 1e-12


def test_a_layer_pays_for_its_pointers_before_it_detaches() -> None:
    scores = {"a": torch.tensor([10.0, 9.0, 1.0]), "b": torch.tensor([5.0, 4.0]), "c": torch.tensor([])}
    fixed = {"a": 100.0, "b": 100.0, "c": 100.0}
    assert sparse_counts(scores, fixed, 32.0, 1e6) == {"a": 3, "b": 2, "c": 0}
    # both layers' pointers would leave room for one element only
    assert sparse_counts(scores, fixed, 32.0, 240.0) == {"a": 3, "b": 0, "c": 0}
    assert sparse_counts(scores, fixed, 32.0, 170.0) == {"a": 2, "b": 0, "c": 0}
    assert sparse_counts(scores, fixed, 32.0, 100.0) == {"a": 0, "b": 0, "c": 0}
    free = dict.fromkeys(scores, 0.0)
    assert sparse_counts(scores, free, 32.0, 96.0) == {"a": 2, "b": 1, "c": 0}
    assert sparse_counts(scores, free, 32.0, -5.0) == {"a": 0, "b": 0, "c": 0}
