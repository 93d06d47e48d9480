"""Cases from a child process: Triton interprets or compiles, decided once when it is imported."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import heterolora
from heterolora.verify.cases import Case

__all__ = ["child"]


def child(what: str, *arguments: str, environment: tuple[str, ...] = ()) -> Iterator[Case]:
    """The cases of `python -m heterolora.verify.child`, as it decides them.

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
                case = Case(*json.loads(line))
                seen += 1
                failed += case.problem is not None
                yield case
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
            yield Case(f"{what} process", f"status {status} after {seen} cases: {last}")
