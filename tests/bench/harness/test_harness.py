"""The timer, on a clock that the test moves by hand: what it reports is known exactly."""

import itertools
import random

import pytest
import torch

from heterolora.bench.harness.timing import (
    BenchError,
    CpuStopwatch,
    Timing,
    cpu_threads,
    paired,
    quartiles,
)
from heterolora.errors import HeteroLoraError


class FakeClock:
    """Seconds that pass only when work is done; each call slows the next by `drift`."""

    def __init__(self, drift: float = 1.0) -> None:
        self.now = 100.0
        self.speed = 1.0
        self.drift = drift
        self.calls: list[str] = []

    def work(self, name: str, seconds: float):
        def variant() -> None:
            self.calls.append(name)
            self.now += seconds * self.speed
            self.speed *= self.drift

        return variant

    def stopwatch(self) -> CpuStopwatch:
        return CpuStopwatch(lambda: self.now, lambda: self.now * 10)


def test_ratio_times_and_wall_time_of_known_work():
    clock = FakeClock()
    variants = {"base": clock.work("base", 2e-3), "half": clock.work("half", 1e-3)}
    timing = paired(variants, rounds=5, warmup=2, baseline="base", stopwatch=clock.stopwatch())
    half = timing.summary("half")
    assert half.milliseconds == pytest.approx(1.0)
    assert half.wall_milliseconds == pytest.approx(10.0)
    assert (half.ratio, half.ratio_low, half.ratio_high) == pytest.approx((0.5, 0.5, 0.5))
    assert half.ratio_of_minima == pytest.approx(0.5)
    assert timing.summary("base", baseline="half").ratio == pytest.approx(2.0)
    assert timing.rounds == 5 and timing.clock == "process CPU time"


def test_order_is_reversed_every_round_after_the_warmup():
    clock = FakeClock()
    variants = {name: clock.work(name, 1e-3) for name in "abc"}
    paired(variants, rounds=3, warmup=1, baseline="a", stopwatch=clock.stopwatch())
    assert "".join(clock.calls) == "abc" + "abc" + "cba" + "abc"


def test_a_machine_that_slows_down_does_not_bias_the_ratio():
    # Three variants of equal work; each call is 1 % slower than the call before it.
    clock = FakeClock(drift=1.01)
    variants = {name: clock.work(name, 1e-3) for name in "abc"}
    timing = paired(variants, rounds=10, warmup=0, baseline="a", stopwatch=clock.stopwatch())
    last = timing.summary("c")
    # A fixed order would give 1.01 ** 2 in every round.
    assert last.ratio == pytest.approx(1.0, abs=1e-3)
    assert last.ratio_low == pytest.approx(1.01**-2) and last.ratio_high == pytest.approx(1.01**2)


def test_ratios_are_paired_within_a_round():
    # The second round ran at a tenth of the speed: unpaired medians would mix the two.
    timing = Timing(
        clock="process CPU time",
        baseline="a",
        seconds={"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 3.0]},
        wall_seconds={"a": [1.0, 10.0, 1.0], "b": [2.0, 20.0, 3.0]},
    )
    found = timing.summary("b")
    assert found.ratio == 2.0
    assert (found.ratio_low, found.ratio_high) == (2.0, 2.5)
    assert found.ratio_of_minima == 2.0


def test_quartiles_agree_with_torch():
    values = [random.Random(3).random() for _ in range(11)]
    for count in range(1, 12):
        want = torch.tensor(values[:count], dtype=torch.float64).quantile(
            torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        )
        assert quartiles(values[:count]) == pytest.approx(want.tolist())


def test_on_round_counts_the_timed_rounds():
    clock, seen = FakeClock(), []
    variants = {"a": clock.work("a", 1.0)}
    watch = clock.stopwatch()
    paired(variants, rounds=3, warmup=2, baseline="a", stopwatch=watch, on_round=seen.append)
    assert seen == [1, 2, 3]


def test_real_clocks_see_twice_the_work_as_slower():
    def work(times: int):
        return lambda: sum(itertools.repeat(1, times * 300_000))

    timing = paired({"one": work(1), "four": work(4)}, rounds=7, warmup=1, baseline="one")
    assert 2.0 < timing.summary("four").ratio < 8.0


def test_a_clock_too_coarse_for_the_work_is_refused():
    clock = FakeClock()
    variants = {"a": clock.work("a", 0.0), "b": clock.work("b", 1.0)}
    with pytest.raises(BenchError, match="too coarse to time 'a'"):
        paired(variants, rounds=2, warmup=0, baseline="a", stopwatch=clock.stopwatch())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rounds": 3, "warmup": 0, "baseline": "x"}, "baseline 'x' is not one of"),
        ({"rounds": 0, "warmup": 0, "baseline": "a"}, "rounds must be >= 1"),
        ({"rounds": 3, "warmup": -1, "baseline": "a"}, "warmup >= 0"),
    ],
)
def test_bad_requests(asked, message):
    with pytest.raises(BenchError, match=message) as caught:
        paired({"a": lambda: None}, **asked)
    assert isinstance(caught.value, HeteroLoraError)


def test_threads_are_set_and_restored_even_after_an_error():
    before = torch.get_num_threads()
    wanted = before + 1
    with pytest.raises(RuntimeError, match="inside"), cpu_threads(wanted):
        assert torch.get_num_threads() == wanted
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before
    with pytest.raises(BenchError, match="threads must be at least 1"), cpu_threads(0):
        pass
