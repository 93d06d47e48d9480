"""One self-contained HTML page from the results of a search and the training runs that followed.

Nothing on the page is fetched: styles and pictures are inside the file. Pictures take the text
colour of the page, so one file serves light and dark settings.
"""

import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Grid", "curves_figure", "layer_grid", "rank_map_figure", "scores_figure", "write_html"]

# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers, on light and on dark.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
# Drawn where the page's own text colour belongs; replaced by `currentColor` in the SVG.
_TEXT = "#010203"
_MOST_BARS = 24

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
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results['title'])}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n",
        encoding="utf-8",
    )


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
            parts.append(_picture(rank_map_figure(arm["ranks"]), label))
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
    picture = _picture(scores_figure(scores), "Score of each module") if scores else ""
    shown = "" if len(scores) <= _MOST_BARS else f" The {_MOST_BARS} highest of {len(scores)}."
    return (
        f"<h2>Scores ({escape(results['proxy'])})</h2>\n{picture}\n"
        f'<p class="note">{cost}.{shown}</p>'
    )


def _curves(arms: Sequence[Mapping[str, Any]]) -> str:
    return "<h2>Training</h2>\n" + _picture(curves_figure(arms), "Loss and accuracy by step")


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


@dataclass(frozen=True)
class Grid:
    """Module names laid out as kind x layer; `cells` holds the name at (kind, layer)."""

    kinds: list[str]
    layers: list[int | None]
    cells: dict[tuple[str, int | None], str]


def layer_grid(names: Iterable[str]) -> Grid:
    """The layer is the first number in a dotted name, the kind is the rest; parts that all kinds
    share are left out.
    """
    split: dict[str, tuple[tuple[str, ...], tuple[str, ...], int | None]] = {}
    for name in names:
        parts = tuple(name.split("."))
        at = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        before, after = (parts[:at], parts[at + 1 :]) if at is not None else ((), parts)
        split[name] = (before, after, None if at is None else int(parts[at]))
    one_stack = len({before for before, _, layer in split.values() if layer is not None}) <= 1
    cells = {}
    for name, (before, after, layer) in split.items():
        kind = ".".join(after if one_stack else (*before, *after))
        cells[kind or name, layer] = name
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = {layer for _, layer in cells}
    numbers: list[int | None] = [*sorted(layer for layer in layers if layer is not None)]
    return Grid(kinds, numbers + ([None] if None in layers else []), cells)


def rank_map_figure(ranks: Mapping[str, int]) -> "Figure":
    """Heat map of ranks, layers from left to right, kinds of modules from top to bottom.

    Args:
        ranks: {module name: rank}; 0 is drawn as a module without adapter.

    Returns:
        a figure with a transparent background; ``figure.savefig("ranks.png", facecolor="white")``
        makes a picture of it.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    grid = layer_grid(ranks)
    columns, rows = len(grid.layers), len(grid.kinds)
    cell = 0.42 if columns <= 24 else 0.42 * 24 / columns
    figure, axes = _figure(2.4 + cell * columns, 0.7 + 0.34 * rows)
    highest = max(ranks.values(), default=0) or 1
    colours = colormaps["viridis"]
    for (kind, layer), name in grid.cells.items():
        x, y = grid.layers.index(layer), grid.kinds.index(kind)
        rank = ranks[name]
        # The square root keeps ranks 1, 2 and 4 apart beside a 32.
        shade = 0.15 + 0.85 * (rank / highest) ** 0.5
        face = colours(shade) if rank else "none"
        edge = "none" if rank else "#88888880"
        axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, facecolor=face, edgecolor=edge))
        # Viridis turns light at about two thirds.
        ink = _TEXT if not rank else "#000000" if shade > 0.62 else "#ffffff"
        size = 8 if columns <= 24 else 6
        axes.text(x, y, str(rank), ha="center", va="center", fontsize=size, color=ink)
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(range(columns), ["none" if n is None else str(n) for n in grid.layers])
    axes.set_yticks(range(rows), grid.kinds)
    axes.set_xlabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def scores_figure(scores: Mapping[str, float]) -> "Figure":
    """Horizontal bars of the highest scores, at most 24, the highest on top."""
    best = sorted(scores, key=lambda name: -scores[name])[:_MOST_BARS]
    figure, axes = _figure(7.0, 0.6 + 0.22 * len(best))
    axes.barh(range(len(best)), [scores[name] for name in best], color=_COLOURS[0])
    places = {name: place for place, name in layer_grid(scores).cells.items()}
    labels = [
        kind if layer is None else f"layer {layer} {kind}"
        for kind, layer in (places[name] for name in best)
    ]
    axes.set_yticks(range(len(best)), labels, fontsize=8)
    axes.set_ylim(len(best) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("score")
    return figure


def curves_figure(arms: Sequence[Mapping[str, Any]]) -> "Figure":
    """Training loss, evaluation loss and evaluation accuracy by step; a colour an arm, a line a
    run.
    """
    panels = [
        (key, label)
        for key, label in (
            ("loss", "training loss"),
            ("eval_loss", "validation loss"),
            ("eval_accuracy", "validation accuracy"),
        )
        if any(_series(run, key)[0] for arm in arms for run in arm["runs"])
    ]
    figure, *axes_list = _figure(7.0, 2.5 * max(1, len(panels)), rows=max(1, len(panels)))
    for axes, (key, label) in zip(axes_list, panels, strict=False):
        for index, arm in enumerate(arms):
            colour = _COLOURS[index % len(_COLOURS)]
            for number, run in enumerate(arm["runs"]):
                steps, values = _series(run, key)
                axes.plot(
                    steps,
                    values,
                    color=colour,
                    linewidth=1.2,
                    alpha=0.8,
                    marker="o" if len(steps) <= 20 else None,
                    markersize=3,
                    label=arm["name"] if number == 0 else None,
                )
        axes.set_ylabel(label)
        if axes is not axes_list[0]:
            axes.sharex(axes_list[0])
        axes.grid(color="#88888840", linewidth=0.6)
        axes.set_axisbelow(True)
    axes_list[-1].set_xlabel("step")
    if panels:
        axes_list[0].legend(frameon=False, labelcolor=_TEXT)
    return figure


def _series(run: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in run["history"] if key in entry]
    return [step for step, _ in points], [value for _, value in points]


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, ...]:
    """A figure in inches and its axes from top to bottom, without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes_list = [figure.add_subplot(rows, 1, 1 + index) for index in range(rows)]
    for axes in axes_list:
        _in_text_colour(axes)
    return (figure, *axes_list)


def _in_text_colour(axes: "Axes") -> None:
    axes.patch.set_alpha(0.0)
    axes.tick_params(colors=_TEXT, labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_TEXT)
        label.set_fontsize(9)
    for side, spine in axes.spines.items():
        spine.set_color(_TEXT)
        spine.set_visible(side in ("left", "bottom"))


def _picture(figure: "Figure", label: str) -> str:
    """The figure as inline SVG, its text in the reader's colour and font."""
    from matplotlib import rc_context

    # The hash salt makes ids differ between the pictures of a page, and equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = svg.replace(_TEXT, "currentColor")
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f'<div class="wide">{svg}</div>'
