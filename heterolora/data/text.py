"""Text data sets from files, folders or the hub, and their tokenised form.

The result has up to three splits named train, validation and test, and the columns text, pair and
label whatever the source calls them. Every row is checked when it is loaded, so nothing can fail on
a bad label after hours of training.
"""

import gzip
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterolora.data.columns import (
    Task,
    find_columns,
    label_ids,
    label_keys,
    label_names,
    listed,
    texts,
)
from heterolora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["Task", "TextData", "TokenizedData", "batches", "load_text_data", "tokenize"]

_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Without keep_default_na a sentence such as "NA" or "null" turns into a missing value.
    ".csv": ("csv", {"keep_default_na": False}),
    # In tab-separated corpora a quote character is text (csv.QUOTE_NONE is 3).
    ".tsv": ("csv", {"delimiter": "\t", "quoting": 3, "keep_default_na": False}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "dev": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class TextData:
    """Checked text splits.

    Attributes:
        splits: train and, where present, validation and test; columns ``text`` and, where they
            exist, ``pair`` and ``label`` (class index).
        task: ``"classification"`` with labels, ``"causal-lm"`` without.
        columns: what the source calls each of text, pair and label.
        label_names: class names by index; empty for causal-lm.
        cut: names of the splits that were cut from train, with their row counts.
        notes: what was decided that a reader of the result should know, one sentence each.
    """

    splits: "DatasetDict"
    task: Task
    columns: dict[str, str]
    label_names: tuple[str, ...]
    cut: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TokenizedData:
    """Token ids by split, and the collator that pads a list of rows to a batch of tensors."""

    splits: "DatasetDict"
    tokenizer: Any
    collator: Callable[[list[Any]], Mapping[str, Any]]
    task: Task
    label_names: tuple[str, ...]


def load_text_data(
    source: str | Path,
    *,
    text: str | None = None,
    label: str | None = None,
    pair: str | None = None,
    task: Task | None = None,
    validation: float | str | Path = 0.1,
    test: float | str | Path = 0.1,
    limit: int | None = None,
    seed: int = 0,
) -> TextData:
    """Load and check a data set.

    Args:
        source: a csv, tsv, jsonl, json or parquet file (the text formats also as .gz), a folder of
            them whose file names say train, dev/valid and test, or a hub id, ``"id"`` or
            ``"id:config"``. Files are UTF-8.
        text, label, pair: column names; found by their usual names when not given.
        task: by default classification where there is a label column, else causal-lm.
        validation, test: a file or a split name to use as that split, or the fraction of train to
            cut for it when the source has no such split (0: do without).
        limit: at most this many rows in each split, drawn by ``seed``.
        seed: decides the rows cut and drawn.

    Raises:
        DataError: with the file, column, split or row at fault.
    """
    if limit is not None and limit < 2:
        raise DataError(f"limit is {limit}: at least 2 rows are needed (--limit)")
    raw, notes = _load_splits(source)
    for name, choice in (("validation", validation), ("test", test)):
        if not isinstance(choice, int | float):
            raw[name] = _chosen_split(choice, raw, name)
        elif not 0 <= choice < 0.5:
            raise DataError(
                f"the {name} fraction is {choice}: use 0 to 0.49, or name a file or split"
            )
    if "train" not in raw:
        raise DataError(f"{source} has no train split, only {listed(raw)}")
    raw = {name: raw[name] for name in ("train", "validation", "test") if name in raw}
    columns = find_columns(raw["train"], text, pair, label, task)
    task = task or ("classification" if "label" in columns else "causal-lm")

    names: tuple[str, ...] = ()
    tables = {}
    for name, dataset in raw.items():
        tables[name] = texts(dataset, name, columns)
        if task == "classification":
            keys = label_keys(dataset, name, columns["label"])
            if keys is None:
                notes.append(f"{name} has no labels and was left out")
                del tables[name]
                continue
            if name == "train":
                names = label_names(keys, columns["label"])
            tables[name]["label"] = label_ids(keys, names, name, columns["label"])

    cut: dict[str, int] = {}
    for offset, (name, choice) in enumerate((("test", test), ("validation", validation))):
        if name not in tables and isinstance(choice, int | float) and choice > 0:
            tables["train"], tables[name] = _cut(tables["train"], name, choice, seed + offset)
            cut[name] = len(tables[name]["text"])
            notes.append(f"{name} was cut from train: {cut[name]} rows, seed {seed}")
    if limit is not None:
        tables = {name: _drawn(table, limit, seed) for name, table in tables.items()}
    if task == "classification" and len(set(tables["train"]["label"])) < 2:
        raise DataError(
            "the train rows kept have one class only: raise --limit or cut less from train"
        )

    from datasets import Dataset, DatasetDict

    order = [name for name in ("train", "validation", "test") if name in tables]
    splits = DatasetDict({name: Dataset.from_dict(tables[name]) for name in order})
    return TextData(splits, task, columns, names, cut, tuple(notes))


def tokenize(data: TextData, tokenizer: Any, *, max_length: int | None = None) -> TokenizedData:
    """Token ids for every split, cut off at ``max_length``; a batch is padded to its longest row.

    Causal-lm rows get ``labels`` equal to their ids, -100 on padding; classification rows their
    class index. Without `max_length` it is 128, or the tokenizer's limit if that is less.

    Raises:
        DataError: ``max_length`` is too small or larger than the tokenizer's own limit.
    """
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

    if max_length is None:
        max_length = min(128, tokenizer.model_max_length)
    if max_length < 4:
        raise DataError(f"--max-length is {max_length}: at least 4 tokens are needed")
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"--max-length is {max_length}, but the tokenizer allows {tokenizer.model_max_length}"
        )
    causal = data.task == "causal-lm"

    def encode(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        pairs = rows.get("pair")
        ids = dict(tokenizer(rows["text"], pairs, truncation=True, max_length=max_length))
        ids["labels"] = [list(row) for row in ids["input_ids"]] if causal else rows["label"]
        return ids

    splits = data.splits.map(
        encode, batched=True, remove_columns=data.splits["train"].column_names, desc="tokenize"
    )
    if causal:
        for name, dataset in splits.items():
            for row, ids in enumerate(dataset["input_ids"], 1):
                if len(ids) < 2:
                    raise DataError(
                        f"{name} row {row} is a single token: nothing to predict, remove the row"
                    )
    collator: Callable[[list[Any]], Mapping[str, Any]] = (
        DataCollatorForSeq2Seq(tokenizer) if causal else DataCollatorWithPadding(tokenizer)
    )
    return TokenizedData(splits, tokenizer, collator, data.task, data.label_names)


def batches(
    data: TokenizedData, *, count: int, batch_size: int, seed: int = 0, split: str = "train"
) -> list[dict[str, Any]]:
    """``count`` batches of ``batch_size`` different rows, fewer when the split is short."""
    import numpy as np

    if count < 1 or batch_size < 1:
        raise DataError(f"{count} batches of {batch_size} rows: both must be at least 1")
    dataset = data.splits[split]
    order = np.random.default_rng(seed).permutation(len(dataset))[: count * batch_size]
    starts = range(0, len(order), batch_size)
    return [
        dict(data.collator([dataset[int(row)] for row in order[start : start + batch_size]]))
        for start in starts
    ]


def _load_splits(source: str | Path) -> tuple[dict[str, "Dataset"], list[str]]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = _split_files(path)
        return {name: _read(files, name) for name, files in found.items()}, []
    if path.is_file():
        return {"train": _read([path], "train")}, []
    if _format(path) is not None or str(source).startswith(("/", ".", "~")):
        raise DataError(f"no such file or folder: {source}")
    return _load_from_hub(str(source))


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split; train.* wins over train-part-1.* and the like."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _format(path))
    if not files:
        raise DataError(
            f"{folder} has no data file (csv, tsv, jsonl, json, parquet; optionally .gz)"
        )
    exact: dict[str, list[Path]] = {}
    loose: dict[str, list[Path]] = {}
    for path in files:
        stem = path.name.split(".")[0].lower()
        if stem in _SPLIT_WORDS:
            exact.setdefault(_SPLIT_WORDS[stem], []).append(path)
            continue
        for word in re.split(r"[-_ ]+", stem):
            split = _SPLIT_WORDS.get(word.rstrip("0123456789"))
            if split:
                loose.setdefault(split, []).append(path)
                break
    found = {name: exact.get(name) or loose[name] for name in {**exact, **loose}}
    if not found and len(files) == 1:
        return {"train": files}
    if "train" not in found:
        names = ", ".join(path.name for path in files)
        raise DataError(
            f"{folder}: which file is train among {names}? name one train.* or pass a file"
        )
    for name, paths in found.items():
        if len({_format(path) for path in paths}) > 1 or len(exact.get(name, ())) > 1:
            names = ", ".join(path.name for path in paths)
            raise DataError(f"{folder}: several files could be the {name} split: {names}")
    return found


def _read(paths: Sequence[Path], split: str) -> "Dataset":
    from datasets import load_dataset

    kind = _format(paths[0])
    shown = ", ".join(str(path) for path in paths)
    if kind is None:
        raise DataError(
            f"{shown} is not csv, tsv, jsonl, json or parquet; rename it if its content is"
        )
    for path in paths:
        if _is_empty(path):
            raise DataError(f"{path} is empty")
    builder, options = _READERS[kind]
    try:
        dataset = load_dataset(
            builder, data_files=[str(path) for path in paths], split="train", **options
        )
    # The readers let errors of pandas, pyarrow, json and gzip through as they are.
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise DataError(f"{shown} has no rows ({split} split)") from error
        raise DataError(f"cannot read {shown}: {_reason(error)}") from error
    if any(name.startswith("__index_level_") for name in dataset.column_names):
        raise DataError(
            f"{shown}: rows have more fields than the header; quote the separators inside a text"
        )
    if len(dataset) == 0:
        raise DataError(f"{shown} has no rows ({split} split)")
    return dataset


def _is_empty(path: Path) -> bool:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return not file.read(1)
    except (OSError, EOFError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: `datasets` wraps what went wrong in general errors."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UnicodeDecodeError):
            return f"it is not UTF-8 ({cause.reason} at byte {cause.start}); convert it with iconv"
    return " ".join(str(chain[-1]).split()) or type(chain[-1]).__name__


def _load_from_hub(source: str) -> tuple[dict[str, "Dataset"], list[str]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    name, _, config = source.partition(":")
    try:
        loaded = load_dataset(name, config or None)
    except DatasetNotFoundError as error:
        raise DataError(f"no file, folder or hub data set is called {source}") from error
    except ConnectionError as error:
        raise DataError(
            f"no file or folder is called {source}, and the hub cannot be reached to look there"
        ) from error
    # Every hub data set can fail in its own way; the message carries the cause.
    except Exception as error:
        raise DataError(f"cannot load {source} from the hub: {_reason(error)}") from error
    raw: dict[str, Dataset] = {}
    unused = []
    for split, dataset in loaded.items():
        known = _SPLIT_WORDS.get(str(split).lower())
        raw[known or str(split)] = dataset
        if known is None:
            unused.append(str(split))
    return raw, [f"unused splits: {', '.join(unused)}"] if unused else []


def _chosen_split(choice: str | Path, raw: Mapping[str, "Dataset"], name: str) -> "Dataset":
    path = Path(choice).expanduser()
    if path.is_file():
        return _read([path], name)
    if str(choice) in raw:
        return raw[str(choice)]
    raise DataError(f"--{name} {choice} is neither a file nor a split; splits here: {listed(raw)}")


def _cut(
    table: dict[str, list[Any]], name: str, fraction: float, seed: int
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    import numpy as np

    rows = len(table["text"])
    taken = max(1, round(rows * fraction))
    if rows - taken < 2:
        raise DataError(
            f"train has {rows} rows: too few to cut {name} rows from; "
            f"give --{name} FILE or --{name} 0"
        )
    order = np.random.default_rng(seed).permutation(rows)
    return _select(table, sorted(order[taken:])), _select(table, sorted(order[:taken]))


def _drawn(table: dict[str, list[Any]], limit: int, seed: int) -> dict[str, list[Any]]:
    import numpy as np

    rows = len(table["text"])
    if rows <= limit:
        return table
    return _select(table, sorted(np.random.default_rng(seed).permutation(rows)[:limit]))


def _select(table: dict[str, list[Any]], rows: Sequence[Any]) -> dict[str, list[Any]]:
    return {name: [values[row] for row in rows] for name, values in table.items()}
