"""What runs in a process of its own: `python -m heterolora.verify.child`.

Writes one JSON array [name, problem, skipped] a line to stdout; whatever else is printed goes to
stderr.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

import torch

from heterolora.verify.cases import Case, parity_cases, repeat_cases

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one kind of check; 0 if all held, 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m heterolora.verify.child")
    kinds = parser.add_subparsers(dest="kind", required=True)
    interpreted = kinds.add_parser("interpreted")
    interpreted.add_argument("--quick", action="store_true")
    compiled = kinds.add_parser("compiled")
    compiled.add_argument("--quick", action="store_true")
    compiled.add_argument("archs", nargs="*")
    kinds.add_parser("suite")
    args, rest = parser.parse_known_args(argv)
    torch.set_num_threads(1)
    # What a library prints must not end up between the lines.
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as stream:
        os.dup2(2, 1)
        write = _writer(stream)
        if args.kind == "suite":
            return _suite(rest, write)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        cases = _interpreted(args.quick) if args.kind == "interpreted" else _compiled(args)
        failed = False
        for case in cases:
            write(case)
            failed |= case.problem is not None
    return int(failed)


def _writer(stream: TextIO) -> Callable[[Case], None]:
    def write(case: Case) -> None:
        stream.write(json.dumps(case) + "\n")

    return write


def _interpreted(quick: bool) -> Iterator[Case]:
    """The ops on their Triton kernels under the interpreter; bf16 it computes wrongly."""
    # What nothing wrote must not pass for a result.
    torch.use_deterministic_algorithms(True)
    dtypes = ("float32",) if quick else ("float32", "float64", "float16")
    yield from parity_cases("triton", "cpu", dtypes, quick=quick)
    if not quick:
        yield from repeat_cases("triton", "cpu", torch.float32)


def _compiled(args: argparse.Namespace) -> Iterator[Case]:
    from heterolora.kernels.aot import compile as aot

    for name, problem in aot.check(args.archs or None, quick=args.quick):
        yield Case(name, problem)


class _Reporter:
    """A pytest plugin that writes each test's outcome when it is known."""

    def __init__(self, root: str, write: Callable[[Case], None]) -> None:
        self.root = root
        self.write = write

    def pytest_collectreport(self, report: object) -> None:
        if getattr(report, "failed", False):
            self.write(Case(str(getattr(report, "nodeid", "")), _last_line(report)))

    def pytest_runtest_logreport(self, report: object) -> None:
        name = str(getattr(report, "nodeid", ""))
        when, outcome = getattr(report, "when", ""), getattr(report, "outcome", "")
        if outcome == "failed":
            self.write(Case(name if when == "call" else f"{name} ({when})", _last_line(report)))
        elif outcome == "skipped":
            text = getattr(report, "longrepr", None)
            why = text[2] if isinstance(text, tuple) else text
            self.write(Case(name, skipped=str(why).removeprefix("Skipped: ")))
        elif when == "call":
            self.write(Case(name))


def _last_line(report: object) -> str:
    """What an assertion or a traceback says, in one line."""
    text = getattr(report, "longreprtext", "")
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = marked or [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _suite(arguments: Sequence[str], write: Callable[[Case], None]) -> int:
    import pytest

    plugin = _Reporter(os.getcwd(), write)
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
