"""Two pictures of the results: how far each arm is from uniform ranks, and where its ranks went."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from heterolora.bench.drawing import COLOURS, INK, panels
from heterolora.bench.evidence.statistics import Difference
from heterolora.bench.evidence.table import BASELINE, differences, grouped
from heterolora.bench.harness import BenchError
from heterolora.figures import layer_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_pngs"]

_MAPS_IN_A_ROW = 4
# Numbers side by side that can be read.
_CELLS_IN_A_ROW = 32


def write_pngs(entries: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """`<task>-rank<r>-differences.png` and `-ranks.png` for each task and budget.

    Raises:
        BenchError: there is nothing to draw, or the folder cannot be written.
    """
    written = []
    for (task, rank), arms in grouped(entries).items():
        pictures = {"differences": _differences(task, arms), "ranks": _ranks(arms)}
        for name, figure in pictures.items():
            path = folder / f"{task}-rank{rank}-{name}.png"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, dpi=150, metadata={"Software": None})
            except OSError as error:
                raise BenchError(f"{path}: cannot be written ({error.strerror})") from error
            written.append(path)
    return written


def _differences(task: str, arms: Mapping[str, list[dict[str, Any]]]) -> Figure:
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


def _ranks(arms: Mapping[str, list[dict[str, Any]]]) -> Figure:
    """Mean rank over the seeds, a panel for each arm, on one scale."""
    maps = {arm: _mean_ranks(entries) for arm, entries in arms.items()}
    names = {name: None for found in maps.values() for name in found}
    grid = layer_grid(names)
    height = 0.7 + 0.2 * len(grid.kinds)
    columns = max(1, min(_MAPS_IN_A_ROW, _CELLS_IN_A_ROW // len(grid.layers)))
    rows = -(-len(maps) // columns)
    figure, axes = panels(height * rows, rows, columns, share_y=True)
    top = max(rank for found in maps.values() for rank in found.values())
    for panel, (arm, ranks) in zip(axes, maps.items(), strict=False):
        # The square root keeps ranks 1, 2 and 4 apart beside a 32.
        cells = [
            [
                ranks.get(grid.cells.get((kind, layer), ""), float("nan")) ** 0.5
                for layer in grid.layers
            ]
            for kind in grid.kinds
        ]
        panel.imshow(cells, cmap="viridis", vmin=0.0, vmax=top**0.5, aspect="auto")
        panel.set_title(arm, size=8, color=INK)
        panel.set_yticks(range(len(grid.kinds)), grid.kinds)
        panel.set_xticks(
            range(len(grid.layers)), ["–" if n is None else str(n) for n in grid.layers]
        )
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
    for panel in axes[len(maps) :]:
        panel.set_visible(False)
    return figure


def _mean_ranks(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for entry in entries:
        for name, rank in entry["result"]["ranks"].items():
            found[name].append(rank)
    return {name: fmean(ranks) for name, ranks in found.items()}
