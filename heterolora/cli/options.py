"""The options of each command, and how their values are read."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from heterolora.errors import HeteroLoraError, SearchSpaceError

__all__ = [
    "Help",
    "add_bench",
    "add_demo",
    "add_json",
    "add_search",
    "add_train",
    "add_verify",
    "ranks",
    "shortcuts",
    "targets",
    "write_json",
]


class Help(argparse.RawDescriptionHelpFormatter):
    """Defaults after the options that have one, examples as they were written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = (None, False, argparse.SUPPRESS)
        if action.help and not any(action.default is value for value in silent):
            return f"{action.help} (default: %(default)s)"
        return action.help


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the result as JSON; - writes it to stdout in place of the text",
    )


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


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model and data")
    model.add_argument("--model", default="minilm", help="minilm, a model folder, or a hub id")
    model.add_argument(
        "--data",
        required=True,
        help="csv, tsv, jsonl or parquet file, a folder of them, or a hub id[:config]",
    )
    model.add_argument("--text", help="text column; found if not named", metavar="COLUMN")
    model.add_argument("--pair", help="second text of sentence pairs; found", metavar="COLUMN")
    model.add_argument("--label", help="label column; found if not named", metavar="COLUMN")
    model.add_argument(
        "--task",
        choices=("classification", "causal-lm"),
        help="classification where there is a label column, else causal-lm",
    )
    model.add_argument(
        "--validation",
        type=_fraction_or_name,
        default=0.1,
        metavar="X",
        help="file or split to validate on, or fraction of train to cut where there is none",
    )
    model.add_argument(
        "--test", type=_fraction_or_name, default=0.1, metavar="X", help="likewise for the test"
    )
    model.add_argument("--limit", type=int, help="at most this many rows a split")
    model.add_argument(
        "--max-length", type=int, help="tokens a row; 128, or the model's limit if that is less"
    )
    model.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights"
    )
    model.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="eager, sdpa, flash_attention_2, ...; transformers chooses if not named",
    )
    model.add_argument(
        "--target-modules",
        default="all-linear",
        help="all-linear, names or suffixes with commas between, or a regular expression",
    )
    model.add_argument("--seed", type=_seed, default=0, help="of everything random")


def add_search(parser: argparse.ArgumentParser) -> None:
    _add_model_and_data(parser)
    search = parser.add_argument_group("search")
    budget = search.add_mutually_exclusive_group()
    budget.add_argument("--budget-rank", type=int, default=8, help="as many as uniform rank R")
    budget.add_argument("--budget-params", type=int, help="LoRA parameters to spend")
    search.add_argument(
        "--step-time",
        type=float,
        metavar="X",
        help="and at most this fraction of a training step of uniform LoRA, batches of this size",
    )
    search.add_argument(
        "--measure-steps",
        action="store_true",
        help="with --step-time: fit the times to some measured steps",
    )
    search.add_argument(
        "--proxy",
        help="score: constant, grad-norm, snip, synflow, synflow-output, spectral, spectral-sigma; "
        "default: spectral in the variant that docs/evidence.md supports",
    )
    search.add_argument(
        "--head-steps",
        type=int,
        metavar="N",
        help="train the classification head N steps before scoring; undone afterwards "
        "(default: 70 without --proxy where there is one, else 0)",
    )
    search.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="score over N steps of training a uniform adapter, likewise undone",
    )
    search.add_argument(
        "--floor",
        type=int,
        metavar="R",
        help="least rank of a module or shortcut (default without --proxy: the smallest above 0 "
        "where a budget without --step-time pays for that everywhere; else 0)",
    )
    search.add_argument(
        "--by-layer",
        action=argparse.BooleanOptionalAction,
        help="every layer's scores add up to the same (default: without --proxy where a budget "
        "without --step-time does not pay for that floor)",
    )
    search.add_argument(
        "--shortcuts",
        default="none",
        metavar="KINDS",
        help="kinds of shortcuts to search too: all, or some of in-attn, in-ffn, cross-ffn, "
        "cross-layer with commas between",
    )
    search.add_argument(
        "--shortcut-budget-rank",
        type=int,
        metavar="R",
        help="a budget of their own, as many as rank R on every one; otherwise they share one",
    )
    search.add_argument("--ranks", default="0,1,2,4,8,16,32", help="ranks to choose from")
    search.add_argument("--batches", type=int, default=16, help="batches to score with")
    search.add_argument("--batch-size", type=int, default=32, help="rows a batch")
    search.add_argument("--out", default="allocation.json", help="where the allocation goes")
    search.add_argument(
        "--report", type=Path, metavar="FILE", help="also write a page of ranks and scores (HTML)"
    )
    add_json(parser)


def add_train(parser: argparse.ArgumentParser) -> None:
    _add_model_and_data(parser)
    train = parser.add_argument_group("training")
    adapter = train.add_mutually_exclusive_group()
    adapter.add_argument("--allocation", metavar="FILE", help="what search wrote")
    adapter.add_argument("--rank", type=int, default=8, help="uniform rank on every module")
    train.add_argument("--out", default="runs/heterolora", help="folder of checkpoints and adapter")
    train.add_argument("--epochs", type=float, default=3.0, help="passes over the train split")
    train.add_argument("--max-steps", type=int, help="steps, in place of epochs")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    train.add_argument("--batch-size", type=int, default=32, help="rows a batch")
    train.add_argument(
        "--save-steps",
        type=int,
        help="checkpoint and evaluate every N steps instead of every epoch",
    )
    train.add_argument(
        "--no-dropout",
        action="store_true",
        help="the model's own dropout off, for few steps (docs/evidence.md); less time on a CPU, "
        "with --bf16 and rows below 128 tokens if --attn-implementation eager is given too",
    )
    train.add_argument("--no-fuse", action="store_true", help="train with PEFT's own forward")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete the earlier run in --out")
    train.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    train.add_argument("--bf16", action="store_true", help="forward pass in bf16 autocast")
    train.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay steps as CUDA graphs, batches padded to one length; pays at up to about 1,000 "
        "tokens a batch",
    )
    add_json(parser)


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="demo", help="folder of the report and the adapters")
    parser.add_argument("--quick", action="store_true", help="fewer rows and steps")
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random")
    add_json(parser)


def add_bench(parser: argparse.ArgumentParser) -> None:
    from heterolora.bench.cli import add_arguments

    add_arguments(parser)


def add_verify(parser: argparse.ArgumentParser) -> None:
    from heterolora.verify import add_arguments

    add_arguments(parser)


def _fraction_or_name(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def targets(text: str) -> str | list[str] | None:
    """The value of --target-modules as `SearchSpace` takes it."""
    if text == "all-linear":
        return None
    if re.search(r"[\\^$*+?()\[\]|]", text):
        return text
    return [name.strip() for name in text.split(",")]


def shortcuts(text: str) -> tuple[str, ...]:
    """The value of --shortcuts as `SearchSpace` takes it."""
    if text == "none":
        return ()
    from heterolora.shortcuts.model import KINDS

    return KINDS if text == "all" else tuple(name.strip() for name in text.split(","))


def ranks(text: str) -> tuple[int, ...]:
    """The value of --ranks.

    Raises:
        SearchSpaceError: it is not a list of whole numbers.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise SearchSpaceError(
            f"--ranks {text!r}: numbers with commas between, as in 0,2,8"
        ) from error
