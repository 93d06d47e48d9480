"""What tables and plots show, computed from results: ratios, rates, bytes per token."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from heterolora.bench.cases.peers import BASELINE, FLOOR
from heterolora.bench.cases.registry import CASES
from heterolora.bench.harness.record import BenchRun, CaseResult, read_run
from heterolora.bench.harness.timing import BenchError, CpuStopwatch

__all__ = [
    "DTYPES",
    "SECTIONS",
    "ceilings",
    "counted",
    "devices",
    "family",
    "field_of",
    "last_half",
    "loss_difference",
    "memory_cases",
    "noise",
    "only",
    "pure",
    "ratios",
    "read_folder",
    "saved_per_token",
    "section",
    "spread",
    "step_seconds",
    "tokens_per_second",
    "uniform",
    "work_of",
]

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
SECTIONS = {
    "model": "Whole models",
    "layer": "One layer of a model",
    "linears": "The linears of a model alone",
    "group": "Linears that read one input",
    "op": "One linear",
    "scoring": "Scoring pass of the search",
    "train": "Whole training runs",
}


def section(result: CaseResult) -> str:
    """One of `SECTIONS`: the kind, with the stacks of linears apart from the whole models."""
    return "linears" if result.case.startswith("linears-") else result.kind


def only(
    runs: Iterable[BenchRun], part: str | None = None, dtype: str | None = None
) -> list[tuple[BenchRun, CaseResult]]:
    """The results of one section (default all) and dtype (default both), each with its run, in the
    order of the registry.
    """
    places = {name: place for place, name in enumerate(CASES)}
    found = [
        (run, result)
        for run in runs
        for result in run.results
        if part in (None, section(result)) and dtype in (None, result.dtype)
    ]
    return sorted(found, key=lambda pair: places.get(pair[1].case, len(places)))


def devices(runs: Iterable[BenchRun]) -> dict[str, list[BenchRun]]:
    """Runs by the name of their device, CPUs first."""
    found: dict[str, list[BenchRun]] = {}
    for run in sorted(runs, key=lambda run: field_of(run, "device_type") != "cpu"):
        found.setdefault(str(field_of(run, "device")), []).append(run)
    return found


def counted(count: int) -> str:
    """ "1 case", "2 cases"."""
    return "1 case" if count == 1 else f"{count} cases"


def pure(result: CaseResult) -> bool:
    """Whether a step is nothing but its adapted linears, so that `work` is its minimum."""
    alone = section(result) in ("op", "group", "linears")
    return alone and not result.shapes.get("shortcut")


def family(result: CaseResult) -> str:
    """The name of the case without its dtype."""
    return re.sub(r"-(fp32|bf16)(?=-|$)", "", result.case)


def ratios(results: Iterable[CaseResult], variant: str, baseline: str) -> list[float]:
    """Time of `variant` over time of `baseline` (median of the rounds), where both were timed and
    the clock was fine enough.
    """
    return [
        result.timing.summary(variant, baseline=baseline).ratio
        for result in results
        if result.timing is not None
        and variant in result.timing.seconds
        and min(result.timing.seconds.get(baseline, [0])) > 0
    ]


def noise(runs: Iterable[BenchRun]) -> list[float]:
    """PEFT over itself: in float32 `peft-lowp` computes what `peft` does."""
    return ratios([result for _, result in only(runs, dtype="fp32")], "peft-lowp", BASELINE)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Least, median and greatest."""
    return min(values), statistics.median(values), max(values)


def saved_per_token(result: CaseResult, variant: str) -> float | None:
    """Bytes kept for backward per token and layer (or copy of a group); None: not measured."""
    used = result.memory.get(variant)
    return None if used is None else used.saved / (result.tokens * result.layers)


def memory_cases(runs: Iterable[BenchRun]) -> dict[str, dict[str, CaseResult]]:
    """One result a dtype for every model, layer and group whose memory was measured.

    Of uniform ranks, and of one number of tokens, as bytes a token do not depend on it.
    """
    found: dict[str, dict[str, CaseResult]] = {}
    for part in ("model", "layer", "linears", "group"):
        for _, result in only(runs, part):
            if uniform(result) and {BASELINE, "fused"} <= result.memory.keys():
                name = re.sub(r"-(uniform|r\d+|m\d+)(?=-|$)", "", family(result))
                found.setdefault(name, {}).setdefault(result.dtype, result)
    return found


def uniform(result: CaseResult) -> bool:
    """Whether all its ranks are equal."""
    return len(set(result.ranks.values())) <= 1


def work_of(result: CaseResult, variant: str) -> tuple[int, int]:
    """FLOPs and bytes that a step of `variant` cannot do without."""
    work = result.work
    return (work.base_flops, work.base_bytes) if variant == FLOOR else (work.flops, work.bytes)


def step_seconds(run: BenchRun, result: CaseResult, variant: str) -> float | None:
    """Median seconds of a step, for rates; None: not timed.

    CPU time adds up threads, so that with several the wall time is taken.
    """
    if result.timing is None or variant not in result.timing.seconds:
        return None
    summary = result.timing.summary(variant)
    several = result.timing.clock == CpuStopwatch.clock and field_of(run, "threads") > 1
    return (summary.wall_milliseconds if several else summary.milliseconds) / 1e3


def tokens_per_second(run: BenchRun, result: CaseResult, variant: str) -> float | None:
    """Rows that each linear sees, padding included, over :func:`step_seconds`."""
    seconds = step_seconds(run, result, variant)
    return result.tokens / seconds if seconds else None


def last_half(result: CaseResult, variant: str) -> list[float]:
    """Mean loss over the last half of each run of a train case, by seed."""
    if result.training is None:
        return []
    runs = result.training.losses.get(variant, [])
    return [statistics.fmean(run[len(run) // 2 :]) for run in runs]


def loss_difference(result: CaseResult, variant: str) -> tuple[float, float] | None:
    """:func:`last_half` less that of the baseline with the same seed: mean over the seeds, and the
    standard error of that mean; None with fewer than two seeds.
    """
    pairs = zip(last_half(result, variant), last_half(result, BASELINE), strict=False)
    found = [mine - base for mine, base in pairs]
    if len(found) < 2:
        return None
    return statistics.fmean(found), statistics.stdev(found) / math.sqrt(len(found))


def ceilings(run: BenchRun, dtype: str) -> tuple[float, float] | None:
    """Measured (bytes/s, FLOP/s) of the machine; None: not measured.

    Raises:
        BenchError: malformed.
    """
    found = run.environment.get("ceilings")
    if found is None:
        return None
    try:
        limits = float(found["bandwidth"]), float(found["flops"][dtype])
    except (KeyError, TypeError, ValueError) as error:
        raise BenchError(
            f"environment.ceilings: expected bandwidth and flops.{dtype}, found {found!r}"
        ) from error
    if min(limits) <= 0:
        raise BenchError(f"environment.ceilings: must be positive, found {found!r}")
    return limits


def field_of(run: BenchRun, name: str) -> Any:
    """A field of the environment.

    Raises:
        BenchError: missing.
    """
    if name not in run.environment:
        raise BenchError(f"environment.{name}: missing; measure again")
    return run.environment[name]


def read_folder(folder: Path) -> list[BenchRun]:
    """All result files below `folder`, in order of their paths, those of one environment joined.

    Raises:
        BenchError: no such folder, no result in it, or a malformed file.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder}: no such folder")
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise BenchError(f"{folder}: no result files (*.json) in it")
    joined: list[BenchRun] = []
    for run in map(read_run, paths):
        same = next((known for known in joined if known.environment == run.environment), None)
        if same is None:
            joined.append(run)
        else:
            same.results.extend(run.results)
    return joined
