"""One self-contained HTML page from results: nothing on it is fetched."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from heterolora.bench.cases.peers import VARIANTS
from heterolora.bench.harness.record import BenchRun
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report import tables as report
from heterolora.bench.report.drawing import svg
from heterolora.bench.report.measures import (
    DTYPES,
    SECTIONS,
    ceilings,
    counted,
    devices,
    field_of,
    noise,
    only,
    spread,
)
from heterolora.bench.report.plots import PLOTS

__all__ = ["write_page"]


def write_page(runs: Sequence[BenchRun], path: Path) -> None:
    """Writes the page for `runs` to `path`: one part for each device, and a switch between them.

    A GPU has its part even before there is a result of one.

    Raises:
        BenchError: a run without the environment that the page has to show, or jinja2 is missing.
    """
    parts = [_device(name, measured) for name, measured in devices(runs).items()]
    if all(field_of(run, "device_type") == "cpu" for run in runs):
        parts.append({"name": "GPU", "runs": []})
    page = _template().render(parts=parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page + "\n", encoding="utf-8")


def _template() -> Any:
    # Only this needs jinja2, which comes with the extra `bench`.
    if find_spec("jinja2") is None:
        raise BenchError("the page needs jinja2, which is missing: pip install 'heterolora[bench]'")
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=PackageLoader("heterolora.bench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters["unbroken"] = lambda cell: escape(cell).replace("/ ", Markup("/&nbsp;"))
    return environment.get_template("bench.html")


def _device(name: str, runs: Sequence[BenchRun]) -> dict[str, Any]:
    """What the page says of one device."""
    timed = [r.timing for _, r in only(runs) if r.timing is not None]
    present = {variant for timing in timed for variant in timing.seconds}
    return {
        "name": name,
        "runs": runs,
        "headline": report.headline_table(runs),
        "reading": _reading(runs),
        "variants": {name: what for name, what in VARIANTS.items() if name in present},
        "pictures": [_picture(plot, name, runs) for plot in PLOTS],
        "sections": [section for part in SECTIONS if (section := _section(part, runs))["tables"]],
        "parity": report.parity_table(runs),
        "absences": list(report.absences(runs)),
        "environments": [_environment(run) for run in runs],
    }


def _reading(runs: Sequence[BenchRun]) -> list[str]:
    """How the numbers were taken, and how far to trust them."""
    results = [result for _, result in only(runs)]
    timed = [result.timing for result in results if result.timing is not None]
    lines = []
    if timed:
        low, _, high = (f"{n:g}" for n in spread([timing.rounds for timing in timed]))
        rounds = low if low == high else f"{low} to {high}"
        clocks = ", ".join(sorted({timing.clock for timing in timed}))
        lines.append(
            f"Every round runs all variants of a case once, each round in the reverse order of the "
            f"one before; {rounds} rounds a case, {clocks}. A ratio is the median of the ratios "
            "within each round."
        )
    same = noise(runs)
    if same:
        low, middle, high = (f"{ratio:.2f}" for ratio in spread(same))
        lines.append(
            "Noise: in float32 peft-lowp computes what PEFT computes, so its ratio would be 1.00. "
            f"Over {counted(len(same))} it is {low} to {high}, median {middle}. Differences of "
            "that size mean nothing."
        )
    red = sum(not result.green for result in results)
    lines.append(
        f"Parity is checked first: {len(results) - red} of {len(results)} cases green. A red case "
        "is not timed."
    )
    return lines


def _picture(name: str, device: str, runs: Sequence[BenchRun]) -> dict[str, str]:
    plot = PLOTS[name]
    figure = plot.draw(runs)
    drawn = "" if figure is None else svg(figure, f"{plot.title}, {device}")
    about = {"title": plot.title, "caption": plot.caption, "missing": plot.missing}
    return {**about, "svg": drawn}


def _section(part: str, runs: Sequence[BenchRun]) -> dict[str, Any]:
    tables = {
        "Time": report.time_table(runs, part),
        "Achieved against the minimum": report.work_table(runs, part),
        "Memory": report.memory_table(runs, part),
    }
    return {
        "title": f"{SECTIONS[part]}: {counted(len(only(runs, part)))}",
        "tables": {title: table for title, table in tables.items() if table.rows},
    }


def _environment(run: BenchRun) -> dict[str, Any]:
    versions = ", ".join(f"{name} {value}" for name, value in field_of(run, "versions").items())
    rows = {
        "device": field_of(run, "device"),
        "threads": field_of(run, "threads"),
        "versions": versions,
        "commit": field_of(run, "commit") or "unknown",
        "date": field_of(run, "date"),
        "cases": len(run.results),
    }
    for dtype in DTYPES:
        limits = ceilings(run, dtype)
        if limits is not None:
            rows[f"ceilings, {dtype}"] = (
                f"{report.digits(limits[0] / 1e9)} GB/s, {report.digits(limits[1] / 1e9)} GFLOP/s"
            )
    return {"rows": rows, "command": field_of(run, "command")}
