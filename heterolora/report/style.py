"""The look of all pictures: colours, bare axes without pyplot's global state, and inline SVG."""

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "TEXT", "panels", "svg"]

# Okabe and Ito, "Color Universal Design": told apart by colour-blind readers, on light and on dark.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
# Drawn where the page's own text colour belongs; replaced by `currentColor` in the SVG.
TEXT = "#010203"


def panels(width: float, height: float, rows: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure with a transparent background, and its axes from top to bottom.

    Args:
        width, height: of the figure, in inches.
        rows: how many axes stand one below the other.
    """
    # Loaded here: only who draws needs matplotlib.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0.0)
    grid: Any = figure.subplots(rows, 1, squeeze=False)
    for axes in grid.flat:
        axes.patch.set_alpha(0.0)
        axes.tick_params(colors=TEXT, labelsize=9)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(color=TEXT, fontsize=9)
        for side, spine in axes.spines.items():
            spine.set_color(TEXT)
            spine.set_visible(side in ("left", "bottom"))
    return figure, list(grid.flat)


def svg(figure: "Figure", label: str) -> str:
    """The figure as inline SVG, its text in the reader's colour and font.

    Args:
        figure: what is drawn.
        label: read out in its place; unique on a page, since the ids in the picture come from it.
    """
    from matplotlib import rc_context

    # The hash salt makes ids differ between the pictures of a page, and equal from run to run.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    text = drawn.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Names of groups are the same in every picture, and nothing refers to them.
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    text = text.replace(TEXT, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
