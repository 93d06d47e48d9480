"""The ``heterolora`` command: its parser, and what becomes of an error.

Results go to stdout, progress and errors to stderr. Exit status: 0 done, 2 a mistake of the user
(one line says which), 130 stopped by Ctrl-C; 1 a failed check, or a bug with its traceback.
"""

import argparse
import logging
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

import heterolora
from heterolora.console import Help
from heterolora.errors import HeteroLoraError

__all__ = ["COMMANDS", "main"]

# {name: (what it does, the module with its EPILOG, add_arguments(parser) and run(args) -> status)}
COMMANDS = {
    "demo": (
        "search, train and compare on bundled film reviews, and write a report",
        "heterolora.cli.demo",
    ),
    "search": (
        "decide which modules deserve which LoRA rank under a parameter budget",
        "heterolora.cli.search",
    ),
    "train": (
        "train a searched or a uniform adapter with transformers' Trainer",
        "heterolora.cli.train",
    ),
    "bench": (
        "time the fused path against PEFT in one interleaved run",
        "heterolora.bench.cli",
    ),
    "verify": (
        "prove the kernels on this machine, as far as it allows",
        "heterolora.verify.command",
    ),
    "doctor": (
        "check the environment and say how to mend it",
        "heterolora.cli.doctor",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argparse's own errors exit with 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _parser(arguments)
    args = parser.parse_args(arguments)
    args.line = shlex.join(["heterolora", *arguments])
    if args.command is None:
        parser.print_help()
        return 2
    try:
        with _messages():
            return int(args.run(args))
    except HeteroLoraError as error:
        print(f"heterolora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"heterolora: {stop or 'interrupted'}", file=sys.stderr)
        return 130


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="heterolora",
        description="Mixed-rank LoRA: search where the rank goes, and train it with fused kernels.",
        epilog="Each command explains itself: heterolora search --help",
    )
    parser.add_argument("--version", action="version", version=heterolora.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    for name, (summary, module) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=Help,
        )
        # Only the command that was chosen loads what its options need.
        if name == chosen:
            code = import_module(module)
            command.epilog = code.EPILOG
            command.set_defaults(run=code.run)
            code.add_arguments(command)
    return parser


@contextmanager
def _messages() -> Iterator[None]:
    """Show heterolora's log lines on stderr while a command runs; a terminal has a bar instead."""
    log = logging.getLogger("heterolora")
    handler = logging.StreamHandler(sys.stderr)
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if sys.stderr.isatty() else logging.INFO)
    try:
        with warnings.catch_warnings():
            # Deprecations inside transformers that PEFT runs into: nothing a user can act on.
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
