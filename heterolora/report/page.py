"""Self-contained HTML pages: of a search, and of a search and the training runs that followed; and
what a search says on a terminal.

Nothing on a page is fetched: styles and pictures are inside the file.
"""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterolora.errors import HeteroLoraError
from heterolora.report.figures import (
    MOST_BARS,
    curves_figure,
    picture,
    rank_map_figure,
    scores_figure,
)

if TYPE_CHECKING:
    from heterolora.search import Allocation

__all__ = ["rank_table", "write_html", "write_search_html"]

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .25rem; }
.summary { font-size: 1.1rem; } .note { opacity: .75; font-size: .9rem; }
.wide { overflow-x: auto; } .wide svg { max-width: max(100%, 26rem); height: auto; }
.wide table { white-space: nowrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8886; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; } thead th { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; padding: .6rem .8rem; border: 1px solid #8886; border-radius: .3rem; }
"""


def write_html(results: Mapping[str, Any], path: Path) -> None:
    """Writes the page for `results`, the dictionary that `heterolora demo` also writes as JSON, to
    `path`.

    Args:
        results: plain values only. ``title``, ``summary`` (sentences), ``command``, ``versions``,
            ``model``,
            ``dataset``, ``arms`` (each with name, parameters, ranks and its training runs),
            ``scores`` and ``proxy``, ``search_seconds``, ``step_seconds``, ``comparison`` and
            ``speed``. Times in seconds unless the name says otherwise; accuracies between 0 and 1,
            their difference in percentage points.

    Raises:
        KeyError: one of these is missing.
    """
    body = "\n".join(
        [
            _summary(results),
            _arms(results["arms"], results["comparison"]),
            _rank_maps(results["arms"]),
            _scores(results),
            _curves(results["arms"]),
            _speed(results["speed"]),
            _provenance(results),
        ]
    )
    _write_page(path, results["title"], body)


def write_search_html(
    allocation: "Allocation", path: Path, *, command: str, about: Mapping[str, str]
) -> None:
    """Writes a page of where a search put the ranks, and by which scores.

    Args:
        command: what repeats the search.
        about: further lines for the foot, by label: model, data, versions.

    Raises:
        HeteroLoraError: the file cannot be written.
    """
    everything = {**allocation.ranks, **allocation.shortcuts}
    used = sum(map(bool, everything.values()))
    sentences = [
        f"{used} of {len(everything)} candidates have an adapter, of ranks up to "
        f"{max(everything.values())}.",
        f"{allocation.parameters:,} of {allocation.budget_parameters:,} parameters are spent.",
        f"Scored with {allocation.proxy} in {allocation.seconds:.1f} s"
        + (f", as much as {allocation.ratio:.1f} training steps." if allocation.ratio else "."),
    ]
    if allocation.step_time is not None:
        sentences.append(
            f"A training step is predicted to take {allocation.step_time:.2f} of uniform LoRA's."
        )
    title = "heterolora: where the ranks went"
    shown = "" if len(allocation.scores) <= MOST_BARS else f" The {MOST_BARS} highest."
    listing = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in about.items())
    body = "\n".join(
        [
            _summary({"title": title, "summary": sentences}),
            "<h2>Rank of each module and shortcut</h2>",
            picture(rank_map_figure(everything), "Rank of each module and shortcut"),
            '<p class="note">0: no adapter. Empty: no such module in this layer.</p>',
            f"<h2>Scores ({escape(allocation.proxy)})</h2>",
            picture(scores_figure(allocation.scores), "Scores"),
            f'<p class="note">As the proxy gave them.{shown}</p>',
            f"<h2>To repeat this</h2>\n<pre>{escape(command)}</pre>\n<dl>{listing}</dl>",
        ]
    )
    _write_page(path, title, body)


def _write_page(path: Path, title: str, body: str) -> None:
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise HeteroLoraError(f"cannot write the report to {path}: {error.strerror}") from error


def _summary(results: Mapping[str, Any]) -> str:
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in results["summary"])
    return f'<h1>{escape(results["title"])}</h1>\n<ul class="summary">{sentences}</ul>'


def _arms(arms: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]) -> str:
    rows = []
    for arm in arms:
        runs = arm["runs"]
        accuracy = [run["test_accuracy"] for run in runs]
        rows.append(
            (
                arm["name"],
                f"{arm['parameters']:,}",
                f"{100 * statistics.fmean(accuracy):.2f} %",
                ", ".join(f"{100 * run['test_accuracy']:.2f} ({run['seed']})" for run in runs),
                f"{statistics.fmean(run['test_loss'] for run in runs):.4f}",
                f"{1e3 * statistics.fmean(run['seconds_per_step'] for run in runs):.0f}",
            )
        )
    head = ("allocation", "LoRA parameters", "accuracy", "each run, % (seed)", "loss", "ms a step")
    return (
        f"<h2>Accuracy at the same budget</h2>\n{_table(head, rows)}\n"
        f"<p>{escape(comparison['sentence'])}</p>\n"
        '<p class="note">Accuracy and loss are means over the runs, test split.</p>'
    )


def _rank_maps(arms: Sequence[Mapping[str, Any]]) -> str:
    parts = ["<h2>Where the ranks went</h2>"]
    for arm in arms:
        if len({rank for rank in arm["ranks"].values() if rank}) > 1:
            label = f"Rank of each module, {arm['name']}"
            parts.append(f"<h3>{escape(arm['name'])}</h3>")
            parts.append(picture(rank_map_figure(arm["ranks"]), label))
    if len(parts) == 1:
        parts.append("<p>Every adapted module has the same rank in every arm.</p>")
    else:
        parts.append('<p class="note">0: no adapter. Empty: no such module in this layer.</p>')
    return "\n".join(parts)


def _scores(results: Mapping[str, Any]) -> str:
    scores = results["scores"]
    cost = f"Scoring and allocating took {results['search_seconds']:.1f} s"
    if results["step_seconds"] > 0:
        steps = results["search_seconds"] / results["step_seconds"]
        cost += f", the time of {steps:.1f} training steps"
    drawn = picture(scores_figure(scores), "Score of each module") if scores else ""
    shown = "" if len(scores) <= MOST_BARS else f" The {MOST_BARS} highest of {len(scores)}."
    return (
        f'<h2>Scores ({escape(results["proxy"])})</h2>\n{drawn}\n<p class="note">{cost}.{shown}</p>'
    )


def _curves(arms: Sequence[Mapping[str, Any]]) -> str:
    return "<h2>Training</h2>\n" + picture(curves_figure(arms), "Loss and accuracy by step")


def _speed(speed: Mapping[str, Any]) -> str:
    rows = [
        (
            row["variant"],
            f"{row['milliseconds']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}",
            f"{row['peak_megabytes']:.1f}",
        )
        for row in speed["rows"]
    ]
    head = ("variant", "ms a step", "ratio", "quartiles", "peak memory, MB")
    table = _table(head, rows) if rows else "<p>Not measured.</p>"
    return f'<h2>Speed and memory</h2>\n{table}\n<p class="note">{escape(speed["note"])}</p>'


def _provenance(results: Mapping[str, Any]) -> str:
    data = results["dataset"]
    split = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test"))
    rows = [
        ("model", results["model"]),
        ("data", f"{data['name']} ({split})"),
        ("data from", data["source"]),
        ("data licence", data["licence"]),
        *results["versions"].items(),
    ]
    listing = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in rows)
    return f"<h2>To repeat this</h2>\n<pre>{escape(results['command'])}</pre>\n<dl>{listing}</dl>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n'
        f"<tbody>\n{lines}</tbody>\n</table></div>"
    )


def rank_table(ranks: Mapping[str, int]) -> Any:
    """For a terminal: layer by module or shortcut; what is outside the layers has its own row."""
    from rich.table import Table

    cells: dict[str, dict[str, int]] = {}
    columns: dict[str, None] = {}
    for name, rank in ranks.items():
        match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
        layer, column = (match.group(1), match.group(2)) if match else ("-", name)
        # Of a shortcut its kind, which says where it ends.
        column = column.rpartition(":")[2]
        cells.setdefault(layer, {})[column] = rank
        columns[column] = None
    table = Table(title="rank by layer and module")
    table.add_column("layer", justify="right")
    for column in columns:
        table.add_column(re.sub(r"([.-])", r"\1\n", column), justify="right")
    for layer, row in cells.items():
        table.add_row(layer, *(str(row.get(column, "")) for column in columns))
    return table
