"""What every command shares: the shape of its help, `--seed`, `--json`, and where results go.

Results go to stdout, messages to stderr.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterolora.errors import HeteroLoraError

__all__ = ["Help", "add_json", "add_seed", "emit", "write_json"]


class Help(argparse.RawDescriptionHelpFormatter):
    """Prints defaults after the options that have one, and examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = (None, False, argparse.SUPPRESS)
        if action.help and not any(action.default is value for value in silent):
            return f"{action.help} (default: %(default)s)"
        return action.help


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, whose value :func:`write_json` and :func:`emit` take."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the result as JSON; - writes it to stdout in place of the text",
    )


def add_seed(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    """Add `--seed`, a whole number that every random generator takes."""
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number in 0..2**32-1")
    return int(text)


def write_json(target: str, result: Any) -> None:
    """Write the result where `--json` says: a file, or stdout for "-".

    Raises:
        HeteroLoraError: the file cannot be written.
    """
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    try:
        Path(target).write_text(text, encoding="utf-8")
    except OSError as error:
        raise HeteroLoraError(f"cannot write --json {target}: {error.strerror}") from error


def emit(target: str | None, result: Any, lines: Sequence[Any]) -> None:
    """Print a result: text to stdout, JSON to its file; for "-" JSON to stdout, text to stderr.

    Args:
        target: the value of `--json`; None writes no JSON.
        result: plain values for JSON.
        lines: strings, or what rich can print.

    Raises:
        HeteroLoraError: the JSON file cannot be written.
    """
    # Loaded here, so that a library that imports this module for its options stays light.
    from rich.console import Console

    stream = sys.stderr if target == "-" else sys.stdout
    # Without a terminal rich takes 80 columns, too few for the rank table.
    width = None if stream.isatty() else 120
    console = Console(file=stream, width=width, soft_wrap=True, highlight=False, markup=False)
    for line in lines:
        console.print(line)
    if target is not None:
        write_json(target, result)
