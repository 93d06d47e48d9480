"""The model and the data that `search` and `train` are given: their options, and loading them."""

import argparse
import logging
import re
import sys
from typing import Any

from heterolora.console import add_seed

__all__ = ["add_arguments", "load", "quiet_libraries", "targets"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model and data")
    group.add_argument("--model", default="minilm", help="minilm, a model folder, or a hub id")
    group.add_argument(
        "--data",
        required=True,
        help="csv, tsv, jsonl or parquet file, a folder of them, or a hub id[:config]",
    )
    group.add_argument("--text", help="text column; found if not named", metavar="COLUMN")
    group.add_argument("--pair", help="second text of sentence pairs; found", metavar="COLUMN")
    group.add_argument("--label", help="label column; found if not named", metavar="COLUMN")
    group.add_argument(
        "--task",
        choices=("classification", "causal-lm"),
        help="classification where there is a label column, else causal-lm",
    )
    group.add_argument(
        "--validation",
        type=_fraction_or_name,
        default=0.1,
        metavar="X",
        help="file or split to validate on, or fraction of train to cut where there is none",
    )
    group.add_argument(
        "--test", type=_fraction_or_name, default=0.1, metavar="X", help="likewise for the test"
    )
    group.add_argument("--limit", type=int, help="at most this many rows a split")
    group.add_argument(
        "--max-length", type=int, help="tokens a row; 128, or the model's limit if that is less"
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of weights"
    )
    group.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="eager, sdpa, flash_attention_2, ...; transformers chooses if not named",
    )
    group.add_argument(
        "--target-modules",
        default="all-linear",
        help="all-linear, names or suffixes with commas between, or a regular expression",
    )
    add_seed(group)


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


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenised data and the model for its task, as the options name them.

    Raises:
        DataError: the data cannot be used.
        ModelError: the model cannot be used.
    """
    # Function-level imports here and in the commands: help must not load transformers.
    from heterolora.data.models import load_model
    from heterolora.data.text import load_text_data, tokenize

    data = load_text_data(
        args.data,
        text=args.text,
        pair=args.pair,
        label=args.label,
        task=args.task,
        validation=args.validation,
        test=args.test,
        limit=args.limit,
        seed=args.seed,
    )
    rows = ", ".join(f"{name} {len(split):,}" for name, split in data.splits.items())
    chosen = ", ".join(f"{role} {name!r}" for role, name in data.columns.items())
    log = logging.getLogger("heterolora")
    log.info("%s: %s; %s rows", data.task, chosen, rows)
    for note in data.notes:
        log.info("%s", note)
    model, tokenizer = load_model(
        args.model,
        task=data.task,
        num_labels=len(data.label_names) or None,
        label_names=data.label_names,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        seed=args.seed,
    )
    return tokenize(data, tokenizer, max_length=args.max_length), model


def quiet_libraries() -> None:
    """Turn off the libraries' own reports of errors that come as one line here."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
