"""The model of the step's time: its parts, devices, buckets, and the fit to measured steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import batch_for, build

from heterolora.errors import BudgetError
from heterolora.kernels.devices import CPU, device_for
from heterolora.search import SearchSpace, uniform
from heterolora.search.sites import find_sites
from heterolora.search.step_time import fit as step_fit
from heterolora.search.step_time.fit import calibrated, fit, samples
from heterolora.search.step_time.model import StepTime

H100 = device_for("NVIDIA H100 80GB HBM3")


def step_of(name="bert", device=CPU, **options):
    model = build(name)
    return StepTime.of(model, batch_for(model), find_sites(model), device=device, **options)


def test_depth_breadth_and_rank_cost_time():
    step = step_of()
    groups = [group.names for group in step.groups]
    top, upper, every = (
        {n: 8 for names in groups[start:] for n in names} for start in (-1, len(groups) // 2, 0)
    )
    assert step.seconds(top) < step.seconds(upper) < step.seconds(every)
    lowest = dict.fromkeys(groups[0], 8)
    assert step.seconds(top) < step.seconds(lowest) < step.seconds(every)
    assert step.seconds(step.uniform(1)) < step.seconds(step.uniform(32))
    assert step.relative(step.uniform(8), 8) == 1.0
    assert step.seconds({**top, groups[0][0]: 0}) == step.seconds(top)


def test_seconds_are_the_sum_of_the_base_down_to_the_cut_and_of_each_group():
    step = step_of("llama")
    ranks = {name: 4 for group in step.groups[2:] for name in group.names[:1]}
    total = step.base(2)
    for index, group in enumerate(step.groups):
        inside = tuple(ranks.get(name, 0) for name in group.names)
        total = total + step.extra(index, inside, at_cut=index == 2)
    assert step.cut(ranks) == 2
    assert step.seconds(ranks) == pytest.approx(total.max())
    assert step.parts(ranks).sum() == pytest.approx(step.seconds(ranks))


def test_the_input_gradient_of_the_lowest_group_is_saved():
    step = step_of()
    assert step.extra(1, (8,), at_cut=True).max() < step.extra(1, (8,), at_cut=False).max()


def test_no_input_gradient_is_saved_where_checkpointing_asks_for_it():
    model = build("bert")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = StepTime.of(model, batch_for(model), device=CPU)
    assert all(step.input_grad(i, at_cut=True) for i in range(len(step.groups)))
    assert (step.base(0) == step.base(len(step.groups) - 1)).all()
    plain = step_of()
    assert not any(plain.input_grad(i, at_cut=True) for i in range(len(plain.groups)))
    assert plain.input_grad(1, at_cut=False) and not plain.input_grad(0, at_cut=False)


def test_no_adapter_is_no_step():
    step = step_of()
    with pytest.raises(BudgetError, match="every rank is 0"):
        step.seconds(step.uniform(0))


def test_a_gpu_is_bound_by_its_host_unless_a_graph_launches():
    step, graphed = step_of(device=H100), step_of(device=H100, captured=True)
    device, host = step.base(0)
    # A tiny model: nothing but launches.
    assert host > device
    assert graphed.base(0) == pytest.approx([device])
    assert graphed.seconds(graphed.uniform(8)) < step.seconds(step.uniform(8))


def test_ranks_cost_what_their_bucket_costs():
    """Triton pads ranks to 16, 32, ...: between them only A and B themselves grow."""
    step = replace(step_of(device=H100, captured=True), paths=("triton",))
    problem = replace(step.groups[0].problem, m=8192, sources=(1024,), sites=(1024,) * 3)
    group = replace(step.groups[0], problem=problem)
    step = replace(step, trace=replace(step.trace, groups=(group,)))
    cost = {r: step.extra(0, (r, r, r), at_cut=False)[0] for r in (8, 15, 16, 17, 32)}
    assert cost[16] - cost[15] == pytest.approx((cost[16] - cost[8]) / 8, rel=0.2)
    assert cost[17] - cost[16] > 10 * (cost[16] - cost[15])


def test_a_group_costs_less_than_its_members_apart():
    step = replace(step_of(device=H100), paths=("triton",))
    together = step.extra(0, (8, 8, 8), at_cut=False)
    apart = sum(step.extra(0, tuple(np.eye(3, dtype=int)[i] * 8), at_cut=False) for i in range(3))
    assert (together < apart).all()


def test_the_fit_finds_the_factors_that_made_the_times():
    step = step_of()
    parts = np.array([step.parts(ranks) for ranks in samples(step, 8)])
    truth = np.array([1.5, 2.5, 0.0, 3.0])
    found = fit(parts, parts @ truth)
    assert found.factors == pytest.approx(tuple(truth), abs=1e-6)
    assert found.error < 1e-6 and found.steps == len(parts) >= 8
    noisy = fit(parts, parts @ truth * np.random.default_rng(0).uniform(0.9, 1.1, len(parts)))
    assert min(noisy.factors) >= 0.0 and 0.01 < noisy.error < 1.0
    fitted = replace(step, calibration=found)
    ranks = samples(step, 8)[2]
    assert fitted.seconds(ranks) == pytest.approx(step.parts(ranks) @ truth)
    assert fitted.extra(0, (8, 8, 8), at_cut=False).shape == (1,)


def test_samples_differ_and_tell_the_parts_apart():
    step = step_of()
    tried = samples(step, 8)
    assert all(a != b for i, a in enumerate(tried) for b in tried[:i])
    parts = np.array([step.parts(ranks) for ranks in tried])
    assert np.linalg.matrix_rank(parts / parts.max(axis=0)) == 4


def test_measured_steps_are_real_and_leave_the_model_alone(monkeypatch):
    model = build("bert")
    batch = batch_for(model)
    everywhere = uniform(model, 4, SearchSpace())
    seen = []
    timed = step_fit.timed_step

    def spy(probe, given, clock):
        adapted = [n for n, m in probe.get_base_model().named_modules() if hasattr(m, "lora_A")]
        seen.append(len(adapted))
        return timed(probe, given, clock)

    monkeypatch.setattr(step_fit, "timed_step", spy)
    step = StepTime.of(model, batch, find_sites(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = calibrated(step, model, batch, everywhere, rounds=2)
    expected = [len(ranks) for ranks in samples(step, 4)]
    assert seen == [*expected, *expected[::-1]]
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert fitted.calibration.steps == len(expected) and fitted.calibration.error > 0
    assert fitted.seconds(fitted.uniform(4)) > 0
