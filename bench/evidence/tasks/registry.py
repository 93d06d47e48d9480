"""The tasks, and how the files of each are read.

The data is read from a folder that the user names, laid out as its sources are: `sick/`, `mrpc/`,
`sst2/`, `trec/`, `stsb/`, `alpaca-en-demo/`. Rows of a test split without labels are of no use
here, so the test split of SST-2 and STS-B is their development set.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from heterolora.bench.evidence.tasks.instructions import Instructions, read_alpaca
from heterolora.bench.evidence.tasks.task import Example, Splits, Task, drawn
from heterolora.errors import DataError

__all__ = ["TASKS"]

_SST2_ROWS = 8000


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
    return drawn(rows("train.tsv"), _SST2_ROWS), rows("dev.tsv")


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
        Instructions("alpaca-en-demo", (), read_alpaca),
    )
}
