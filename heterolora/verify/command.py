"""The `heterolora verify` command: runs the rungs, prints what held and what could not run here."""

import argparse
import time
from typing import TYPE_CHECKING, Any

from heterolora.errors import HeteroLoraError
from heterolora.options import add_json, write_json

if TYPE_CHECKING:
    from heterolora.verify.rungs import Rung

__all__ = ["add_arguments", "run"]

EPILOG = """\
examples:
  heterolora verify
  heterolora verify --rung spec --rung aten
  heterolora verify --json verify.json
"""

SCHEMA_VERSION = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--rung",
        action="append",
        metavar="NAME",
        help="run only this rung (spec, aten, peft); may be repeated; all by default",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chosen rungs.

    Returns:
        0 if every check held, 1 if any failed.

    Raises:
        HeteroLoraError: an unknown rung, or a JSON file that cannot be written.
    """
    from heterolora.verify.rungs import NOT_HERE, RUNGS

    chosen = args.rung or list(RUNGS)
    unknown = [name for name in chosen if name not in RUNGS]
    if unknown:
        raise HeteroLoraError(f"no rung {unknown[0]!r}; choose from {', '.join(RUNGS)}")
    results = [_run_rung(name, RUNGS[name]) for name in RUNGS if name in chosen]
    _print(results, NOT_HERE, to_stderr=args.json == "-")
    if args.json is not None:
        content = {"schema_version": SCHEMA_VERSION, "rungs": results, "not_run": NOT_HERE}
        write_json(args.json, content)
    return 1 if any(result["failures"] for result in results) else 0


def _run_rung(name: str, rung: "Rung") -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import track

    start = time.perf_counter()
    failures = {}
    console = Console(stderr=True)
    for case in track(
        rung.cases, description=rung.title, console=console, disable=not console.is_terminal
    ):
        problem = rung.check(case)
        if problem is not None:
            failures[case] = problem
    return {
        "rung": name,
        "title": rung.title,
        "checks": len(rung.cases),
        "failures": failures,
        "seconds": time.perf_counter() - start,
    }


def _print(results: list[dict[str, Any]], not_here: dict[str, str], *, to_stderr: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("rung", "what is proved", "checks", "failed", "seconds")
    for result in results:
        failed = len(result["failures"])
        table.add_row(
            result["rung"],
            result["title"],
            str(result["checks"]),
            str(failed),
            f"{result['seconds']:.1f}",
            style="red" if failed else None,
        )
    for name, why in not_here.items():
        table.add_row(name, f"not run: {why}", "-", "-", "-", style="dim")
    console = Console(stderr=to_stderr, highlight=False)
    console.print(table)
    for result in results:
        for case, problem in result["failures"].items():
            console.print(f"FAILED {result['rung']}, {case}: {problem}", markup=False)
