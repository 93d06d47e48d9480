"""Tables from result files, so that no number in a document is typed by hand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heterolora.bench.cases.peers import BASELINE, FLOOR, VARIANTS
from heterolora.bench.harness.record import BenchRun, CaseResult
from heterolora.bench.report.measures import (
    DTYPES,
    SECTIONS,
    ceilings,
    devices,
    field_of,
    only,
    pure,
    ratios,
    read_folder,
    saved_per_token,
    spread,
    step_seconds,
    work_of,
)

__all__ = [
    "HEADER",
    "Table",
    "absences",
    "case_rows",
    "digits",
    "environment_line",
    "headline_table",
    "markdown_of",
    "markdown_table",
    "memory_table",
    "names_in",
    "parity_table",
    "read_folder",
    "time_table",
    "work_table",
]

HEADER = (
    "variant",
    "ms",
    "vs PEFT",
    "quartiles",
    "fastest",
    "vs floor",
    "launches",
    "peak MB",
    "saved B",
)
_OURS = ("fused", "aten", "triton", "compile-fused")
_NAMES = {
    "scoring": {"peft": "plain route", "fused": "score op", FLOOR: "frozen pass"},
    "train": {
        "peft": "PEFT, uniform",
        "fused": "fused, searched",
        "peft-searched": "PEFT, searched",
        "fused-uniform": "fused, uniform",
    },
}


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. The first column names the case, the second the variant."""

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""


def case_rows(result: CaseResult) -> list[tuple[str, ...]]:
    """One row per variant in the columns of `HEADER`; empty for a red case.

    ms: median of a step, or of one copy of its group. vs PEFT: median of the ratios within each
    round, then their quartiles. fastest: fastest round over PEFT's fastest. vs floor: as vs PEFT,
    against `base-only`. launches: as ms. peak MB (10^6 bytes): parameters, buffers, optimizer state
    and the most a step holds on top. saved B: what forward keeps for backward, bytes a token and
    layer.
    """
    if result.timing is None:
        return []
    rows: list[tuple[str, ...]] = []
    for name in sorted(result.timing.seconds, key=_order):
        summary = result.timing.summary(name)
        used = result.memory.get(name)
        saved = saved_per_token(result, name)
        rows.append(
            (
                name,
                digits(summary.milliseconds / result.repeats),
                f"{summary.ratio:.3f}",
                f"{summary.ratio_low:.2f}-{summary.ratio_high:.2f}",
                f"{summary.ratio_of_minima:.2f}",
                _ratio(result, name, FLOOR),
                _launches(result, name),
                "" if used is None else f"{used.total / 1e6:.1f}",
                "" if saved is None else f"{saved:,.0f}",
            )
        )
    return rows


def time_table(runs: Sequence[BenchRun], part: str) -> Table:
    """Times and ratios of the cases of one of `SECTIONS`, one row per variant.

    ms: median of a step, or of one copy of its group. Every ratio is the median of the ratios
    within each round. Columns for peers other than PEFT and the floor are there when one was timed,
    and filled for our own variants.
    """
    chosen = [result for _, result in only(runs, part)]
    names = names_in(part)
    timed = {name for r in chosen if r.timing is not None for name in r.timing.seconds}
    others = sorted(timed - {BASELINE, FLOOR, *_OURS}, key=_order)
    base, floor = names.get(BASELINE, "PEFT"), names.get(FLOOR, "floor")
    rows = []
    for result in chosen:
        if result.timing is None:
            continue
        for name in sorted(result.timing.seconds, key=_order):
            summary = result.timing.summary(name)
            over = ratios([result], name, FLOOR)
            rows.append(
                (
                    result.case,
                    names.get(name, name),
                    digits(summary.milliseconds / result.repeats),
                    f"{summary.ratio:.3f}",
                    f"{summary.ratio_low:.2f} to {summary.ratio_high:.2f}",
                    f"{summary.ratio_of_minima:.2f}",
                    _ratio(result, name, FLOOR),
                    f"{100 * (over[0] - 1):+.0f} %" if over and name != FLOOR else "",
                    *(_ratio(result, name, peer) if name in _OURS else "" for peer in others),
                    _launches(result, name),
                )
            )
    head = (
        "case",
        "variant",
        "ms",
        f"/ {base}",
        "quartiles",
        "fastest",
        f"/ {floor}",
        f"over {floor}",
        *(f"/ {peer}" for peer in others),
        "launches",
    )
    what = "one copy of the group" if part in ("op", "group") else "one step"
    return Table(
        head,
        rows,
        f"ms and launches of {what}: medians by {_clocks(chosen)}. Ratios are medians of the "
        "ratios within each round. fastest: fastest round over the fastest of the baseline.",
    )


def work_table(runs: Sequence[BenchRun], part: str) -> Table:
    """Achieved rates against the minimum work, where a step is nothing but its adapted linears.

    FLOP/byte, GFLOP/s and GB/s of the minimum (`harness.work`), each rate also as
    a share of the ceiling measured on the machine; "of roofline" is the time that the ceilings
    allow over the time taken.
    """
    rows = []
    for run, result in only(runs, part):
        if result.timing is None or not pure(result):
            continue
        limits = ceilings(run, result.dtype)
        for name in sorted(result.timing.seconds, key=_order):
            flops, moved = work_of(result, name)
            seconds = step_seconds(run, result, name)
            if not seconds:
                continue
            share = ["", "", ""]
            if limits is not None:
                bandwidth, peak = limits
                least = max(flops / peak, moved / bandwidth)
                parts = (flops / seconds / peak, moved / seconds / bandwidth, least / seconds)
                share = [f"{100 * value:.0f} %" for value in parts]
            rows.append(
                (
                    result.case,
                    name,
                    f"{flops / moved:.0f}",
                    digits(flops / seconds / 1e9),
                    share[0],
                    digits(moved / seconds / 1e9),
                    share[1],
                    share[2],
                )
            )
    head = (
        "case",
        "variant",
        "FLOP/byte",
        "GFLOP/s",
        "of peak",
        "GB/s",
        "of peak",
        "of roofline",
    )
    return Table(
        head,
        rows,
        "Rates of the minimum work of the ideal schedule, which reads or writes each activation "
        "and each weight once a pass. base-only has less to do than the others.",
    )


def memory_table(runs: Sequence[BenchRun], part: str) -> Table:
    """Bytes saved for backward per token and layer, and MB (10^6 bytes) of a training step."""
    names, rows = names_in(part), []
    base_name, floor_name = names.get(BASELINE, "PEFT"), names.get(FLOOR, "floor")
    for _, result in only(runs, part):
        peft, floor = (saved_per_token(result, name) for name in (BASELINE, FLOOR))
        base = result.memory.get(BASELINE)
        for name in sorted(result.memory, key=_order):
            used, saved = result.memory[name], saved_per_token(result, name)
            assert saved is not None
            rows.append(
                (
                    result.case,
                    names.get(name, name),
                    f"{saved:,.0f}",
                    f"{saved / peft:.2f}" if peft else "",
                    f"{saved - floor:+,.0f}" if floor is not None and name != FLOOR else "",
                    f"{used.resident / 1e6:.1f}",
                    f"{used.peak / 1e6:.1f}",
                    f"{used.total / 1e6:.1f}",
                    "" if base is None else f"{used.total / base.total:.2f}",
                )
            )
    head = (
        "case",
        "variant",
        "saved B",
        f"saved / {base_name}",
        f"over {floor_name}",
        "resident MB",
        "step MB",
        "peak MB",
        f"peak / {base_name}",
    )
    return Table(
        head,
        rows,
        "saved B: kept from forward for backward, bytes per token and layer (or copy of the "
        "group), parameters excluded. peak MB = resident (parameters, buffers, optimizer state) + "
        "step (the most it holds on top).",
    )


def parity_table(runs: Sequence[BenchRun]) -> Table:
    """The gate of every case. Errors are those that its rule names."""
    rows = []
    for _, result in only(runs):
        gate = result.parity
        outcome = "green" if gate.green else f"RED: {gate.reason}"
        errors = ("" if e is None else f"{e:.1e}" for e in (gate.output, gate.gradient))
        rows.append((result.case, outcome, *errors, gate.rule))
    return Table(("case", "gate", "output", "worst gradient", "rule"), rows)


def headline_table(runs: Sequence[BenchRun]) -> Table:
    """Best, median and worst ratio of fused to PEFT and to the floor, by section and dtype."""
    rows = []
    for part, title in SECTIONS.items():
        for dtype in DTYPES:
            chosen = [result for _, result in only(runs, part, dtype)]
            found = ratios(chosen, "fused", BASELINE), ratios(chosen, "fused", FLOOR)
            if found[0]:
                cells = [f"{value:.2f}" for values in found if values for value in spread(values)]
                rows.append((title, dtype, str(len(found[0])), *cells, *[""] * (6 - len(cells))))
    kinds = ("best", "median", "worst")
    head = (
        "cases",
        "dtype",
        "timed",
        *(f"/ PEFT, {kind}" for kind in kinds),
        *(f"/ floor, {kind}" for kind in kinds),
    )
    return Table(
        head,
        rows,
        "Time of fused over the time of PEFT, and over the floor: the frozen model alone, forward "
        "and input gradient. Below 1 is faster. Scoring: the score op over the plain route, and "
        "over one frozen pass.",
    )


def absences(runs: Sequence[BenchRun]) -> list[str]:
    """What has no number and why: red cases, then what failed, then what does not apply."""
    red, why = [], dict[tuple[str, str], list[str]]()
    for _, result in only(runs):
        if not result.green:
            red.append(f"{result.case}: red, not timed. {result.parity.reason}")
        for name, error in result.failed.items():
            why.setdefault((name, f"failed: {error}"), []).append(result.case)
    for _, result in only(runs):
        for name, reason in result.skipped.items():
            why.setdefault((name, f"skipped: {reason}"), []).append(result.case)
    total = len(only(runs))
    return red + [
        f"{name} {reason} ({'all cases' if len(cases) == total > 1 else ', '.join(cases)})"
        for (name, reason), cases in why.items()
    ]


def environment_line(run: BenchRun) -> str:
    """Where and with what `run` was measured, on one line."""
    versions = ", ".join(f"{name} {value}" for name, value in field_of(run, "versions").items())
    return (
        f"{field_of(run, 'device')}, {field_of(run, 'threads')} thread(s), {versions}; "
        f"commit {field_of(run, 'commit') or 'unknown'}, {field_of(run, 'date')}; "
        f"`{field_of(run, 'command')}`"
    )


def markdown_table(runs: Sequence[BenchRun]) -> str:
    """Markdown: for each device the times, work and memory of every section, then what has no
    number, and the environments.
    """
    blocks = []
    for device, measured in devices(runs).items():
        blocks.append(f"## {device}")
        for part, title in SECTIONS.items():
            tables = (time_table(measured, part), work_table(measured, part))
            for what, table in zip(
                ("time", "work", "memory"), (*tables, memory_table(measured, part)), strict=True
            ):
                if table.rows:
                    blocks += [f"### {title}: {what}", markdown_of(table), table.note]
        notes = [f"- {line}" for line in absences(measured)]
        notes += [f"- {environment_line(run)}" for run in measured]
        blocks.append("\n".join(notes))
    return "\n\n".join(blocks) + "\n"


def markdown_of(table: Table) -> str:
    """The table without its note; the first column to the left, the others to the right."""
    rule = ["---", *("---:" for _ in table.head[1:])]
    return "\n".join(_markdown_row(row) for row in (table.head, rule, *table.rows))


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def digits(value: float) -> str:
    """Three significant digits, whole above 100: 0.123, 1.23, 12.3, 1,234."""
    for limit, places in ((1, 3), (10, 2), (100, 1)):
        if value < limit:
            return f"{value:.{places}f}"
    return f"{value:,.0f}"


def names_in(part: str) -> dict[str, str]:
    """What variants are called in a section, where it is not their own name."""
    return _NAMES.get(part, {})


def _ratio(result: CaseResult, variant: str, baseline: str) -> str:
    found = ratios([result], variant, baseline)
    return f"{found[0]:.2f}" if found else ""


def _launches(result: CaseResult, variant: str) -> str:
    count = result.launches.get(variant)
    return "" if count is None else f"{count / result.repeats:,.0f}"


def _clocks(results: Iterable[CaseResult]) -> str:
    return ", ".join(sorted({r.timing.clock for r in results if r.timing is not None}))


def _order(variant: str) -> tuple[int, str]:
    known = list(VARIANTS)
    return (known.index(variant) if variant in known else len(known), variant)
