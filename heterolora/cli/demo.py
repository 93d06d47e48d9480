"""`heterolora demo`: a searched adapter against a uniform one, on bundled film reviews."""

import argparse
from pathlib import Path

from heterolora.cli.inputs import quiet_libraries
from heterolora.console import add_json, add_seed, emit

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
examples:
  heterolora demo
  heterolora demo --quick --out /tmp/demo
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", help="folder of the report and the adapters")
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps")
    add_seed(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run the demo, and leave its report and both adapters in the output folder.

    Returns:
        0.

    Raises:
        HeteroLoraError: the model's weights are missing, or the folder cannot be written to.
    """
    from heterolora import demo

    quiet_libraries()
    result = demo.run(Path(args.out), quick=args.quick, seed=args.seed)
    emit(args.json, result, [f"report: {Path(args.out) / 'report.html'}"])
    return 0
