"""The look that all plots of the bench share, and a figure as inline SVG.

The background is white and opaque, so that one picture serves light and dark pages.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from heterolora.bench.cases.peers import BASELINE, FLOOR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GRID", "INK", "key", "panels", "plain_log", "svg"]

# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers.
COLOURS = {
    "fused": "#0072B2",
    BASELINE: "#D55E00",
    FLOOR: "#8A8A8A",
    "compile-fused": "#56B4E9",
    "compile-peft": "#E69F00",
}
INK, GRID = "#1F2328", "#D8DCE0"
_NAMES = {
    BASELINE: "PEFT",
    FLOOR: "floor",
    "compile-fused": "fused, compiled",
    "compile-peft": "PEFT, compiled",
}
_WIDTH = 8.4  # inches; at 100 dots an inch the width of a README


def panels(
    height: float, rows: int = 1, columns: int = 1, *, share_y: bool = False
) -> "tuple[Figure, list[Axes]]":
    """A figure of the common width and its axes row by row, without pyplot's global state.

    Args:
        height: in inches.
        share_y: one scale in each row.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
    grid: Any = figure.subplots(rows, columns, squeeze=False, sharey="row" if share_y else False)
    for axes in grid.flat:
        axes.tick_params(colors=INK, labelsize=8)
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        for text in (axes.xaxis.label, axes.yaxis.label):
            text.set(fontsize=9, color=INK)
        for side, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))
    return figure, list(grid.flat)


def plain_log(axis: Any, ticks: Iterable[float] | None = None) -> None:
    """Plain numbers along a logarithmic axis: `ticks`, or 1, 2 and 5 in each decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    locator = LogLocator(subs=(1, 2, 5)) if ticks is None else FixedLocator(list(ticks))
    axis.set_major_locator(locator)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def key(
    figure: "Figure",
    variants: Sequence[str],
    marks: Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
) -> None:
    """One line above the panels: the variants in their colours, then what the marks mean.

    Args:
        marks: marker by label.
        names: replaces the usual name of a variant.
    """
    from matplotlib.lines import Line2D

    called = {**_NAMES, **(names or {})}
    labels = [called.get(name, name) for name in variants]
    lines = [Line2D([], [], color=COLOURS[name], linewidth=5) for name in variants]
    for label, mark in (marks or {}).items():
        labels.append(label)
        lines.append(Line2D([], [], color=INK, marker=mark, linestyle="none", fillstyle="none"))
    figure.legend(
        lines, labels, loc="outside upper left", ncols=len(lines), frameon=False, fontsize=9,
        labelcolor=INK, handlelength=1, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def svg(figure: "Figure", label: str) -> str:
    """The figure as inline SVG; `label` is read out in its place and must be unique on a page."""
    from matplotlib import rc_context

    # The hash salt makes ids differ between the pictures of a page, and equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names of groups are the same in every picture, and nothing refers to them.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
