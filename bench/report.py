"""Tables from result files, so that no number in a document is typed by hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from heterolora.bench.harness import BenchError
from heterolora.bench.models import VARIANTS
from heterolora.bench.record import BenchRun, CaseResult, read_run

__all__ = ["HEADER", "case_rows", "environment_line", "markdown_table", "read_folder"]

HEADER = (
    "variant",
    "ms",
    "vs PEFT",
    "quartiles",
    "fastest",
    "vs floor",
    "peak MB",
    "saved/token",
)
FLOOR = "base-only"


def case_rows(result: CaseResult) -> list[tuple[str, ...]]:
    """One row per variant in the columns of `HEADER`; empty for a red case.

    ms: median step. vs PEFT: median of the ratios within each round, then their quartiles. fastest:
    fastest round over PEFT's fastest. vs floor: as vs PEFT, against `base-only`. peak MB (10^6
    bytes): parameters, buffers, optimizer state and the most a step holds on top. saved: what
    forward keeps for backward.
    """
    if result.timing is None:
        return []
    rows: list[tuple[str, ...]] = []
    for name in sorted(result.timing.seconds, key=_order):
        summary = result.timing.summary(name)
        floor = ""
        if FLOOR in result.timing.seconds:
            floor = f"{result.timing.summary(name, baseline=FLOOR).ratio:.2f}"
        used = result.memory.get(name)
        rows.append(
            (
                name,
                f"{summary.milliseconds:.1f}",
                f"{summary.ratio:.3f}",
                f"{summary.ratio_low:.2f}-{summary.ratio_high:.2f}",
                f"{summary.ratio_of_minima:.2f}",
                floor,
                "" if used is None else f"{used.total / 1e6:.1f}",
                "" if used is None else f"{used.saved / result.tokens:,.0f}",
            )
        )
    return rows


def _order(variant: str) -> tuple[int, str]:
    known = list(VARIANTS)
    return (known.index(variant) if variant in known else len(known), variant)


def environment_line(run: BenchRun) -> str:
    """Where and with what `run` was measured, on one line."""
    found = run.environment
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['device']}, {found['threads']} thread(s), {versions}; "
        f"commit {found['commit'] or 'unknown'}, {found['date']}; `{found['command']}`"
    )


def markdown_table(runs: Sequence[BenchRun]) -> str:
    """One Markdown table per run with its environment below; red cases as lines without numbers."""
    blocks = []
    for run in runs:
        head = ("case", *HEADER)
        lines = [_markdown_row(head), _markdown_row("---" for _ in head)]
        notes = []
        for result in run.results:
            lines += [_markdown_row((result.case, *row)) for row in case_rows(result)]
            if not result.green:
                notes.append(f"- {result.case}: red, not timed. {result.parity.reason}")
            notes += [f"- {result.case}, {name}: {why}" for name, why in result.failed.items()]
        clocks = sorted({r.timing.clock for r in run.results if r.timing is not None})
        if clocks:
            notes.append(f"\nms and ratios by {', '.join(clocks)}. {environment_line(run)}")
        blocks.append("\n".join([*lines, "", *notes]))
    return "\n\n".join(blocks) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def read_folder(folder: Path) -> list[BenchRun]:
    """All result files below `folder`, in order of their paths, those of one environment joined.

    Raises:
        BenchError: no such folder, no result in it, or a malformed file.
    """
    if not folder.is_dir():
        raise BenchError(f"{folder}: no such folder")
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise BenchError(f"{folder}: no result files (*.json) in it")
    joined: list[BenchRun] = []
    for run in map(read_run, paths):
        same = next((known for known in joined if known.environment == run.environment), None)
        if same is None:
            joined.append(run)
        else:
            same.results.extend(run.results)
    return joined
