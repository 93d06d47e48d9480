"""Pictures from results: SVG for the page, PNG for the README.

Every function that draws takes the runs of one device and returns a figure, or None where nothing
it needs was measured.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from heterolora.bench.cases.peers import BASELINE, FLOOR
from heterolora.bench.harness.record import BenchRun, CaseResult, slug
from heterolora.bench.report.drawing import COLOURS, GRID, INK, key, panels, plain_log
from heterolora.bench.report.measures import (
    DTYPES,
    ceilings,
    devices,
    family,
    memory_cases,
    only,
    pure,
    ratios,
    saved_per_token,
    step_seconds,
    uniform,
    work_of,
)
from heterolora.bench.report.tables import names_in

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "Plot", "write_pngs"]

_RANK = 16
_PAIR = ("fused", BASELINE)
_MARKS = {"uniform": "o", "mixed": "D", "mixed, mostly rank 0": "s"}


@dataclass(frozen=True)
class Plot:
    """`draw` takes the runs of one device; `missing` says what it did not find."""

    title: str
    caption: str
    missing: str
    draw: "Callable[[Sequence[BenchRun]], Figure | None]"


def write_pngs(runs: Sequence[BenchRun], folder: Path) -> list[Path]:
    """`folder`/<device>-<plot>.png, 1680 pixels wide, for each device and plot with data."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for device, measured in devices(runs).items():
        for name, plot in PLOTS.items():
            figure = plot.draw(measured)
            if figure is not None:
                written.append(folder / f"{slug(device)}-{name}.png")
                figure.savefig(written[-1], dpi=200, metadata={"Software": None})
    return written


def _roofline(runs: Sequence[BenchRun]) -> "Figure | None":
    """FLOP/byte of the minimum work against achieved GFLOP/s, under the measured ceilings."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    limits: dict[str, tuple[float, float]] = {}
    for run, result in only(runs):
        limit = ceilings(run, result.dtype)
        if limit is None or not pure(result):
            continue
        flops, moved = work_of(result, "fused")
        times = {name: step_seconds(run, result, name) for name in _PAIR}
        rates = {name: flops / seconds / 1e9 for name, seconds in times.items() if seconds}
        if rates:
            # The lines are those of the fastest run, should the runs of a device differ.
            limits[result.dtype] = max(limit, limits.get(result.dtype, limit), key=lambda it: it[1])
            found.setdefault(result.dtype, []).append((flops / moved, rates))
    if not found:
        return None
    dtypes = _dtypes(found)
    figure, drawn = panels(3.9, columns=len(dtypes))
    for axes, dtype in zip(drawn, dtypes, strict=True):
        bandwidth, peak = (limit / 1e9 for limit in limits[dtype])
        ridge = peak / bandwidth
        left = min(ridge, *(x for x, _ in found[dtype])) / 4
        right = max(ridge, *(x for x, _ in found[dtype])) * 2
        axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color=INK, linewidth=1.4)
        for x, rates in found[dtype]:
            axes.plot([x] * len(rates), [*rates.values()], color=GRID, linewidth=1, zorder=1)
        for name in _PAIR:
            here = [(x, rates[name]) for x, rates in found[dtype] if name in rates]
            xs, ys = [x for x, _ in here], [y for _, y in here]
            axes.scatter(xs, ys, s=18, color=COLOURS[name], linewidth=0)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, peak * 1.6))
        plain_log(axes.xaxis)
        plain_log(axes.yaxis)
        axes.set_title(DTYPES[dtype], fontsize=10, color=INK)
        axes.set_xlabel("FLOP per byte of the minimum work")
        _note(axes, f"{peak:,.0f} GFLOP/s", (right, peak), (-4, 4), "right")
        middle = (left * ridge) ** 0.5
        _note(axes, f"{bandwidth:,.0f} GB/s", (middle, middle * bandwidth), (6, -9), "left")
    drawn[0].set_ylabel("GFLOP/s")
    key(figure, _PAIR)
    return figure


def _overhead(runs: Sequence[BenchRun]) -> "Figure | None":
    """Percent over the floor of square linears: a panel for each dtype and m, d along it."""
    found: dict[tuple[str, int], dict[str, dict[int, float]]] = {}
    for _, result in only(runs, "op"):
        sizes = result.shapes
        square = sizes.get("k") == sizes.get("n") and "k" in sizes
        if not (square and _plain(result) and set(result.ranks.values()) == {_RANK}):
            continue
        for name in _PAIR:
            for ratio in ratios([result], name, FLOOR):
                lines = found.setdefault((result.dtype, result.tokens), {})
                lines.setdefault(name, {})[sizes["k"]] = 100 * (ratio - 1)
    if not found:
        return None
    rows, columns = _dtypes({dtype for dtype, _ in found}), sorted({m for _, m in found})
    widths = sorted({d for lines in found.values() for line in lines.values() for d in line})
    figure, drawn = panels(0.7 + 2.1 * len(rows), len(rows), len(columns), share_y=True)
    for index, axes in enumerate(drawn):
        row, column = divmod(index, len(columns))
        for name, line in found.get((rows[row], columns[column]), {}).items():
            points = sorted((widths.index(d), value) for d, value in line.items())
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], markersize=4)
        axes.axhline(0, color=COLOURS[FLOOR], linewidth=1.5, zorder=1)
        axes.set_xlim(-0.4, len(widths) - 0.6)
        names = [str(d) if d % 1024 else f"{d // 1024}k" for d in widths]
        axes.set_xticks(range(len(widths)), names)
        if row == 0:
            axes.set_title(f"{columns[column]:,} tokens", fontsize=10, color=INK)
        if row == len(rows) - 1:
            axes.set_xlabel("d")
        if column == 0:
            axes.set_ylabel(f"{DTYPES[rows[row]]}\n% over the floor")
    key(figure, _PAIR)
    return figure


def _rank_mix(runs: Sequence[BenchRun]) -> "Figure | None":
    """Time over the floor by mean rank: a line through the uniform ranks, mixed lists beside."""
    found: dict[tuple[str, str], list[CaseResult]] = {}
    for _, result in only(runs, "op"):
        if _plain(result) and ratios([result], "fused", FLOOR) and _mean_rank(result):
            sizes = result.shapes
            shape = f"{sizes.get('k')} to {sizes.get('n')}, {result.tokens:,} tokens"
            found.setdefault((shape, result.dtype), []).append(result)
    found = {place: some for place, some in found.items() if len(set(map(_mean_rank, some))) > 2}
    if not found:
        return None
    shapes = list(dict.fromkeys(shape for shape, _ in found))
    dtypes = _dtypes({dtype for _, dtype in found})
    figure, drawn = panels(0.5 + 2.7 * len(shapes), len(shapes), len(dtypes))
    for index, axes in enumerate(drawn):
        shape, dtype = shapes[index // len(dtypes)], dtypes[index % len(dtypes)]
        results = sorted(found.get((shape, dtype), []), key=_mean_rank)
        for name in _PAIR:
            points: dict[str, list[tuple[float, float]]] = {label: [] for label in _MARKS}
            for result in results:
                for ratio in ratios([result], name, FLOOR):
                    points[_mix(result)].append((_mean_rank(result), ratio))
            for step, (label, some) in enumerate(points.items()):
                # A little to the right, so that lists of equal sum do not hide each other.
                xs, ys = [rank * 1.09**step for rank, _ in some], [ratio for _, ratio in some]
                axes.plot(
                    xs, ys, color=COLOURS[name], linestyle="none" if step else "-",
                    marker=_MARKS[label], markersize=5, fillstyle="none" if step else "full",
                )  # fmt: skip
        axes.axhline(1, color=COLOURS[FLOOR], linewidth=1.5, zorder=1)
        axes.set_xscale("log")
        plain_log(axes.xaxis, sorted({_mean_rank(result) for result in results}))
        axes.set_title(f"{shape}, {DTYPES[dtype]}", fontsize=10, color=INK)
        axes.set_xlabel("mean rank")
        if index % len(dtypes) == 0:
            axes.set_ylabel("time / floor")
    key(figure, _PAIR, _MARKS)
    return figure


def _models(runs: Sequence[BenchRun]) -> "Figure | None":
    names = (FLOOR, "fused", "compile-fused", "compile-peft")
    chosen = [result for part in ("model", "linears") for _, result in only(runs, part)]
    return _bars(chosen, BASELINE, names, "time / PEFT")


def _scoring(runs: Sequence[BenchRun]) -> "Figure | None":
    chosen = [result for _, result in only(runs, "scoring")]
    called = {"fused": "score op", BASELINE: "plain route"}
    return _bars(chosen, FLOOR, _PAIR, "time / frozen pass", called)


def _bars(
    results: Sequence[CaseResult],
    baseline: str,
    names: Sequence[str],
    label: str,
    called: dict[str, str] | None = None,
) -> "Figure | None":
    """Bars of time / `baseline` with the quartiles of the rounds, a panel a dtype."""
    timed: dict[str, dict[str, CaseResult]] = {}
    for result in results:
        if ratios([result], "fused", baseline):
            timed.setdefault(family(result), {})[result.dtype] = result
    if not timed:
        return None
    dtypes = _dtypes({dtype for some in timed.values() for dtype in some})
    shown = [name for name in names if ratios(results, name, baseline)]
    ticks, top = [], 0.0
    for some in timed.values():
        rows = max(sum(bool(ratios([r], name, baseline)) for name in shown) for r in some.values())
        ticks.append(top + (rows - 1) / 2)
        top += rows + 0.7
    figure, drawn = panels(0.8 + 0.15 * top, columns=len(dtypes), share_y=True)
    for axes, dtype in zip(drawn, dtypes, strict=True):
        for middle, some in zip(ticks, timed.values(), strict=True):
            if dtype not in some or (timing := some[dtype].timing) is None:
                continue
            here = [name for name in shown if ratios([some[dtype]], name, baseline)]
            for step, name in enumerate(here):
                found, y = timing.summary(name, baseline=baseline), middle + step
                y -= (len(here) - 1) / 2
                whiskers = [[found.ratio - found.ratio_low], [found.ratio_high - found.ratio]]
                line = {"elinewidth": 1, "ecolor": INK}
                axes.barh(y, found.ratio, 0.9, color=COLOURS[name], xerr=whiskers, error_kw=line)
                _note(axes, f"{found.ratio:.2f}", (found.ratio_high, y), (4, -2.5), "left", 7)
        axes.axvline(1, color=INK, linewidth=1)
        axes.grid(visible=False, axis="y")
        axes.set_title(DTYPES[dtype], fontsize=10, color=INK)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=6)
        axes.set_yticks(ticks, timed)
        axes.set_ylim(top - 1, -0.7)
        axes.tick_params(axis="y", length=0)
    key(figure, shown, names=called)
    return figure


def _saved(runs: Sequence[BenchRun]) -> "Figure | None":
    """Bytes that forward keeps for backward, per token and layer, a panel a dtype."""
    found = memory_cases(runs)
    if not found:
        return None
    dtypes = _dtypes({dtype for some in found.values() for dtype in some})
    figure, drawn = panels(0.9 + 0.28 * len(found), columns=len(dtypes), share_y=True)
    names = (BASELINE, "fused", FLOOR)
    for axes, dtype in zip(drawn, dtypes, strict=True):
        for y, some in enumerate(found.values()):
            if dtype not in some:
                continue
            saved = {name: saved_per_token(some[dtype], name) for name in names}
            values = {name: value / 1e3 for name, value in saved.items() if value is not None}
            axes.plot([*values.values()], [y] * len(values), color=GRID, linewidth=4, zorder=1)
            for name, value in values.items():
                axes.plot([value], [y], "o", color=COLOURS[name], markersize=6)
        axes.grid(visible=False, axis="y")
        axes.set_title(DTYPES[dtype], fontsize=10, color=INK)
        axes.set_xlabel("kB per token and layer")
        axes.set_xlim(left=0)
        axes.set_yticks(range(len(found)), found)
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    key(figure, names)
    return figure


def _training(runs: Sequence[BenchRun]) -> "Figure | None":
    """Mean loss of the seeds by step, over the range of the seeds; a panel a case."""
    found = [result for _, result in only(runs, "train") if result.training is not None]
    if not found:
        return None
    columns = min(2, len(found))
    rows = -(-len(found) // columns)
    figure, drawn = panels(0.5 + 2.5 * rows, rows, columns)
    for axes in drawn[len(found) :]:
        axes.remove()
    for axes, result in zip(drawn, found, strict=False):
        assert result.training is not None
        for name in (BASELINE, "fused"):
            by_step = list(zip(*result.training.losses[name], strict=True))
            steps = range(1, len(by_step) + 1)
            low, high = ([pick(losses) for losses in by_step] for pick in (min, max))
            axes.fill_between(steps, low, high, color=COLOURS[name], alpha=0.15, linewidth=0)
            axes.plot(steps, [fmean(losses) for losses in by_step], color=COLOURS[name])
        axes.set_title(result.case.removeprefix("train-"), fontsize=10, color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss")
    key(figure, (BASELINE, "fused"), names=names_in("train"))
    return figure


def _note(
    axes: "Axes",
    text: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    align: str,
    size: int = 8,
) -> None:
    axes.annotate(
        text, at, offset, textcoords="offset points", ha=align, fontsize=size, color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
    )  # fmt: skip


def _plain(result: CaseResult) -> bool:
    return pure(result) and not result.dropout


def _dtypes(found: Container[str]) -> list[str]:
    return [dtype for dtype in DTYPES if dtype in found]


def _mean_rank(result: CaseResult) -> float:
    return sum(result.ranks.values()) / len(result.ranks) if result.ranks else 0


def _mix(result: CaseResult) -> str:
    values = list(result.ranks.values())
    if uniform(result):
        return "uniform"
    return "mixed, mostly rank 0" if 2 * values.count(0) > len(values) else "mixed"


PLOTS: dict[str, Plot] = {
    "models": Plot(
        "Training steps of whole models",
        "Time over PEFT's; whiskers are the quartiles of the rounds. The floor is the frozen model "
        "alone.",
        "no whole model was timed",
        _models,
    ),
    "overhead": Plot(
        "Overhead over the frozen layer",
        f"Square linears, d to d, rank {_RANK}: time beyond the frozen layer's own forward and "
        "input gradient.",
        f"no square linear of rank {_RANK} was timed with its floor",
        _overhead,
    ),
    "rank-mix": Plot(
        "Ranks and time",
        "Uniform ranks as a line; mixed lists beside the uniform rank with the same sum.",
        "no linear was timed with three ranks or more",
        _rank_mix,
    ),
    "roofline": Plot(
        "Roofline",
        "Each pair of points is one case of linears alone; the lines are the bandwidth and the "
        "matmul rate measured on this machine.",
        "no ceilings were measured, or no case of linears alone was timed",
        _roofline,
    ),
    "saved": Plot(
        "Kept for backward",
        "What forward keeps, parameters excluded; uniform ranks.",
        "no memory was measured",
        _saved,
    ),
    "scoring": Plot(
        "Scoring pass",
        "The search scores every candidate: with the score op, and by the plain route (autograd, "
        "one norm at a time), over one frozen forward and backward.",
        "no scoring pass was timed",
        _scoring,
    ),
    "train": Plot(
        "Loss of training runs",
        "Mean over the seeds, and their range: a searched allocation, fused, against the same rank "
        "everywhere by PEFT, with as many trained parameters.",
        "no training run was timed",
        _training,
    ),
}
