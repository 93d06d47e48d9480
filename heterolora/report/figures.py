"""Pictures of ranks, scores and training runs, as matplotlib figures.

They take the text colour of the page, so that one file serves light and dark settings.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heterolora.report.style import COLOURS, TEXT, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MOST_BARS",
    "Grid",
    "curves_figure",
    "layer_grid",
    "rank_map_figure",
    "scores_figure",
]

MOST_BARS = 24


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
    figure, (axes,) = panels(2.4 + cell * columns, 0.7 + 0.34 * rows)
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
        ink = TEXT if not rank else "#000000" if shade > 0.62 else "#ffffff"
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
    best = sorted(scores, key=lambda name: -scores[name])[:MOST_BARS]
    figure, (axes,) = panels(7.0, 0.6 + 0.22 * len(best))
    axes.barh(range(len(best)), [scores[name] for name in best], color=COLOURS[0])
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
    measures = [
        (key, label)
        for key, label in (
            ("loss", "training loss"),
            ("eval_loss", "validation loss"),
            ("eval_accuracy", "validation accuracy"),
        )
        if any(_series(run, key)[0] for arm in arms for run in arm["runs"])
    ]
    rows = max(1, len(measures))
    figure, axes_list = panels(7.0, 2.5 * rows, rows)
    for axes, (key, label) in zip(axes_list, measures, strict=False):
        for index, arm in enumerate(arms):
            colour = COLOURS[index % len(COLOURS)]
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
    if measures:
        axes_list[0].legend(frameon=False, labelcolor=TEXT)
    return figure


def _series(run: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    points = [(entry["step"], entry[key]) for entry in run["history"] if key in entry]
    return [step for step, _ in points], [value for _, value in points]
