"""Interleaved, paired timing: the one way anything in this project is timed.

Two things make timings on a shared machine wrong: drift (clock, temperature, neighbours) and order.
Every round here runs every variant once, each round in the reverse order of the one before
(A/B/B/A), and a variant is compared with the baseline of its own round, so that drift cancels in
the ratio. On a CPU the clock is the CPU time of the process, which other processes disturb far less
than wall clock; wall clock is kept beside it.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from heterolora.errors import HeteroLoraError

__all__ = [
    "BenchError",
    "CpuStopwatch",
    "CudaStopwatch",
    "Stopwatch",
    "Summary",
    "Timing",
    "cpu_threads",
    "paired",
    "stopwatch_for",
]


class BenchError(HeteroLoraError):
    """A benchmark cannot run as asked, or a result file is malformed."""


class Stopwatch(Protocol):
    """Times one call. `clock` names what the first number of `stop` is."""

    clock: str

    def start(self) -> None: ...

    def stop(self) -> tuple[float, float]:
        """Seconds by `clock`, and seconds of wall time, since `start`."""
        ...


class CpuStopwatch:
    """CPU time of this process (all its threads) and wall time, both in seconds."""

    clock = "process CPU time"

    def __init__(
        self,
        cpu_clock: Callable[[], float] = time.process_time,
        wall_clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._cpu_clock, self._wall_clock = cpu_clock, wall_clock
        self._started = (0.0, 0.0)

    def start(self) -> None:
        self._started = (self._cpu_clock(), self._wall_clock())

    def stop(self) -> tuple[float, float]:
        cpu, wall = self._cpu_clock(), self._wall_clock()
        return cpu - self._started[0], wall - self._started[1]


class CudaStopwatch:
    """Time between two events on the current CUDA stream, and wall time until it is idle."""

    clock = "CUDA event time"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)
        self._wall = 0.0

    def start(self) -> None:
        torch.cuda.synchronize(self._device)
        self._wall = time.perf_counter()
        self._begin.record(torch.cuda.current_stream(self._device))

    def stop(self) -> tuple[float, float]:
        self._end.record(torch.cuda.current_stream(self._device))
        torch.cuda.synchronize(self._device)
        return self._begin.elapsed_time(self._end) / 1e3, time.perf_counter() - self._wall


def stopwatch_for(device: torch.device | str) -> Stopwatch:
    device = torch.device(device)
    return CudaStopwatch(device) if device.type == "cuda" else CpuStopwatch()


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Runs the block with `count` intra-op threads and restores the number found.

    One thread is the default of the bench: with more, CPU time counts threads that spin while they
    wait.
    """
    if count < 1:
        raise BenchError(f"threads must be at least 1, not {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Summary:
    """One variant against the baseline. Ratios are time / baseline time: below 1 is faster.

    Attributes:
        milliseconds: median over rounds, by the clock of the timing.
        wall_milliseconds: median over rounds, wall time.
        ratio: median of the per-round ratios; `ratio_low` and `ratio_high` are their quartiles.
        ratio_of_minima: fastest round of the variant / fastest round of the baseline.
    """

    milliseconds: float
    wall_milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_of_minima: float


@dataclass(frozen=True)
class Timing:
    """Samples of one interleaved run: `seconds[variant][i]` and `wall_seconds[variant][i]`, round
    i.
    """

    clock: str
    baseline: str
    seconds: dict[str, list[float]]
    wall_seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(self.seconds[self.baseline])

    def summary(self, variant: str, *, baseline: str | None = None) -> Summary:
        """`variant` against `baseline` (default: that of the run), paired round by round."""
        mine, base = self.seconds[variant], self.seconds[baseline or self.baseline]
        ratios = [a / b for a, b in zip(mine, base, strict=True)]
        low, middle, high = quartiles(ratios)
        return Summary(
            milliseconds=statistics.median(mine) * 1e3,
            wall_milliseconds=statistics.median(self.wall_seconds[variant]) * 1e3,
            ratio=middle,
            ratio_low=low,
            ratio_high=high,
            ratio_of_minima=min(mine) / min(base),
        )


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile, interpolated linearly; one value gives it thrice."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def paired(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int,
    baseline: str,
    stopwatch: Stopwatch | None = None,
    on_round: Callable[[int], None] | None = None,
) -> Timing:
    """Times `variants` interleaved, in the order given and then reversed, round by round.

    Args:
        variants: what to time; each is called once a round, and what it returns is dropped untimed.
        rounds: timed rounds, at least 1.
        warmup: untimed rounds first (caches, allocator, compilation).
        baseline: the variant that ratios are taken against.
        stopwatch: default `CpuStopwatch()`; `stopwatch_for(device)` picks the one for a device.
        on_round: called after each timed round with the number of rounds done.

    Raises:
        BenchError: no such baseline, `rounds` < 1, `warmup` < 0, or a clock too coarse to see the
            baseline.
    """
    if baseline not in variants:
        raise BenchError(f"baseline {baseline!r} is not one of the variants {sorted(variants)}")
    if rounds < 1 or warmup < 0:
        raise BenchError(f"rounds must be >= 1 and warmup >= 0, not {rounds} and {warmup}")
    watch = CpuStopwatch() if stopwatch is None else stopwatch
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    wall_seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)

    for _ in range(warmup):
        for name in order:
            variants[name]()

    with _no_automatic_collection():
        for done in range(rounds):
            # Young objects only: a full collection walks all of transformers and cools the caches.
            gc.collect(1)
            for name in order:
                watch.start()
                dropped = variants[name]()
                mine, wall = watch.stop()
                del dropped
                seconds[name].append(mine)
                wall_seconds[name].append(wall)
            order.reverse()
            if on_round is not None:
                on_round(done + 1)

    if min(seconds[baseline]) <= 0:
        raise BenchError(
            f"the {watch.clock} clock is too coarse to time {baseline!r}: "
            "make one call do more work (a larger batch, or a loop inside the variant)"
        )
    return Timing(watch.clock, baseline, seconds, wall_seconds)


@contextlib.contextmanager
def _no_automatic_collection() -> Iterator[None]:
    """Keeps the garbage of one variant from being collected in the time of another."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
