"""The solver under several limits and a cut against enumeration."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterolora.search.step_time.solver import Item, solve_with_cut

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=80)
settings.load_profile("fixed")


def make_items(seed, count, choices, limits, *, empty=True, saving=0.0):
    """Random items whose base falls with every item further up, as a backward pass does."""
    draw = np.random.default_rng(seed)
    items = []
    for index in range(count):
        gains = draw.random(choices)
        costs = draw.random((choices, limits)) - saving
        if empty:
            gains[0], costs[0] = 0.0, 0.0
        base = np.array([0.0, *np.full(limits - 1, 0.3 * (count - index))])
        items.append(Item(gains, costs, costs * 0.8, base, empty))
    return items


def total(items, choices):
    """(gain, costs) by the rule of the cut, or None where nothing is adapted."""
    cut = next(
        (i for i, c in enumerate(choices) if not (items[i].empty and c == 0)),
        None,
    )
    if cut is None:
        return None
    cost = items[cut].base + items[cut].costs_at_cut[choices[cut]]
    gain = items[cut].gains[choices[cut]]
    for index in range(cut + 1, len(items)):
        cost = cost + items[index].costs[choices[index]]
        gain += items[index].gains[choices[index]]
    return gain, cost


def brute_force(items, limits):
    every = itertools.product(*(range(len(item.gains)) for item in items))
    found = [total(items, choices) for choices in every]
    return max((f[0] for f in found if f is not None and (f[1] <= limits).all()), default=None)


@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 5),
    choices=st.integers(2, 4),
    limits=st.lists(st.floats(0.2, 4.0), min_size=1, max_size=3),
    empty=st.booleans(),
    saving=st.sampled_from([0.0, 0.2]),
)
def test_equals_enumeration(seed, count, choices, limits, empty, saving):
    items = make_items(seed, count, choices, len(limits), empty=empty, saving=saving)
    limits = np.array(limits)
    best = brute_force(items, limits)
    found = solve_with_cut(items, limits)
    if best is None:
        assert found is None
        return
    assert found is not None and found.exact
    gain, cost = total(items, found.choices)
    assert gain == pytest.approx(found.gain) and found.gain == pytest.approx(best)
    assert (cost <= limits + 1e-12).all()
    assert found.bound == found.gain


@given(seed=st.integers(0, 10**6), limit=st.floats(1.0, 4.0), states=st.sampled_from([4, 16, 64]))
def test_with_few_states_the_optimum_lies_between_gain_and_bound(seed, limit, states):
    items = make_items(seed, 5, 4, 2)
    limits = np.array([limit, limit + 1.0])
    best = brute_force(items, limits)
    found = solve_with_cut(items, limits, states=states)
    if found is None:
        # Thinning keeps the best of a cell, never none of it.
        assert best is None
        return
    gain, cost = total(items, found.choices)
    assert gain == pytest.approx(found.gain)
    assert (cost <= limits + 1e-12).all()
    assert found.gain <= best + 1e-12 <= found.bound + 2e-12


def test_thinning_loses_little_on_a_model_of_many_groups():
    """A linear program with two limits has a solution that mixes choices in two items at most, so
    the bound lies above the best allocation by at most what two items gain."""
    items = make_items(3, 32, 8, 2)
    base = [np.array([0.0, 0.1 * (32 - i)]) for i in range(32)]
    items = [
        Item(i.gains, i.costs, i.costs_at_cut, b, True) for i, b in zip(items, base, strict=True)
    ]
    found = solve_with_cut(items, np.array([8.0, 9.0]), states=1024)
    assert not found.exact
    assert found.bound - 2 * max(item.gains.max() for item in items) <= found.gain <= found.bound
    assert (total(items, found.choices)[1] <= [8.0, 9.0]).all()


def test_the_cut_trades_depth_against_breadth():
    """The lower item gains more, but only with a backward pass that leaves room for nothing."""
    rest = np.array([[0.0], [1.0]])
    lower = Item(np.array([0.0, 3.0]), rest, rest, np.array([8.0]), True)
    upper = [Item(np.array([0.0, 2.0]), rest, rest, np.array([1.0]), True) for _ in range(2)]
    assert solve_with_cut([lower, *upper], np.array([9.0])).choices == (0, 1, 1)
    assert solve_with_cut([lower, *upper], np.array([11.0])).choices == (1, 1, 1)
    assert solve_with_cut([lower, *upper], np.array([1.5])) is None


def test_items_that_must_be_adapted_are():
    rest = np.array([[1.0], [2.0]])
    fixed = Item(np.array([0.1, 0.2]), rest, rest, np.array([3.0]), False)
    free = Item(np.array([0.0, 5.0]), rest - 1.0, rest - 1.0, np.array([1.0]), True)
    found = solve_with_cut([fixed, free], np.array([5.0]))
    assert found.choices == (0, 1) and found.gain == pytest.approx(5.1)
    assert solve_with_cut([fixed, free], np.array([3.9])) is None
