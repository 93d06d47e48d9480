"""Checks in a process of their own: Triton decides once, when imported, whether it interprets.

Both ends of the pipe are here: :func:`child` starts the process and yields its verdicts, and
:func:`main` is what runs in it (`python -m heterolora.verify.child`). It writes one JSON array
[name, problem, skipped] a line to stdout; whatever else is printed goes to stderr.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

import heterolora
from heterolora.verify.cases import Verdict, parity_cases, repeat_cases

__all__ = ["child", "main"]


def child(what: str, *arguments: str, environment: tuple[str, ...] = ()) -> Iterator[Verdict]:
    """Run `python -m heterolora.verify.child` and yield its verdicts as they come.

    The child is killed when the iterator is closed, Ctrl-C included.

    Args:
        what: "interpreted", "compiled" or "suite".
        arguments: passed on.
        environment: arguments of `env`: NAME=value, or -u and a name.
    """
    command = ["env", *environment, sys.executable, "-m", "heterolora.verify.child"]
    # The folder of this very package comes first on the child's path.
    root = Path(heterolora.__file__).resolve().parents[1]
    seen = failed = 0
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen(
            [*command, what, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=root,
            # Ctrl-C reaches this process alone, which then ends the child.
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                verdict = Verdict(*json.loads(line))
                seen += 1
                failed += verdict.problem is not None
                yield verdict
            status = process.wait()
        finally:
            if process.poll() is None:
                # With the processes that it started.
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdout is not None:
                with contextlib.suppress(OSError):
                    process.stdout.close()
        if (status and not failed) or not seen:
            errors.seek(0)
            lines = [line.strip() for line in errors if line.strip()]
            last = lines[-1] if lines else "no message"
            yield Verdict(f"{what} process", f"status {status} after {seen} cases: {last}")


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
        verdicts = _interpreted(args.quick) if args.kind == "interpreted" else _compiled(args)
        failed = False
        for verdict in verdicts:
            write(verdict)
            failed |= verdict.problem is not None
    return int(failed)


def _writer(stream: TextIO) -> Callable[[Verdict], None]:
    def write(verdict: Verdict) -> None:
        stream.write(json.dumps(verdict) + "\n")

    return write


def _interpreted(quick: bool) -> Iterator[Verdict]:
    """The ops on their Triton kernels under the interpreter; bf16 it computes wrongly."""
    # What nothing wrote must not pass for a result.
    torch.use_deterministic_algorithms(True)
    dtypes = ("float32",) if quick else ("float32", "float64", "float16")
    yield from parity_cases("triton", "cpu", dtypes, quick=quick)
    if not quick:
        yield from repeat_cases("triton", "cpu", torch.float32)


def _compiled(args: argparse.Namespace) -> Iterator[Verdict]:
    from heterolora.kernels.aot import compile as aot

    for name, problem in aot.check(args.archs or None, quick=args.quick):
        yield Verdict(name, problem)


class _Reporter:
    """A pytest plugin that writes each test's outcome when it is known."""

    def __init__(self, root: str, write: Callable[[Verdict], None]) -> None:
        self.root = root
        self.write = write

    def pytest_collectreport(self, report: object) -> None:
        if getattr(report, "failed", False):
            self.write(Verdict(str(getattr(report, "nodeid", "")), _last_line(report)))

    def pytest_runtest_logreport(self, report: object) -> None:
        name = str(getattr(report, "nodeid", ""))
        when, outcome = getattr(report, "when", ""), getattr(report, "outcome", "")
        if outcome == "failed":
            self.write(Verdict(name if when == "call" else f"{name} ({when})", _last_line(report)))
        elif outcome == "skipped":
            text = getattr(report, "longrepr", None)
            why = text[2] if isinstance(text, tuple) else text
            self.write(Verdict(name, skipped=str(why).removeprefix("Skipped: ")))
        elif when == "call":
            self.write(Verdict(name))


def _last_line(report: object) -> str:
    """What an assertion or a traceback says, in one line."""
    text = getattr(report, "longreprtext", "")
    marked = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    lines = marked or [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _suite(arguments: Sequence[str], write: Callable[[Verdict], None]) -> int:
    import pytest

    plugin = _Reporter(os.getcwd(), write)
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-q"]
    return int(pytest.main([*options, *arguments], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
