"""What a single module is worth, by training with it alone and without it alone; and whether a
proxy's scores say so before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from heterolora.bench.evidence.arms.ablation import KINDS, PARTS, part_of
from heterolora.bench.evidence.report.statistics import Correlation, rank_correlation
from heterolora.bench.harness.timing import BenchError

__all__ = ["Predictions", "gains", "is_ablation", "markdown", "predictions"]

_WAYS = {"alone": "with it alone", "without": "without it"}
_ARM = re.compile(r"(alone|without)-(.+)")


def is_ablation(entry: Mapping[str, Any]) -> bool:
    """Whether a result is of one of these arms."""
    return _ARM.fullmatch(entry["run"]["arm"]) is not None


@dataclass(frozen=True)
class Predictions:
    """What an arm's scores said of modules, and what these turned out to be worth.

    Attributes:
        way: "alone" or "without".
        scores, gains: by module, in the order of the same names.
    """

    task: str
    arm: str
    way: str
    scores: dict[str, float]
    gains: dict[str, float]

    @property
    def correlation(self) -> Correlation:
        """Spearman's, over the modules."""
        return rank_correlation(list(self.scores.values()), list(self.gains.values()))


def gains(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, float]]:
    """{(task, "alone" or "without"): {part: what it is worth in test loss, mean over seeds}}.

    With a part alone that is by how much lower the loss is than with the worst part alone; without
    a part, by how much higher it is than without the part that is missed least. Of seeds that not
    all parts have yet, none counts: seeds differ by more than parts do.

    Raises:
        BenchError: a task has ablations at two budgets, or no seed that all its parts have.
    """
    losses: dict[tuple[str, str], dict[str, dict[int, float]]]
    losses = defaultdict(lambda: defaultdict(dict))
    ranks: dict[str, int] = {}
    for entry in entries:
        run, result = entry["run"], entry["result"]
        if (match := _ARM.fullmatch(run["arm"])) and result["loss"] is not None:
            if ranks.setdefault(run["task"], run["rank"]) != run["rank"]:
                raise BenchError(
                    f"ablations of {run['task']} at ranks {ranks[run['task']]} and {run['rank']} "
                    "do not compare; keep them in two folders"
                )
            losses[run["task"], match[1]][match[2]][run["seed"]] = result["loss"]
    found = {}
    for (task, way), of in losses.items():
        common = set.intersection(*(set(by_seed) for by_seed in of.values()))
        if not common:
            raise BenchError(f"no seed has all parts of {task} {_WAYS[way]}; let the runs finish")
        means = {
            part: fmean(of[part][seed] for seed in sorted(common)) for part in PARTS if part in of
        }
        worst = max(means.values()) if way == "alone" else min(means.values())
        found[task, way] = {part: abs(loss - worst) for part, loss in means.items()}
    return found


def predictions(entries: Sequence[Mapping[str, Any]]) -> list[Predictions]:
    """For every arm that scored, and each way in which three modules or more were ablated.

    Scores are means over the seeds.
    """
    scores: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for entry in entries:
        run, result = entry["run"], entry["result"]
        for name, score in result.get("scores", {}).items():
            if (part := part_of(name)) is not None:
                scores[run["task"], run["arm"]][part].append(score)
    found = []
    worth = gains(entries)
    for (task, arm), of_part in sorted(scores.items()):
        for way in _WAYS:
            common = [part for part in worth.get((task, way), {}) if part in of_part]
            if len(common) > 2:
                own = {part: fmean(of_part[part]) for part in common}
                of_ablation = {part: worth[task, way][part] for part in common}
                found.append(Predictions(task, arm, way, own, of_ablation))
    return found


def markdown(entries: Sequence[Mapping[str, Any]]) -> str:
    """Tables of `gains` and of the correlations of `predictions`; empty where no module was
    ablated.
    """
    lines = []
    for (task, way), worth in gains(entries).items():
        lines += [
            f"## What single modules are worth on {task}, {_WAYS[way]}",
            "",
            "Test loss, in nats, in units of 0.001.",
            "",
            f"| layer | {' | '.join(KINDS)} |",
            "| ---: " * (1 + len(KINDS)) + "|",
        ]
        for layer in sorted({part[0] for part in worth}):
            cells = [worth.get(f"{layer}-{kind}") for kind in KINDS]
            numbers = ("" if cell is None else f"{1000 * cell:.0f}" for cell in cells)
            lines.append(f"| {layer} | {' | '.join(numbers)} |")
        lines.append("")
    found: dict[tuple[str, str], dict[str, Correlation]] = defaultdict(dict)
    for prediction in predictions(entries):
        found[prediction.task, prediction.arm][prediction.way] = prediction.correlation
    if not found:
        return "\n".join(lines)
    ways = [way for way in _WAYS if any(way in of for of in found.values())]
    lines += [
        "## What scores predict",
        "",
        "Spearman's correlation of a module's score with what it is worth, over the modules, with "
        "the 95 % interval of a bootstrap over them.",
        "",
        f"| task | scores of | {' | '.join(_WAYS[way] for way in ways)} | modules |",
        f"| --- | --- | {'---: | ' * len(ways)}---: |",
    ]
    for (task, arm), of in found.items():
        cells_of = " | ".join(_cell(of.get(way)) for way in ways)
        count = max(way.count for way in of.values())
        lines.append(f"| {task} | {arm} | {cells_of} | {count} |")
    return "\n".join([*lines, ""])


def _cell(found: Correlation | None) -> str:
    return "" if found is None else f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
