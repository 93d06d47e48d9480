"""The `heterolora verify` command: runs the rungs, prints what held and what could not run here."""

import argparse
import importlib.metadata
import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from heterolora.console import add_json, write_json
from heterolora.errors import HeteroLoraError

if TYPE_CHECKING:
    from rich.console import Console

    from heterolora.verify.rungs import Request, Rung

__all__ = ["EPILOG", "SCHEMA_VERSION", "add_arguments", "run"]

EPILOG = """\
examples:
  heterolora verify
  heterolora verify --quick
  heterolora verify --rung 1 --rung 2
  heterolora verify --rung 4 --arch sm_90 --arch sm_100
  heterolora verify --json verify.json

exit status: 0 nothing failed, 1 a check failed, 2 wrong options, 130 interrupted; what could not
run here is listed with its reason and fails nothing
"""

SCHEMA_VERSION = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rung",
        action="append",
        type=int,
        choices=range(1, 6),
        metavar="N",
        help="run only this rung, 1 to 5; may be repeated; all by default",
    )
    parser.add_argument(
        "--arch",
        action="append",
        default=[],
        metavar="ARCH",
        help="GPU architecture to compile for, e.g. sm_90; may be repeated; all by default",
    )
    parser.add_argument("--quick", action="store_true", help="a subset that takes a minute or two")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the chosen rungs.

    Returns:
        0 if no check failed, 1 if any did.

    Raises:
        HeteroLoraError: an architecture that is none, or a JSON file that cannot be written.
        KeyboardInterrupt: after the table of what was decided; no JSON is written.
    """
    from rich.console import Console

    for arch in args.arch:
        if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", arch):
            raise HeteroLoraError(f"--arch {arch!r} is no architecture: give e.g. sm_90 or gfx942")

    from heterolora.verify.rungs import RUNGS, Request

    chosen = [RUNGS[number] for number in RUNGS if not args.rung or number in args.rung]
    request = Request(archs=tuple(args.arch), quick=args.quick)
    console = Console(stderr=args.json == "-", highlight=False)
    results: list[dict[str, Any]] = []
    try:
        for rung in chosen:
            results.append(_new(rung))
            _run_rung(rung, request, results[-1], console)
    except KeyboardInterrupt:
        results[-1]["status"] = "interrupted"
        raise
    finally:
        _print(results, console)
    passed = all(result["status"] != "failed" for result in results)
    if args.json is not None:
        write_json(args.json, _report(args, results, passed))
    return 0 if passed else 1


def _new(rung: "Rung") -> dict[str, Any]:
    return {
        "rung": rung.number,
        "title": rung.title,
        "status": "passed",
        "reason": None,
        "checks": 0,
        "failures": {},
        "skipped": {},
        "seconds": 0.0,
    }


def _run_rung(rung: "Rung", request: "Request", result: dict[str, Any], console: "Console") -> None:
    """Fill in the result, check by check."""
    reason = rung.missing(request)
    if reason is not None:
        result.update(status="not run", reason=reason)
        return
    start = time.perf_counter()
    with _progress(rung) as status:
        # Closed at once if interrupted, which ends a child process.
        verdicts = rung.run(request)
        try:
            for verdict in verdicts:
                if verdict.skipped is not None:
                    result["skipped"][verdict.name] = verdict.skipped
                    continue
                result["checks"] += 1
                if verdict.problem is not None:
                    result["status"] = "failed"
                    result["failures"][verdict.name] = verdict.problem
                    _line(console, f"FAILED rung {rung.number}, {verdict.name}: {verdict.problem}")
                status(f"rung {rung.number}: {result['checks']} checks, {verdict.name}")
        finally:
            close = getattr(verdicts, "close", None)
            if close is not None:
                close()
            result["seconds"] = time.perf_counter() - start
    if not result["checks"]:
        reason = next(iter(result["skipped"].values()), "no check ran")
        result.update(status="not run", reason=reason)


@contextmanager
def _progress(rung: "Rung") -> Iterator[Any]:
    """What shows the last check while a rung runs: a line on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status(escape(f"rung {rung.number}: {rung.title}")) as status:
        yield lambda text: status.update(escape(text))


def _print(results: list[dict[str, Any]], console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table("rung", "what is proved", "checks", "failed", "seconds")
    styles = {"failed": "red", "not run": "dim", "interrupted": "yellow"}
    for result in results:
        title = result["title"]
        if result["status"] == "not run":
            title += f"\nnot run here: {result['reason']}"
        elif result["status"] == "interrupted":
            title += "\ninterrupted"
        table.add_row(
            str(result["rung"]),
            escape(title),
            str(result["checks"] or "-"),
            str(len(result["failures"]) if result["checks"] else "-"),
            f"{result['seconds']:.1f}",
            style=styles.get(result["status"]),
        )
    console.print(table)
    for result in results:
        if result["status"] == "not run":
            continue
        by_reason: dict[str, list[str]] = {}
        for name, why in result["skipped"].items():
            by_reason.setdefault(why, []).append(name)
        for why, names in by_reason.items():
            what = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            _line(console, f"rung {result['rung']}, not run here: {what}: {why}")


def _line(console: "Console", text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _report(
    args: argparse.Namespace, results: list[dict[str, Any]], passed: bool
) -> dict[str, Any]:
    """What `schema.json` beside this file describes."""
    import torch

    import heterolora

    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = torch.cuda.is_available()
    return {
        "schema_version": SCHEMA_VERSION,
        "passed": passed,
        "quick": args.quick,
        "archs": args.arch,
        "versions": {
            "heterolora": heterolora.__version__,
            "torch": torch.__version__,
            "triton": triton,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name() if cuda else None,
        "rungs": results,
    }
