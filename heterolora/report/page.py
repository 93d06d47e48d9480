"""Self-contained HTML pages: of a search, and of a search and the training runs that followed.

What is said is decided here, as plain strings; how it looks is decided in `templates`, which escape
every string but the pictures.
"""

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterolora.errors import HeteroLoraError
from heterolora.report.figures import MOST_BARS, curves_figure, rank_map_figure, scores_figure
from heterolora.report.style import svg

if TYPE_CHECKING:
    from heterolora.search import Allocation

__all__ = ["check_installed", "write_html", "write_search_html"]


def check_installed() -> None:
    """Refuse early what could not be written later.

    Raises:
        HeteroLoraError: matplotlib or jinja2 is missing.
    """
    for package, verb in (("matplotlib", "drawn"), ("jinja2", "filled in")):
        if find_spec(package) is None:
            raise HeteroLoraError(
                f"the report is {verb} with {package}, which is missing: pip install {package}"
            )


def write_html(results: Mapping[str, Any], path: Path) -> None:
    """Write the page for `results`, the dictionary that `heterolora demo` also writes as JSON.

    Args:
        results: plain values only. ``title``, ``summary`` (sentences), ``command``, ``versions``,
            ``model``, ``dataset``, ``arms`` (each with name, parameters, ranks and its training
            runs), ``scores`` and ``proxy``, ``search_seconds``, ``step_seconds``, ``comparison``
            and ``speed``. Times in seconds unless the name says otherwise; accuracies between 0 and
            1, their difference in percentage points.
        path: where the page goes.

    Raises:
        KeyError: one of these is missing.
        HeteroLoraError: the file cannot be written.
    """
    arms, scores, speed = results["arms"], results["scores"], results["speed"]
    cost = f"Scoring and allocating took {results['search_seconds']:.1f} s"
    if results["step_seconds"] > 0:
        steps = results["search_seconds"] / results["step_seconds"]
        cost += f", the time of {steps:.1f} training steps"
    _write(
        path,
        "demo.html",
        title=results["title"],
        summary=results["summary"],
        arms=[_arm_row(arm) for arm in arms],
        comparison=results["comparison"]["sentence"],
        rank_maps=[
            (arm["name"], svg(rank_map_figure(arm["ranks"]), f"Rank of each module, {arm['name']}"))
            for arm in arms
            if len({rank for rank in arm["ranks"].values() if rank}) > 1
        ],
        proxy=results["proxy"],
        scores=svg(scores_figure(scores), "Score of each module") if scores else "",
        cost=cost,
        shown="" if len(scores) <= MOST_BARS else f" The {MOST_BARS} highest of {len(scores)}.",
        curves=svg(curves_figure(arms), "Loss and accuracy by step"),
        speed=[_speed_row(row) for row in speed["rows"]],
        speed_note=speed["note"],
        command=results["command"],
        about=_about(results),
    )


def write_search_html(
    allocation: "Allocation", path: Path, *, command: str, about: Mapping[str, str]
) -> None:
    """Write a page of where a search put the ranks, and by which scores.

    Args:
        allocation: what the search found.
        path: where the page goes.
        command: what repeats the search.
        about: further lines for the foot, by label: model, data, versions.

    Raises:
        HeteroLoraError: the file cannot be written.
    """
    everything = {**allocation.ranks, **allocation.shortcuts}
    used = sum(map(bool, everything.values()))
    cost = f"Scored with {allocation.proxy} in {allocation.seconds:.1f} s"
    if allocation.ratio:
        cost += f", as much as {allocation.ratio:.1f} training steps"
    _write(
        path,
        "search.html",
        title="heterolora: where the ranks went",
        summary=[
            f"{used} of {len(everything)} candidates have an adapter, of ranks up to "
            f"{max(everything.values())}.",
            f"{allocation.parameters:,} of {allocation.budget_parameters:,} parameters are spent.",
            f"{cost}.",
        ],
        rank_map=svg(rank_map_figure(everything), "Rank of each module and shortcut"),
        proxy=allocation.proxy,
        scores=svg(scores_figure(allocation.scores), "Scores"),
        shown="" if len(allocation.scores) <= MOST_BARS else f" The {MOST_BARS} highest.",
        command=command,
        about=list(about.items()),
    )


def _write(path: Path, template: str, **values: Any) -> None:
    # Loaded here, as matplotlib is: only who wants a page needs it, and `check_installed` asks.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("heterolora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    page = environment.get_template(template).render(values)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise HeteroLoraError(f"cannot write the report to {path}: {error.strerror}") from error


def _arm_row(arm: Mapping[str, Any]) -> Sequence[str]:
    runs = arm["runs"]
    return (
        arm["name"],
        f"{arm['parameters']:,}",
        f"{100 * statistics.fmean(run['test_accuracy'] for run in runs):.2f} %",
        ", ".join(f"{100 * run['test_accuracy']:.2f} ({run['seed']})" for run in runs),
        f"{statistics.fmean(run['test_loss'] for run in runs):.4f}",
        f"{1e3 * statistics.fmean(run['seconds_per_step'] for run in runs):.0f}",
    )


def _speed_row(row: Mapping[str, Any]) -> Sequence[str]:
    return (
        row["variant"],
        f"{row['milliseconds']:.1f}",
        f"{row['ratio']:.2f}",
        f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
        f"{row['peak_megabytes']:.1f}",
    )


def _about(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = results["dataset"]
    split = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test"))
    return [
        ("model", results["model"]),
        ("data", f"{data['name']} ({split})"),
        ("data from", data["source"]),
        ("data licence", data["licence"]),
        *results["versions"].items(),
    ]
