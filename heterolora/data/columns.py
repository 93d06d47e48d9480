"""Which columns of a data set hold text and labels, and whether every row of them can be used."""

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

from heterolora.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["Task", "find_columns", "label_ids", "label_keys", "label_names", "listed", "texts"]

Task = Literal["classification", "causal-lm"]

_TEXT_NAMES = ("text", "sentence", "review", "content", "prompt", "question", "document", "body")
_PAIR_NAMES = (
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("text1", "text2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
)
_LABEL_NAMES = ("label", "labels", "class", "target", "sentiment", "category")


def listed(names: Iterable[str]) -> str:
    """The names quoted and joined, for messages."""
    return ", ".join(repr(str(name)) for name in names)


def find_columns(
    train: "Dataset", text: str | None, pair: str | None, label: str | None, task: Task | None
) -> dict[str, str]:
    """The columns for text, pair and label; those not named are found by their usual names.

    Raises:
        DataError: a named column does not exist, or the choice is not clear.
    """
    names = list(train.column_names)
    for flag, name in (("text", text), ("pair", pair), ("label", label)):
        if name is not None and name not in names:
            close = get_close_matches(name, names, 1, 0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise DataError(f"--{flag}: no column {name!r}{hint}; columns are {listed(names)}")
    if task == "causal-lm":
        if label is not None or pair is not None:
            raise DataError(
                "a causal-lm run takes neither labels nor pairs: leave out --label and --pair"
            )
    elif label is None:
        found = [
            name for name in names if name.lower() in _LABEL_NAMES and name not in (text, pair)
        ]
        if len(found) > 1:
            raise DataError(f"several label columns: {listed(found)}; choose one with --label")
        if not found and (task == "classification" or pair is not None):
            raise DataError(f"no label column among {listed(names)}; name it with --label")
        label = found[0] if found else None
    if text is None:
        strings = [name for name in names if name not in (label, pair) and _is_text(train, name)]
        text, found_pair = _find_text(strings, names, wants_pair=label is not None and pair is None)
        pair = pair or found_pair
    columns = {"text": text, "pair": pair, "label": label}
    chosen = {role: name for role, name in columns.items() if name is not None}
    if len(set(chosen.values())) < len(chosen):
        raise DataError(f"one column cannot be two things: {chosen}")
    return chosen


def _is_text(dataset: "Dataset", name: str) -> bool:
    return getattr(dataset.features[name], "dtype", None) in ("string", "large_string")


def _find_text(strings: list[str], names: list[str], *, wants_pair: bool) -> tuple[str, str | None]:
    by_lower = {name.lower(): name for name in strings}
    pairs = [(by_lower[a], by_lower[b]) for a, b in _PAIR_NAMES if a in by_lower and b in by_lower]
    pairs = pairs if wants_pair else []
    paired = {name for both in pairs for name in both}
    singles = [
        by_lower[name] for name in _TEXT_NAMES if name in by_lower and by_lower[name] not in paired
    ]
    if len(pairs) + len(singles) == 1:
        return pairs[0] if pairs else (singles[0], None)
    if not pairs and not singles and len(strings) == 1:
        return strings[0], None
    if not strings:
        raise DataError(f"no column holds text; columns are {listed(names)}")
    raise DataError(
        f"several columns could be the text: {listed(strings)}; choose with --text (and --pair)"
    )


def texts(dataset: "Dataset", split: str, columns: Mapping[str, str]) -> dict[str, list[Any]]:
    """The ``text`` and ``pair`` values of a split, none of them empty."""
    table: dict[str, list[Any]] = {}
    for role in ("text", "pair"):
        if role not in columns:
            continue
        name = columns[role]
        if name not in dataset.column_names:
            raise DataError(
                f"the {split} split has no column {name!r}, only {listed(dataset.column_names)}"
            )
        values = list(dataset[name])
        for row, value in enumerate(values, 1):
            if not isinstance(value, str) or not value.strip():
                what = "is empty" if value is None or isinstance(value, str) else f"is {value!r}"
                raise DataError(f"{split} row {row}: column {name!r} {what}, text is needed")
        table[role] = values
    if not table["text"]:
        raise DataError(f"the {split} split has no rows")
    return table


def label_keys(dataset: "Dataset", split: str, column: str) -> list[str] | None:
    """Labels as strings; None for a validation or test split without any (the GLUE tests)."""
    if column not in dataset.column_names:
        return None
    values = list(dataset[column])
    names = getattr(dataset.features[column], "names", None)
    keys: list[str | None] = []
    for row, value in enumerate(values, 1):
        if isinstance(value, list | dict):
            raise DataError(
                f"{split} row {row}: label column {column!r} holds {value!r}, one class is needed"
            )
        if isinstance(value, float) and not math.isnan(value) and value.is_integer():
            value = int(value)
        missing = value is None or value != value or str(value).strip() in ("", "-1")
        keys.append(None if missing else names[value] if names else str(value).strip())
    if None not in keys:
        return [key for key in keys if key is not None]
    if split != "train" and not any(key is not None for key in keys):
        return None
    raise DataError(
        f"{split} row {keys.index(None) + 1}: column {column!r} has no label (empty or -1); "
        "label the row, remove it, or rename the class if -1 is one"
    )


def label_names(keys: list[str], column: str) -> tuple[str, ...]:
    """The classes in order: by number where all are numbers, else by name."""
    names = sorted(set(keys))
    try:
        numbers = [float(name) for name in names]
    except ValueError:
        numbers = []
    fractions = [name for name in names if numbers and not float(name).is_integer()]
    if fractions:
        raise DataError(
            f"label column {column!r} holds numbers such as {fractions[0]}: "
            "regression is not supported, classes are needed"
        )
    if len(names) == 1:
        raise DataError(
            f"label column {column!r} has one class only ({names[0]!r}): nothing to learn"
        )
    if len(keys) >= 20 and len(names) > len(keys) / 2:
        raise DataError(
            f"label column {column!r} has {len(names)} values in {len(keys)} rows: not classes"
        )
    return tuple(sorted(names, key=float) if numbers else names)


def label_ids(keys: list[str], names: tuple[str, ...], split: str, column: str) -> list[int]:
    """Class indices of a split whose labels must all occur in train."""
    ids = {name: index for index, name in enumerate(names)}
    for row, key in enumerate(keys, 1):
        if key not in ids:
            raise DataError(
                f"{split} row {row}: label {key!r} of column {column!r} never occurs in train, "
                f"which has {listed(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    return [ids[key] for key in keys]
