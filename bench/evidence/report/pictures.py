"""Pictures of the results: how far each arm is from uniform ranks, where its ranks went, what
accuracy costs, and what scores say of modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from heterolora.bench.evidence.arms.ablation import KINDS
from heterolora.bench.evidence.report.ablation import Predictions
from heterolora.bench.evidence.report.statistics import Difference, spread
from heterolora.bench.evidence.report.table import (
    BASELINE,
    differences,
    grouped,
    metric_of,
    relative_time,
)
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.drawing import COLOURS, INK, panels, plain_log
from heterolora.report.figures import Grid, layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_pngs", "write_predictions"]

_MAPS_IN_A_ROW = 4
_NAMES_IN_A_ROW = 5
# Numbers side by side that can be read.
_CELLS_IN_A_ROW = 32
_MARKERS = "osD^"

Arms = Mapping[str, list[dict[str, Any]]]


def write_pngs(entries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """`<task>-rank<r>-differences.png` and `-ranks.png` for each task and budget, and
    `<task>-costs.png` for each task.

    Raises:
        BenchError: there is nothing to draw, or the folder cannot be written.
    """
    figures: dict[str, Figure] = {}
    tasks: dict[str, dict[int, Arms]] = defaultdict(dict)
    for (task, rank), arms in grouped(entries).items():
        figures[f"{task}-rank{rank}-differences"] = _differences(task, arms)
        figures[f"{task}-rank{rank}-ranks"] = _ranks(arms)
        tasks[task][rank] = arms
    for task, of_rank in tasks.items():
        figures[f"{task}-costs"] = _costs(task, of_rank)
    return _written(figures, folder)


def write_predictions(found: Sequence[Predictions], folder: Path) -> list[Path]:
    """`<task>-scores-alone.png` and `-without.png`: a module's score against what it is worth.

    Raises:
        BenchError: the folder cannot be written.
    """
    by_picture: dict[str, list[Predictions]] = defaultdict(list)
    for prediction in found:
        by_picture[f"{prediction.task}-scores-{prediction.way}"].append(prediction)
    return _written({name: _scores(of) for name, of in by_picture.items()}, folder)


def _written(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    written = []
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150, metadata={"Software": None})
        except OSError as error:
            raise BenchError(f"{path}: cannot be written ({error.strerror})") from error
        written.append(path)
    return written


def _costs(task: str, of_rank: Mapping[int, Arms]) -> Figure:
    """The metric (or the loss) against adapter parameters and against uniform's training time at
    the same budget, each the mean over seeds with its standard deviation, an arm's budgets joined
    by a line.
    """
    metric = metric_of(next(iter(of_rank.values())))
    key, unit = (metric, 100) if metric else ("loss", 1)
    names = list(dict.fromkeys(arm for arms in of_rank.values() for arm in arms))
    rows = -(-len(names) // _NAMES_IN_A_ROW)
    figure, axes = panels(3.4 + 0.15 * rows, columns=2, share_y=True)
    for panel, cost in zip(axes, (_enabled, relative_time), strict=True):
        for number, name in enumerate(names):
            points: list[tuple[float, float, float]] = []
            for arms in of_rank.values():
                good = [e for e in arms.get(name, []) if not e["result"]["diverged"]]
                if good and (spent := cost(name, arms)) is not None:
                    mean, deviation = spread([unit * e["result"][key] for e in good])
                    points.append((spent, mean, deviation or 0.0))
            if points:
                x, y, error = zip(*points, strict=True)
                panel.errorbar(
                    x, y, error, label=name, marker=_MARKERS[number // 10 % len(_MARKERS)],
                    color=f"C{number % 10}", markersize=4.5, linewidth=1.0, elinewidth=0.8,
                )  # fmt: skip
    axes[0].set_xscale("log")
    plain_log(axes[0].xaxis, [_enabled(next(iter(arms)), arms) for arms in of_rank.values()])
    axes[0].set_xlabel("adapter parameters")
    axes[0].set_ylabel(f"test {key}, %" if metric else "test loss")
    axes[1].set_xlabel("training time / uniform")
    figure.suptitle(task, x=0.01, ha="left", size=10, color=INK)
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=min(len(names), _NAMES_IN_A_ROW),
        fontsize=7,
    )
    return figure


def _enabled(arm: str, arms: Arms) -> float:
    return fmean(entry["result"]["parameters"]["enabled"] for entry in arms[arm])


def _scores(found: Sequence[Predictions]) -> Figure:
    """A panel for each arm, modules coloured by kind, labelled with their layer."""
    rows = -(-len(found) // _MAPS_IN_A_ROW)
    figure, axes = panels(2.2 * rows + 0.4, rows, _MAPS_IN_A_ROW, share_y=True)
    for panel, prediction in zip(axes, found, strict=False):
        for number, kind in enumerate(KINDS):
            parts = [part for part in prediction.scores if part.partition("-")[2] == kind]
            x = [prediction.scores[part] for part in parts]
            y = [prediction.gains[part] for part in parts]
            panel.plot(x, y, ".", color=f"C{number}", markersize=3, label=kind)
            for part in parts:
                where = prediction.scores[part], prediction.gains[part]
                panel.annotate(part[0], where, size=6, color=f"C{number}")
        if min(prediction.scores.values()) > 0:
            panel.set_xscale("log")
        correlation = prediction.correlation
        interval = f"[{correlation.low:+.2f}, {correlation.high:+.2f}]"
        title = f"{prediction.arm}\n{correlation.value:+.2f} {interval}"
        panel.set_title(title, size=8, color=INK)
        panel.tick_params(labelsize=6)
    for panel in axes[len(found) :]:
        panel.set_visible(False)
    axes[0].set_ylabel("gain in test loss")
    figure.supxlabel("score", size=8, color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    return figure


def _differences(task: str, arms: Arms) -> Figure:
    """Loss, and metric if there is one, of each arm less those of uniform, with intervals."""
    found = {arm: differences(arm, arms) for arm in arms if arm != BASELINE}
    keys = list(differences(next(iter(arms)), arms))
    figure, axes = panels(0.9 + 0.26 * max(len(found), 1), columns=len(keys), share_y=True)
    for panel, key in zip(axes, keys, strict=True):
        for row, of_arm in enumerate(found.values()):
            if (difference := of_arm[key]) is not None:
                _interval(panel, row, difference)
        panel.axvline(0.0, color=INK, linewidth=0.8)
        panel.set_yticks(range(len(found)), list(found))
        panel.set_ylim(max(len(found), 1) - 0.5, -0.5)
        loss = key == "loss"
        panel.set_xlabel("test loss − uniform" if loss else f"{key} − uniform, points")
        panel.set_title("better to the left" if loss else "better to the right", size=8)
        panel.grid(axis="y", visible=False)
    figure.suptitle(task, x=0.01, ha="left", size=10, color=INK)
    return figure


def _interval(axes: Axes, row: int, found: Difference) -> None:
    colour = COLOURS["fused"] if found.beyond_noise else INK
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [row, row], color=colour, linewidth=1.6)
    axes.plot(found.mean, row, marker="o", markersize=4.5, color=colour)


def _ranks(arms: Arms) -> Figure:
    """Mean rank over the seeds, a panel for each arm, on one scale; those with shortcuts last."""
    maps = {arm: _mean_ranks(entries) for arm, entries in arms.items()}
    own = {arm: layer_grid(found).kinds for arm, found in maps.items()}
    names = sorted(maps, key=lambda arm: len(own[arm]))
    grid = layer_grid(name for found in maps.values() for name in found)
    columns = max(1, min(_MAPS_IN_A_ROW, _CELLS_IN_A_ROW // len(grid.layers)))
    lines = [names[start : start + columns] for start in range(0, len(names), columns)]
    kinds = [[k for k in grid.kinds if any(k in own[arm] for arm in line)] for line in lines]
    heights = [0.7 + 0.2 * len(of_line) for of_line in kinds]
    figure, axes = panels(sum(heights), len(lines), columns, share_y=True)
    gridspec = axes[0].get_gridspec()
    assert gridspec is not None
    gridspec.set_height_ratios(heights)
    top = max(rank for found in maps.values() for rank in found.values())
    for number, panel in enumerate(axes):
        if number < len(names):
            part = Grid(kinds[number // columns], grid.layers, grid.cells)
            _rank_map(panel, part, maps[names[number]], top)
            panel.set_title(names[number], size=8, color=INK)
        else:
            panel.set_visible(False)
    return figure


def _rank_map(panel: Axes, grid: Grid, ranks: dict[str, float], top: float) -> None:
    # The square root keeps ranks 1, 2 and 4 apart beside a 32.
    cells = [
        [ranks.get(grid.cells.get((kind, layer), ""), float("nan")) ** 0.5 for layer in grid.layers]
        for kind in grid.kinds
    ]
    panel.imshow(cells, cmap="viridis", vmin=0.0, vmax=top**0.5, aspect="auto")
    panel.set_yticks(range(len(grid.kinds)), grid.kinds)
    panel.set_xticks(range(len(grid.layers)), ["–" if n is None else str(n) for n in grid.layers])
    panel.tick_params(labelsize=6, length=0)
    panel.grid(visible=False)
    for y, kind in enumerate(grid.kinds):
        for x, layer in enumerate(grid.layers):
            name = grid.cells.get((kind, layer))
            if name in ranks:
                dark = (ranks[name] / top) ** 0.5 < 0.6
                panel.text(
                    x, y, f"{ranks[name]:.2g}", ha="center", va="center", size=5,
                    color="white" if dark else "black",
                )  # fmt: skip


def _mean_ranks(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for name, rank in entry["result"]["ranks"].items():
            found[name].append(rank)
    return {name: fmean(ranks) for name, ranks in found.items()}
