"""One self-contained HTML page from results: nothing on it is fetched."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from heterolora.bench.cases.peers import VARIANTS
from heterolora.bench.harness.record import BenchRun
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

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .25rem; } h4 { margin: 1rem 0 .25rem; }
.note { opacity: .75; font-size: .9rem; margin: .4rem 0; }
.wide { overflow-x: auto; }
figure { margin: 0 0 1rem; overflow-x: auto; }
figure svg { background: #fff; border-radius: .4rem; width: 100%; box-sizing: border-box;
  padding: .5rem; min-width: 36rem; height: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .2rem .75rem .2rem 0; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; font-weight: 600; }
thead th { border-bottom: 1px solid #8888; }
:is(th, td):nth-child(-n+2), .text :is(th, td) { text-align: left; }
.text td { white-space: normal; vertical-align: top; }
tr.first td { border-top: 1px solid #8884; }
summary { cursor: pointer; padding: .3rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { opacity: .75; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
.switch { position: absolute; opacity: 0; }
.switch + label { display: inline-block; padding: .3rem .9rem; margin: 0 .4rem .4rem 0;
  border: 1px solid #8888; border-radius: 1rem; cursor: pointer; }
.switch:checked + label { background: #0072B2; border-color: #0072B2; color: #fff; }
.switch:focus-visible + label { outline: 2px solid #E69F00; outline-offset: 2px; }
section { display: none; }
@media print { section { display: block; } .switch + label { display: none; } }
"""


def write_page(runs: Sequence[BenchRun], path: Path) -> None:
    """Writes the page for `runs` to `path`: one part for each device, and a switch between them.

    A GPU has its part even before there is a result of one.

    Raises:
        BenchError: a run without the environment that the page has to show.
    """
    parts = [(name, _device(name, measured)) for name, measured in devices(runs).items()]
    if all(field_of(run, "device_type") == "cpu" for run in runs):
        parts.append(("GPU", "<h2>GPU</h2>\n<p>Not measured yet.</p>"))
    shown = "\n".join(
        f"#switch-{i}:checked ~ #part-{i} {{ display: block; }}" for i in range(len(parts))
    )
    switches = "\n".join(
        f'<input class="switch" type="radio" name="device" id="switch-{i}"'
        f'{"" if i else " checked"}><label for="switch-{i}">{escape(name)}</label>'
        for i, (name, _) in enumerate(parts)
    )
    sections = "\n".join(
        f'<section id="part-{i}">\n{body}\n</section>' for i, (_, body) in enumerate(parts)
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>heterolora bench</title>\n<style>{_STYLE}{shown}\n</style>\n</head>\n<body>\n"
        "<h1>heterolora bench</h1>\n<p>Training steps of frozen models with LoRA adapters: fused "
        f"by heterolora, against PEFT and others, timed side by side.</p>\n{switches}\n{sections}\n"
        "</body>\n</html>\n",
        encoding="utf-8",
    )


def _device(name: str, runs: Sequence[BenchRun]) -> str:
    headline = report.headline_table(runs)
    parts = [
        f"<h2>{escape(name)}</h2>",
        _table(headline) if headline.rows else "<p>No case was timed.</p>",
        _reading(runs),
        *(_picture(plot, name, runs) for plot in PLOTS),
        "<h3>All numbers</h3>",
        *(_section(part, runs) for part in SECTIONS),
        _details("Parity of every case", _table(report.parity_table(runs), "text")),
        "<h3>Without a number</h3>",
        _list(report.absences(runs)) or "<p>Nothing: every variant of every case was timed.</p>",
        "<h3>Measured on</h3>",
        *map(_environment, runs),
    ]
    return "\n".join(filter(None, parts))


def _reading(runs: Sequence[BenchRun]) -> str:
    """How the numbers were taken, how far to trust them, and what the variants are."""
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
    present = {name for timing in timed for name in timing.seconds}
    variants = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>"
        for name, what in VARIANTS.items()
        if name in present
    )
    return f"<h3>How to read it</h3>\n{_list(lines)}\n<dl>{variants}</dl>"


def _picture(name: str, device: str, runs: Sequence[BenchRun]) -> str:
    plot = PLOTS[name]
    figure = plot.draw(runs)
    if figure is None:
        body = f"<p>Not measured: {escape(plot.missing)}.</p>"
    else:
        body = (
            f'<p class="note">{escape(plot.caption)}</p>\n'
            f"<figure>{svg(figure, f'{plot.title}, {device}')}</figure>"
        )
    return f"<h3>{escape(plot.title)}</h3>\n{body}"


def _section(part: str, runs: Sequence[BenchRun]) -> str:
    tables = {
        "Time": report.time_table(runs, part),
        "Achieved against the minimum": report.work_table(runs, part),
        "Memory": report.memory_table(runs, part),
    }
    body = "\n".join(
        f"<h4>{title}</h4>\n{_table(table)}" for title, table in tables.items() if table.rows
    )
    return _details(f"{SECTIONS[part]}: {counted(len(only(runs, part)))}", body) if body else ""


def _environment(run: BenchRun) -> str:
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
    listing = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in rows.items()
    )
    command = f"<dt>command</dt><dd><code>{escape(str(field_of(run, 'command')))}</code></dd>"
    return f"<dl>{listing}{command}</dl>"


def _details(title: str, body: str) -> str:
    return f"<details>\n<summary>{escape(title)}</summary>\n{body}\n</details>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>\n" for line in lines)
    return f"<ul>\n{items}</ul>" if items else ""


def _table(table: report.Table, kind: str = "") -> str:
    """Rows of one case under one line, its name in the first of them only."""
    head = "".join(f"<th>{escape(cell).replace('/ ', '/&nbsp;')}</th>" for cell in table.head)
    lines, before = [], None
    for first, *rest in table.rows:
        new = first != before
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (first if new else "", *rest))
        lines.append(f'<tr class="{"first" if new else "more"}">{cells}</tr>')
        before = first
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>\n{note}"
    )
