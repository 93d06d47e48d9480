"""The tasks: where their rows are, how a model for them is made, and what is reported.

The data is read from a folder that the user names, laid out as its sources are: `sick/`, `mrpc/`,
`sst2/`, `trec/`, `stsb/`. Rows of a test split without labels are of no use here, so the test split
of SST-2 and STS-B is their development set.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterolora.errors import DataError

__all__ = ["TASKS", "Example", "Splits", "Task", "Tokenised"]

# All linear layers of a BERT encoder; not the pooler, which is trained in full.
_ENCODER = r".*\.encoder\..*(query|key|value|dense)"
_SST2_ROWS = 8000


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, and its class index or score."""

    text: str
    pair: str | None
    label: int | float


Splits = tuple[list[Example], list[Example]]
"""Training and test rows."""

Tokenised = list[dict[str, Any]]
"""Rows of `input_ids`, `attention_mask`, `labels` and what else the model takes, not padded."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: also of its folder.
        labels: names of the classes; empty for a regression.
        read: the rows in a folder.
        targets: regular expression of the modules that may be adapted.
        trained: endings of the names of modules that are trained in full beside the adapter and the
            head that PEFT trains by itself.
    """

    name: str
    labels: tuple[str, ...]
    read: Callable[[Path], Splits]
    targets: str = _ENCODER
    trained: tuple[str, ...] = ("pooler",)

    @property
    def metric(self) -> str:
        """Name of what is reported beside the loss."""
        return "accuracy" if self.labels else "pearson"

    def load(self, data: Path, limit: int | None = None) -> Splits:
        """Training and test rows, at most `limit` of each, drawn with a fixed seed.

        Raises:
            DataError: no such folder, or a file that is missing or malformed.
        """
        folder = data / self.name
        if not folder.is_dir():
            raise DataError(f"{data} has no folder {self.name!r}, which holds that task's data")
        train, test = self.read(folder)
        for split, rows in (("train", train), ("test", test)):
            if not rows:
                raise DataError(f"{folder}: the {split} split has no rows")
        return _drawn(train, limit), _drawn(test, limit)

    def make(self, model: str, seed: int) -> tuple[Any, Any]:
        """(model with a head drawn by `seed`, tokenizer).

        Raises:
            ModelError: as `heterolora.models.load_model`.
        """
        from heterolora.models import load_model

        if self.labels:
            return load_model(
                model,
                task="classification",
                num_labels=len(self.labels),
                label_names=self.labels,
                seed=seed,
            )
        import torch

        # A head of two classes, cut to its first: transformers then takes the squared error.
        made, tokenizer = load_model(model, task="classification", num_labels=2, seed=seed)
        head = made.classifier
        made.classifier = torch.nn.Linear(head.in_features, 1)
        made.classifier.load_state_dict({"weight": head.weight[:1], "bias": head.bias[:1]})
        made.num_labels = made.config.num_labels = 1
        made.config.problem_type = "regression"
        return made, tokenizer

    def tokenise(self, rows: Sequence[Example], tokenizer: Any, max_length: int) -> Tokenised:
        """Token ids of each row, and its label."""
        texts = [row.text for row in rows]
        paired = rows[0].pair is not None
        pairs = [row.pair for row in rows] if paired else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        return [
            {key: encoded[key][index] for key in encoded} | {"labels": row.label}
            for index, row in enumerate(rows)
        ]

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The mean loss (cross-entropy in nats, or squared error) and the task's metric.

        Args:
            logits: [rows, classes], or [rows, 1] for a regression.
            labels: [rows].
        """
        values = logits.astype(np.float64)
        if not self.labels:
            predicted = values.reshape(-1)
            with np.errstate(invalid="ignore", divide="ignore"):
                pearson = np.corrcoef(predicted, labels)[0, 1]
            return {"loss": float(np.mean((predicted - labels) ** 2)), "pearson": float(pearson)}
        top = values.max(axis=1, keepdims=True)
        logs = values - top - np.log(np.exp(values - top).sum(axis=1, keepdims=True))
        picked = logs[np.arange(len(labels)), labels.astype(np.int64)]
        right = values.argmax(axis=1) == labels
        return {"loss": float(-picked.mean()), "accuracy": float(right.mean())}


def _drawn(rows: list[Example], limit: int | None) -> list[Example]:
    if limit is None or len(rows) <= limit:
        return rows
    return random.Random(0).sample(rows, limit)


def _table(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """These columns of a tab-separated file with a header, in which a quote is a character."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} has no column {missing[0]!r}")
            rows = [tuple(row[name] for name in columns) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for number, row in enumerate(rows, 2):
        if any(value is None for value in row):
            raise DataError(f"{path}, line {number}: fewer columns than the header has")
    return rows


def _class(label: str, labels: Sequence[str], path: Path) -> int:
    if label not in labels:
        raise DataError(f"{path}: {label!r} is none of the classes {', '.join(labels)}")
    return labels.index(label)


_SICK = ("NEUTRAL", "ENTAILMENT", "CONTRADICTION")
_TREC = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")


def _read_sick(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        path = folder / name
        table = _table(path, "sentence_A", "sentence_B", "entailment_judgment")
        return [Example(a, b, _class(label, _SICK, path)) for a, b, label in table]

    return rows("SICK_train.txt"), rows("SICK_test_annotated.txt")


def _read_mrpc(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        path = folder / name
        table = _table(path, "#1 String", "#2 String", "Quality")
        return [Example(a, b, _class(label, ("0", "1"), path)) for a, b, label in table]

    return rows("train.tsv"), rows("msr_paraphrase_test.txt")


def _read_sst2(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        path = folder / name
        table = _table(path, "sentence", "label")
        return [Example(text, None, _class(label, ("0", "1"), path)) for text, label in table]

    # The same rows in every run, so that runs differ by what they are about.
    return _drawn(rows("train.tsv"), _SST2_ROWS), rows("dev.tsv")


def _read_trec(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        path = folder / name
        try:
            lines = path.read_text(encoding="latin-1").splitlines()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error})") from error
        found = []
        for line in lines:
            label, _, question = line.partition(" ")
            found.append(Example(question, None, _class(label.partition(":")[0], _TREC, path)))
        return found

    return rows("train_5500.label"), rows("TREC_10.label")


def _read_stsb(folder: Path) -> Splits:
    def rows(name: str) -> list[Example]:
        path = folder / name
        try:
            table = _table(path, "sentence1", "sentence2", "score")
            return [Example(a, b, float(score)) for a, b, score in table]
        except ValueError as error:
            raise DataError(f"{path}: a score is no number ({error})") from error

    return rows("train.tsv"), rows("dev.tsv")


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sick", _SICK, _read_sick),
        Task("mrpc", ("different", "paraphrase"), _read_mrpc),
        Task("sst2", ("negative", "positive"), _read_sst2),
        Task("trec", _TREC, _read_trec),
        Task("stsb", (), _read_stsb),
    )
}
