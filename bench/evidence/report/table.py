"""The table of results: what each arm reached, and whether that differs from uniform ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from heterolora.bench.evidence.arms.registry import ARMS, PAST
from heterolora.bench.evidence.report.statistics import (
    FEWEST,
    RESAMPLES,
    Difference,
    paired_difference,
    spread,
)
from heterolora.bench.harness.timing import BenchError

__all__ = ["BASELINE", "differences", "grouped", "markdown", "metric_of", "relative_time"]

BASELINE = "uniform"
# What PEFT does where it is told no modules: the other thing to compare with.
_DEFAULT = "peft-targets"
# What `heterolora train --rank` does, and after `heterolora search`: the other arms of this family
# have the same candidates and head.
_PLAIN, _SEARCHED = "all-linear", "all-linear-search"

_METRICS = ("accuracy", "pearson")
_HEADER = (
    "arm",
    "parameters",
    "seeds",
    "learning rate",
    "test loss",
    "loss − uniform",
    "{metric} %",
    "{metric} − uniform",
    "training time / uniform",
    "search s",
)

Entries = list[dict[str, Any]]


def markdown(entries: Iterable[Mapping[str, Any]]) -> str:
    """A section for each task and budget, a row for each arm.

    Args:
        entries: as of `heterolora.bench.evidence.store.Store.tests`.

    Raises:
        BenchError: there is nothing to report, or an arm has two results for one seed.
    """
    compared = beyond = 0
    lines = []
    for (task, rank), arms in grouped(entries).items():
        metric = metric_of(arms)
        lines += [f"## {task}, the parameters of uniform rank {rank}", ""]
        header = [column for column in _HEADER if metric or "{metric}" not in column]
        lines.append(_row(column.format(metric=metric) for column in header))
        lines.append(_row(["---"] + ["---:"] * (len(header) - 1)))
        for arm in arms:
            found = differences(arm, arms)
            lines.append(_row(_cells(arm, arms, metric, found)))
            judged = [d for d in found.values() if d is not None and d.low is not None]
            compared += len(judged)
            beyond += sum(d.beyond_noise for d in judged)
        others = [arm for arm in arms if not arm.startswith(_PLAIN)]
        alike = [arm for arm in arms if arm.startswith(f"{_PLAIN}-")]
        rivals = [arm for arm in alike if arm != _SEARCHED]
        lines += ["", *_against(_DEFAULT, "Against PEFT's default modules:", others, arms)]
        lines += _against(_PLAIN, "With the command line's own candidates:", alike, arms)
        lines += _against(_SEARCHED, "The same, against the search:", rivals, arms)
    lines += [
        "Mean ± standard deviation over seeds. Differences are paired by seed, from "
        f"{FEWEST} seeds on with the 95 % interval of {RESAMPLES:,} bootstrap resamples of the "
        "seeds, its percentiles expanded for their small number (Hesterberg, 2015), bold where it "
        f"leaves out zero: {beyond} of {compared} comparisons with uniform. Of arms that do not "
        f"differ, at least 1 of {2 ** (FEWEST - 1)} would have it so with {FEWEST} seeds. "
        "Parameters are those of the adapter in use at the end; where more had been trained, or "
        "other numbers are saved, these follow. Beside it every arm trains the same head in full, "
        "where the task has one, but the all-linear ones less of it. Training time is the CPU "
        "time of the steps, compared where one command ran both arms, which may be one run of "
        "each; adalora's are not fused, and the seconds of a search while training are those "
        "between steps. A run that diverged is left out of the means; the column of seeds says so.",
        "",
    ]
    return "\n".join(lines)


def grouped(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Entries]]:
    """{(task, budget): {arm: its results}}, arms in the order of `ARMS`, then of `PAST`.

    Raises:
        BenchError: as `markdown`.
    """
    groups: dict[tuple[str, int], dict[str, Entries]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        run = entry["run"]
        groups[run["task"], run["rank"]][run["arm"]].append(dict(entry))
    if not groups:
        raise BenchError("no result to report yet")
    for (task, rank), arms in groups.items():
        _check_single(arms, task, rank)
    order = [*ARMS, *PAST]
    return {
        key: dict(sorted(arms.items(), key=lambda arm: (order + [arm[0]]).index(arm[0])))
        for key, arms in sorted(groups.items())
    }


def differences(
    arm: str, arms: Mapping[str, Entries], baseline: str = BASELINE
) -> dict[str, Difference | None]:
    """Of "loss" (nats, or squared error) and, where the task has one, of the metric (per cent): the
    arm less the baseline; None for the baseline itself, or without a common seed.
    """
    if arm == baseline:
        return {key: None for key, _, _ in _measured(metric_of(arms))}
    plain = arms.get(baseline, [])
    return {
        key: paired_difference(_by_seed(arms[arm], key, unit), _by_seed(plain, key, unit))
        for key, unit, _ in _measured(metric_of(arms))
    }


def relative_time(arm: str, arms: Mapping[str, Entries]) -> float | None:
    """CPU time of the arm's steps over the mean of uniform ranks in the same command, of all its
    runs where there are such. None without one: times of two machines, and of two versions of the
    code, do not compare.
    """
    own, plain = (_training_times(arms.get(name, [])) for name in (arm, BASELINE))
    common = own.keys() & plain.keys()
    if not common:
        return None
    spent = sum(sum(own[command]) for command in common)
    return spent / sum(len(own[command]) * fmean(plain[command]) for command in common)


def _training_times(entries: Entries) -> dict[str, list[float]]:
    """{when a command started: CPU seconds of the steps of each of its runs}."""
    found: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        if (seconds := _step_seconds(entry["result"])) is not None:
            found[entry["environment"]["date"]].append(seconds)
    return found


def _step_seconds(result: Mapping[str, Any]) -> float | None:
    mean = result["seconds_per_step"]["cpu"]
    return None if mean is None else mean * result["steps"]


def _search_seconds(result: Mapping[str, Any]) -> float:
    """Of a search before training or, where ranks changed on the way, between its steps."""
    steps = _step_seconds(result)
    if "rankings" not in result or steps is None:
        return float(result["search_seconds"])
    return float(result["train_seconds"]["cpu"] - steps)


def _against(
    baseline: str, title: str, shown: Iterable[str], arms: Mapping[str, Entries]
) -> list[str]:
    """Lines of a table of those of `shown` that have an interval, less the baseline."""
    measured = _measured(metric_of(arms))
    rows = []
    for arm in shown:
        found = differences(arm, arms, baseline)
        if all(d is not None and d.low is not None for d in found.values()):
            rows.append(
                _row([arm, *(_difference(found[key], digits) for key, _, digits in measured)])
            )
    if not rows:
        return []
    header = ["arm", *(f"{key} − {baseline}" for key, _, _ in measured)]
    rule = ["---", *("---:" for _ in measured)]
    return [title, "", _row(header), _row(rule), *rows, ""]


def _measured(metric: str | None) -> list[tuple[str, float, int]]:
    """(key, factor, digits) of what is compared."""
    return [("loss", 1.0, 4)] + ([(metric, 100.0, 2)] if metric else [])


def _cells(
    arm: str,
    arms: Mapping[str, Entries],
    metric: str | None,
    found: Mapping[str, Difference | None],
) -> list[str]:
    entries = arms[arm]
    good = [entry for entry in entries if not entry["result"]["diverged"]]
    seeds = str(len(good)) + (f" of {len(entries)}" if len(good) < len(entries) else "")
    rates = sorted({entry["run"]["learning_rate"] for entry in entries})
    head = [arm, _parameters(entries), seeds, ", ".join(f"{rate:g}" for rate in rates)]
    relative = relative_time(arm, arms)
    searched = fmean(_search_seconds(entry["result"]) for entry in entries)
    tail = ["" if relative is None else f"{relative:.2f}", f"{searched:.1f}" if searched else ""]
    middle = []
    for key, unit, digits in _measured(metric):
        middle.append(_spread(list(_by_seed(entries, key, unit).values()), digits))
        middle.append(_difference(found[key], digits))
    return [*head, *middle, *tail]


def _by_seed(entries: Entries, key: str, unit: float) -> dict[int, float]:
    return {
        entry["run"]["seed"]: unit * entry["result"][key]
        for entry in entries
        if not entry["result"]["diverged"]
    }


def _parameters(entries: Entries) -> str:
    found = [entry["result"]["parameters"] for entry in entries]
    enabled = _range(count["enabled"] for count in found)
    others = [
        f"{label} {_range(count[key] for count in found)}"
        for key, label in (("ever_trained", "ever trained"), ("stored", "stored"))
        if any(count[key] != count["enabled"] for count in found)
    ]
    return "; ".join([enabled, *others])


def _range(counts: Iterable[int]) -> str:
    values = sorted(set(counts))
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, deviation = spread(values)
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def _difference(found: Difference | None, digits: int) -> str:
    if found is None:
        return ""
    text = f"{found.mean:+.{digits}f}"
    if found.low is not None:
        text += f" [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.beyond_noise else text


def metric_of(arms: Mapping[str, Entries]) -> str | None:
    """Name of what the results say beside the loss, if anything."""
    first = next(iter(arms.values()))[0]["result"]
    return next((name for name in _METRICS if name in first), None)


def _check_single(arms: Mapping[str, Entries], task: str, rank: int) -> None:
    for arm, entries in arms.items():
        seeds = [entry["run"]["seed"] for entry in entries]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise BenchError(
                f"{arm} on {task} at rank {rank} has two results for seed {twice} (learning rates "
                f"{', '.join(sorted({format(e['run']['learning_rate'], 'g') for e in entries}))}); "
                "delete those that are not meant"
            )


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
