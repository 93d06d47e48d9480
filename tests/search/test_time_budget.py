"""Budgets of time: what may be asked for, and that what is found is the best within both limits."""

import itertools

import pytest
import torch
from helpers import batch_for, build

from heterolora.errors import BudgetError, DegenerateScoreError
from heterolora.kernels.devices import CPU, device_for
from heterolora.search import Budget, DynamicSearchCallback, SearchSpace, allocate
from heterolora.search.budget import log_gains, normalise
from heterolora.search.sites import find_sites
from heterolora.search.step_time import spend
from heterolora.search.step_time.model import StepTime
from heterolora.search.step_time.spend import TimeBudget

TARGETS = ["query", "key", "value"]
RANKS = (0, 2, 8)


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def case(request):
    """(step, sites, scores) of a tiny BERT: two groups of three."""
    model = build("bert")
    sites = find_sites(model, TARGETS)
    device = CPU if request.param == "cpu" else device_for("NVIDIA H100 80GB HBM3")
    generator = torch.Generator().manual_seed(4)
    scores = {site.name: float(torch.rand((), generator=generator)) + 0.1 for site in sites}
    return StepTime.of(model, batch_for(model), sites, device=device), sites, scores


@pytest.fixture(scope="module")
def every(case):
    """All allocations: [(ranks, seconds of a step)]."""
    step, sites, _ = case
    choices = itertools.product(RANKS, repeat=len(sites))
    found = [{s.name: r for s, r in zip(sites, c, strict=True)} for c in choices if any(c)]
    return [(ranks, step.seconds(ranks)) for ranks in found]


def gain(scores, ranks):
    weights = normalise(scores)
    return sum(log_gains([weights[name]], [rank])[0][0] for name, rank in ranks.items())


def parameters(sites, ranks):
    return sum(site.unit_cost * ranks[site.name] for site in sites)


@pytest.mark.parametrize("share", [0.7, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("rank", [2, 8])
def test_equals_enumeration_within_both_limits(case, every, share, rank):
    step, sites, scores = case
    budget = Budget(step_time=share, rank=rank)
    try:
        ranks, timing = TimeBudget(budget, step, sites, RANKS).choose(scores)
    except BudgetError:
        ranks = None
    limit = share * step.seconds(step.uniform(rank))
    within = [
        gain(scores, found)
        for found, seconds in every
        if seconds <= limit * (1 + 1e-12) and parameters(sites, found) <= budget.parameters(sites)
    ]
    best = max(within, default=0.0)
    if ranks is None:
        assert best == 0.0
        return
    assert best > 0
    assert gain(scores, ranks) == pytest.approx(best, rel=1e-8)
    assert timing["step_time"] == pytest.approx(step.relative(ranks, rank))
    assert timing["step_time"] <= share * (1 + 1e-9) and timing["step_time_error"] is None
    assert parameters(sites, ranks) <= budget.parameters(sites)


def test_cut_into_parts_a_group_stays_within_the_limits(case, monkeypatch):
    monkeypatch.setattr(spend, "_MAX_OPTIONS", 9)
    step, sites, scores = case
    clock = TimeBudget(Budget(step_time=0.95), step, sites, RANKS)
    assert len(clock._parts) == 4
    ranks, timing = clock.choose(scores)
    assert timing["step_time"] <= 0.95 and any(ranks.values())


def test_what_cannot_be_met_says_what_could(case):
    step, sites, _ = case
    with pytest.raises(BudgetError, match=r"step_time=0.01 cannot be met: .* takes 0\.\d+ of one"):
        TimeBudget(Budget(step_time=0.01), step, sites, RANKS)
    with pytest.raises(BudgetError, match="or add rank 0 to the search space"):
        TimeBudget(Budget(step_time=0.5), step, sites, (2, 8))
    ranks, _ = TimeBudget(Budget(step_time=1.0), step, sites, (2, 8)).choose(
        {site.name: 1.0 for site in sites}
    )
    assert min(ranks.values()) >= 2


def test_nothing_is_bought_for_a_score_of_zero(case):
    step, sites, scores = case
    lowest = [site.name for site in sites[:3]]
    scores = {name: 0.0 if name in lowest else score for name, score in scores.items()}
    ranks, timing = TimeBudget(Budget(step_time=1.0), step, sites, RANKS).choose(scores)
    assert not any(ranks[name] for name in lowest) and timing["step_time"] < 1
    above = {name: float(name in lowest) for name in scores}
    share = step.relative({sites[-1].name: 2}, 8) + 1e-6
    with pytest.raises(BudgetError, match="no module of a score above 0"):
        TimeBudget(Budget(step_time=share), step, sites, RANKS).choose(above)
    with pytest.raises(DegenerateScoreError):
        TimeBudget(Budget(step_time=1.0), step, sites, RANKS).choose(dict.fromkeys(scores, 0.0))


def test_modules_that_no_step_calls_are_left_alone():
    model = build("bert")
    model.spare = torch.nn.Linear(8, 8)
    sites = find_sites(model, [*TARGETS, "spare"])
    step = StepTime.of(model, batch_for(model), sites)
    scores = {site.name: 1.0 for site in sites}
    ranks, _ = TimeBudget(Budget(step_time=1.0), step, sites, RANKS).choose(scores)
    assert ranks["spare"] == 0 and sum(ranks.values())


@pytest.mark.parametrize("measured", [False, True])
def test_allocate_keeps_what_it_promises(measured):
    model = build("bert")
    batch = batch_for(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budget = Budget(step_time=0.9, rank=4, measured=measured)
    found = allocate(model, [batch], budget=budget, space=SearchSpace(ranks=(0, 2, 4, 8)))
    assert 0 < found.step_time <= 0.9 and (found.step_time_error is None) != measured
    assert 0 < found.parameters <= found.budget_parameters
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    without = allocate(model, [batch], budget=Budget(rank=4))
    assert without.step_time is None and without.step_time_error is None


def test_rank_eight_is_meant_where_nothing_else_is_said():
    assert Budget(step_time=0.6) == Budget(rank=8, step_time=0.6)
    sites = find_sites(build("bert"), TARGETS)
    each = sum(site.unit_cost for site in sites)
    assert Budget(step_time=0.6).reference_rank(sites) == 8
    assert Budget(step_time=0.6, params=3 * each + 1).reference_rank(sites) == 3
    assert Budget(step_time=0.6, params=1).reference_rank(sites) == 1


@pytest.mark.parametrize("share", [0, -0.5, 1.5, 60, float("nan"), float("inf"), "0.6", True])
def test_malformed_shares_of_time(share):
    with pytest.raises(BudgetError, match=r"step_time=.*above 0 and at most 1"):
        Budget(step_time=share)


def test_budgets_that_contradict_themselves():
    with pytest.raises(BudgetError, match="exactly one"):
        Budget(step_time=0.6, rank=8, params=100)
    with pytest.raises(BudgetError, match="needs step_time"):
        Budget(rank=8, measured=True)
    space = SearchSpace(shortcuts=("in-attn",))
    with pytest.raises(BudgetError, match="step_time cannot price shortcuts"):
        allocate(build("bert"), [], budget=Budget(step_time=0.6), space=space)
    with pytest.raises(BudgetError, match="no dynamic search under step_time"):
        DynamicSearchCallback(Budget(step_time=0.6))
