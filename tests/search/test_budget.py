"""The knapsack against enumeration, and the properties an allocation must have."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heterolora.errors import BudgetError, DegenerateScoreError, ScoreError, SearchSpaceError
from heterolora.search.budget import Budget, log_gains, normalise, rank_options, solve
from heterolora.search.sites import Site

settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("fixed")


def make_sites(sizes):
    return [Site(f"layer.{i}", k, n) for i, (k, n) in enumerate(sizes)]


def spent(sites, ranks):
    return sum(site.unit_cost * rank for site, rank in zip(sites, ranks, strict=True))


def gain(weights, ranks):
    return sum(w * np.log2(1 + r) for w, r in zip(weights, ranks, strict=True))


def solved(sites, weights, ranks, budget, *, seed=0):
    return solve(sites, log_gains(weights, ranks), ranks, budget, seed=seed)


def brute_force(sites, weights, ranks, budget):
    """(most parameters within the budget, best gain among the allocations that use so many)."""
    best = (-1, -1.0)
    for choice in itertools.product(*(rank_options(site, ranks) for site in sites)):
        cost = spent(sites, choice)
        if cost <= budget:
            best = max(best, (cost, gain(weights, choice)))
    return best


sizes = st.lists(st.tuples(st.integers(8, 24), st.integers(8, 24)), min_size=1, max_size=4)
weight = st.floats(0.01, 1.0)
rank_lists = st.sampled_from([(0, 1, 2, 4), (0, 3), (1, 2, 5), (0, 2, 4, 8)])


@given(sizes=sizes, ranks=rank_lists, data=st.data())
def test_solve_equals_enumeration(sizes, ranks, data):
    sites = make_sites(sizes)
    weights = data.draw(st.lists(weight, min_size=len(sites), max_size=len(sites)))
    least = spent(sites, [ranks[0]] * len(sites)) or ranks[1] * min(s.unit_cost for s in sites)
    most = spent(sites, [ranks[-1]] * len(sites))
    budget = data.draw(st.integers(least, most + 10))
    chosen = solved(sites, weights, ranks, budget)
    cost, best = brute_force(sites, weights, ranks, budget)
    assert spent(sites, chosen) == cost
    assert gain(weights, chosen) == pytest.approx(best, rel=1e-8)


@given(sizes=sizes, rank=st.sampled_from([1, 2, 4, 8]), data=st.data())
def test_budget_by_rank_is_spent_to_the_last_parameter(sizes, rank, data):
    sites = make_sites(sizes)
    weights = data.draw(st.lists(weight, min_size=len(sites), max_size=len(sites)))
    budget = Budget(rank=rank).parameters(sites)
    assert spent(sites, solved(sites, weights, (0, 1, 2, 4, 8), budget)) == budget


@given(sizes=sizes, data=st.data(), seeds=st.tuples(st.integers(0, 99), st.integers(100, 199)))
def test_seed_changes_only_ties(sizes, data, seeds):
    sites = make_sites(sizes)
    weights = data.draw(
        st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=len(sites), max_size=len(sites))
    )
    first, second = (
        solved(sites, weights, (0, 1, 2, 4), sum(s.unit_cost for s in sites), seed=seed)
        for seed in seeds
    )
    assert spent(sites, first) == spent(sites, second)
    assert gain(weights, first) == pytest.approx(gain(weights, second), rel=3e-9)


@given(
    sizes=st.lists(st.tuples(st.integers(8, 24), st.integers(8, 24)), min_size=2, max_size=6),
    data=st.data(),
    factor=st.floats(1.1, 50),
)
def test_a_better_score_never_lowers_a_rank(sizes, data, factor):
    sites = make_sites(sizes)
    weights = data.draw(st.lists(weight, min_size=len(sites), max_size=len(sites)))
    index = data.draw(st.integers(0, len(sites) - 1))
    budget = 2 * sum(s.unit_cost for s in sites)
    before = solved(sites, weights, (0, 1, 2, 4, 8), budget)
    raised = [w * factor if i == index else w for i, w in enumerate(weights)]
    assert solved(sites, raised, (0, 1, 2, 4, 8), budget)[index] >= before[index]


@given(scale=st.floats(1e-200, 1e200))
def test_only_the_proportions_of_scores_matter(scale):
    sites = make_sites([(16, 16)] * 5)
    scores = {site.name: scale * (i + 1) for i, site in enumerate(sites)}
    weights = list(normalise(scores).values())
    assert solved(sites, weights, (0, 1, 2, 4, 8), 5 * 64) == solved(
        sites, [0.2, 0.4, 0.6, 0.8, 1.0], (0, 1, 2, 4, 8), 5 * 64
    )


def test_on_off_ranks_reduce_to_the_top_scores():
    sites = make_sites([(16, 16)] * 8)
    weights = [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.05, 0.6]
    chosen = solved(sites, weights, (0, 8), Budget(rank=2).parameters(sites))
    assert [i for i, rank in enumerate(chosen) if rank] == [1, 3]


def test_ties_are_a_different_and_repeatable_subset_for_every_seed():
    sites = make_sites([(16, 16)] * 8)
    budget = Budget(rank=2).parameters(sites)
    picks = [
        frozenset(np.flatnonzero(solved(sites, [1.0] * 8, (0, 8), budget, seed=seed)).tolist())
        for seed in range(200)
    ]
    assert all(len(pick) == 2 for pick in picks)
    assert picks[3] == frozenset(
        np.flatnonzero(solved(sites, [1.0] * 8, (0, 8), budget, seed=3)).tolist()
    )
    # 28 pairs are equally good; no module may be favoured: 50 expected, sd about 6.
    counts = [sum(i in pick for pick in picks) for i in range(8)]
    assert len(set(picks)) > 20
    assert min(counts) > 25 and max(counts) < 75


def test_zero_scores_are_filled_last_and_in_seeded_order():
    sites = make_sites([(16, 16)] * 6)
    weights = [0.0, 1e-6, 0.0, 1.0, 0.0, 0.0]
    picks = {
        tuple(np.flatnonzero(solved(sites, weights, (0, 4), 3 * 4 * 32, seed=seed)))
        for seed in range(40)
    }
    assert all({1, 3} < set(pick) for pick in picks)
    assert {(set(pick) - {1, 3}).pop() for pick in picks} == {0, 2, 4, 5}


def test_ranks_above_the_smaller_side_are_not_bought():
    assert rank_options(Site("x", 64, 3), (0, 1, 2, 4, 8)) == [0, 1, 2]
    assert rank_options(Site("x", 64, 2), (4, 8)) == [4]
    chosen = solved([Site("x", 64, 3), Site("y", 64, 64)], [1.0, 1e-3], (0, 2, 8), 10**6)
    assert chosen == [2, 8]


def test_llama_sized_search_takes_under_two_seconds():
    layer = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096)]
    layer += [(4096, 14336), (4096, 14336), (14336, 4096)]
    sites = make_sites(layer * 32)
    weights = np.random.default_rng(0).random(len(sites)).tolist()
    budget = Budget(rank=8).parameters(sites)
    start = time.process_time()
    chosen = solved(sites, weights, (0, 1, 2, 4, 8, 16, 32), budget)
    assert time.process_time() - start < 2
    assert len(sites) == 224 and budget // 1024 > 20_000
    assert spent(sites, chosen) == budget


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 8, "params": 100}, "exactly one"),
        ({"rank": 0}, r"rank=0\): expected a positive integer"),
        ({"params": -5}, r"params=-5\): expected a positive integer"),
        ({"rank": 2.5}, "positive integer"),
        ({"params": True}, "positive integer"),
        ({"rank": 10**9}, "largest rank is 65536"),
    ],
)
def test_malformed_budgets(arguments, message):
    with pytest.raises(BudgetError, match=message):
        Budget(**arguments)


def test_budgets_that_buy_nothing():
    sites = make_sites([(16, 16), (16, 48)])
    with pytest.raises(BudgetError, match=r"below one adapter .*32 parameters on 'layer.0'"):
        solved(sites, [1.0, 1.0], (0, 1, 2), 31)
    assert solved(sites, [1.0, 1.0], (0, 1, 2), 32) == [1, 0]
    with pytest.raises(BudgetError, match=r"192 parameters\); raise the budget or add rank 0"):
        solved(sites, [1.0, 1.0], (2, 4), 191)
    with pytest.raises(SearchSpaceError, match="add smaller ranks"):
        solved(sites, [1.0, 1.0], (0, 64), 10**6)


def test_a_table_that_would_not_fit_is_refused():
    sites = make_sites([*[(4096, 4096)] * 300, (4096, 1)])
    with pytest.raises(SearchSpaceError, match=r"search exactly; .*'layer.300', 4097 param"):
        solved(sites, [1.0] * len(sites), (0, 1, 2, 4, 8), 8 * 300 * 8192)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-9])
def test_unusable_scores_name_the_module(bad):
    with pytest.raises(ScoreError, match="'b'"):
        normalise({"a": 1.0, "b": bad})


def test_all_zero_scores_are_degenerate():
    with pytest.raises(DegenerateScoreError, match="every score is zero"):
        normalise({"a": 0.0, "b": 0.0})
