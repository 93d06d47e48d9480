"""Data sets: every format and column rule, and one clear error for every bad input."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import reviews, save_model, save_reviews

from heterolora.data.columns import find_columns
from heterolora.data.models import load_model
from heterolora.data.text import batches, load_text_data, tokenize
from heterolora.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_model(tmp_path_factory.mktemp("model"))
    return load_model(folder, task="classification", num_labels=2)[1]


def _write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def _table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the file name says."""
    kind = path.name.split(".")[1]
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
        return path
    if kind == "json":
        text = json.dumps(rows)
    elif kind == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        mark = "," if kind == "csv" else "\t"
        text = mark.join(rows[0]) + "\n"
        text += "".join(mark.join(str(value) for value in row.values()) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    "name",
    ["d.csv", "d.tsv", "d.json", "d.jsonl", "d.parquet", "d.csv.gz", "d.tsv.gz", "d.jsonl.gz"],
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    rows = [*reviews(18), {"text": "NA", "label": "pos"}, {"text": "null", "label": "neg"}]
    data = load_text_data(_table(tmp_path / name, rows), validation=0, test=0)
    assert list(data.splits) == ["train"]
    assert data.splits["train"]["text"][:] == [row["text"] for row in rows]
    assert data.label_names == ("neg", "pos")
    assert data.splits["train"]["label"][:] == [int(row["label"] == "pos") for row in rows]
    assert data.columns == {"text": "text", "label": "label"}


def test_quotes_in_tsv_are_text_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    file = _write(tmp_path / "d.tsv", '\ufefftext\tlabel\na "b\t1\nc"\t0\n"d"\t1\n')
    data = load_text_data(file, validation=0, test=0)
    assert data.splits["train"]["text"][:] == ['a "b', 'c"', '"d"']


def test_splits_of_a_folder(tmp_path: Path) -> None:
    _table(tmp_path / "train.tsv", reviews(30))
    _table(tmp_path / "dev.csv", reviews(6, 1))
    _table(tmp_path / "dev_ids.tsv", [{"id": 1}])
    _table(tmp_path / "my-test-2.jsonl", reviews(8, 2))
    (tmp_path / "README.md").write_text("not data")
    data = load_text_data(tmp_path)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 30,
        "validation": 6,
        "test": 8,
    }
    assert data.cut == {} and data.notes == ()


def test_cuts_are_seeded_disjoint_and_said(tmp_path: Path) -> None:
    rows = [{"text": f"row {index}", "label": index % 2} for index in range(50)]
    file = _table(tmp_path / "d.csv", rows)
    first, again, other = (load_text_data(file, seed=seed) for seed in (0, 0, 1))
    assert first.cut == {"test": 5, "validation": 4}
    assert "test was cut from train: 5 rows, seed 0" in first.notes
    parts = {name: split["text"][:] for name, split in first.splits.items()}
    assert sorted(sum(parts.values(), [])) == sorted(row["text"] for row in rows)
    assert parts == {name: split["text"][:] for name, split in again.splits.items()}
    assert parts["test"] != other.splits["test"]["text"][:]


def test_named_files_and_limit(tmp_path: Path) -> None:
    file = _table(tmp_path / "d.csv", reviews(40))
    extra = _table(tmp_path / "e.jsonl", reviews(12, 1))
    data = load_text_data(file, validation=str(extra), test=0, limit=10)
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 10,
        "validation": 10,
    }
    assert set(data.splits["validation"]["text"]) <= {row["text"] for row in reviews(12, 1)}


def test_unlabelled_test_is_left_out_and_said(tmp_path: Path) -> None:
    _table(tmp_path / "train.csv", reviews(30))
    _table(tmp_path / "test.csv", [{"text": "the film", "label": -1}] * 3)
    data = load_text_data(tmp_path, validation=0, test=0)
    assert list(data.splits) == ["train"]
    assert data.notes == ("test has no labels and was left out",)


@pytest.mark.parametrize(
    ("names", "named", "expected"),
    [
        (["idx", "Sentence", "Label"], {}, {"text": "Sentence", "label": "Label"}),
        (["id", "comment", "class"], {}, {"text": "comment", "label": "class"}),
        (
            ["sentence1", "sentence2", "label"],
            {},
            {"text": "sentence1", "pair": "sentence2", "label": "label"},
        ),
        (
            ["question", "sentence", "label"],
            {},
            {"text": "question", "pair": "sentence", "label": "label"},
        ),
        (["a", "b", "y"], {"text": "b", "label": "y"}, {"text": "b", "label": "y"}),
        (
            ["a", "b", "y"],
            {"text": "b", "pair": "a", "label": "y"},
            {"text": "b", "pair": "a", "label": "y"},
        ),
        (["text", "other"], {}, {"text": "text"}),
        (["text", "label"], {"task": "causal-lm"}, {"text": "text"}),
    ],
)
def test_columns_found(names: list[str], named: dict[str, Any], expected: dict[str, str]) -> None:
    numeric = {"idx", "id", "Label", "label", "class", "y"}
    row = {name: 1 if name in numeric else "words" for name in names}
    choice: dict[str, Any] = {"text": None, "pair": None, "label": None, "task": None, **named}
    assert find_columns(Dataset.from_list([row]), **choice) == expected


def test_labels_keep_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"t{index}", "label": (10, 9, 2)[index % 3]} for index in range(30)]
    data = load_text_data(_table(tmp_path / "d.csv", rows), validation=0, test=0)
    assert data.label_names == ("2", "9", "10")
    assert data.splits["train"]["label"][:3] == [2, 1, 0]


BAD = {
    "missing file": ("", {"source": "gone.csv"}, "no such file or folder: .*gone.csv"),
    "empty file": ("", {}, "d.csv is empty"),
    "header only": ("text,label\n", {}, r"d.csv has no rows \(train split\)"),
    "latin-1": (
        "text,label\ncafé,1\nx,0\n".encode("latin-1"),
        {},
        r"cannot read .*d.csv: it is not UTF-8 \(.* at byte .*convert it",
    ),
    "open quote": ('text,label\na,1\nb\n"c,0\n', {}, "cannot read .*EOF inside string"),
    "too many fields": ("text,label\na,1,2,3\nb,1\n", {}, "more fields than the header"),
    "unknown column": (
        "text,label\na,1\nb,0\n",
        {"text": "txt"},
        r"--text: no column 'txt' \(did you mean 'text'\?\); columns are 'text', 'label'",
    ),
    "unknown label": ("text,y\na,1\nb,0\n", {"label": "qqq"}, "--label: no column 'qqq'; columns"),
    "ambiguous text": (
        "one,two,label\na,b,1\nc,d,0\n",
        {},
        "several columns could be the text: 'one', 'two'; choose with --text",
    ),
    "ambiguous label": ("text,label,class\na,1,1\nb,0,0\n", {}, "several label columns: 'label'"),
    "no text": ("a,label\n1,1\n2,0\n", {}, "no column holds text; columns are 'a', 'label'"),
    "no label": ("text\na\nb\n", {"task": "classification"}, "no label column among 'text'"),
    "pair in causal-lm": (
        "text,b\na,b\nc,d\n",
        {"task": "causal-lm", "pair": "b"},
        "takes neither labels nor pairs",
    ),
    "one column twice": (
        "text,label\na,1\nb,0\n",
        {"text": "text", "pair": "text"},
        "one column cannot be two things",
    ),
    "empty text": ("text,label\na,1\n ,0\n", {}, "train row 2: column 'text' is empty"),
    "number as text": ("n,label\n3,1\n4,0\n", {"text": "n"}, "train row 1: column 'n' is 3, text"),
    "missing label": ("text,label\na,1\nb,\nc,0\n", {}, "train row 2: column 'label' has no label"),
    "label -1": ("text,label\na,1\nb,-1\n", {}, "train row 2: .*rename the class if -1 is one"),
    "one class": ("text,label\na,x\nb,x\n", {}, r"has one class only \('x'\): nothing to learn"),
    "regression": ("text,label\na,1.0\nb,3.8\n", {}, "numbers such as 3.8: regression is not"),
    "too few rows": ("text,label\na,1\nb,0\n", {}, "train has 2 rows: too few to cut test rows"),
    "bad fraction": ("text,label\na,1\nb,0\n", {"test": 0.7}, "the test fraction is 0.7"),
    "bad split": ("text,label\na,1\nb,0\n", {"test": "tset"}, "--test tset is neither a file nor"),
    "bad limit": ("text,label\na,1\nb,0\n", {"limit": 1}, "limit is 1: at least 2 rows"),
    "hub offline": ("", {"source": "imdb"}, "no file or folder is called imdb, and the hub cannot"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path: Path, case: str) -> None:
    content, options, message = BAD[case]
    options = dict(options)
    file = tmp_path / "d.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    source = options.pop("source", file)
    with pytest.raises(DataError, match=message):
        load_text_data(source, **options)


def test_bad_folders_and_other_formats(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no data file"):
        load_text_data(tmp_path)
    _table(tmp_path / "a.csv", reviews(4))
    _table(tmp_path / "b.csv", reviews(4))
    with pytest.raises(DataError, match="which file is train among a.csv, b.csv"):
        load_text_data(tmp_path)
    _table(tmp_path / "train.csv", reviews(4))
    _table(tmp_path / "train.jsonl", reviews(4))
    with pytest.raises(DataError, match="several files could be the train split"):
        load_text_data(tmp_path)
    for name, content in (("x.parquet", "junk"), ("x.jsonl", '{"text": '), ("x.csv.gz", "junk")):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            load_text_data(_write(tmp_path / name, content))
    with pytest.raises(DataError, match="x.txt is not csv, tsv, jsonl, json or parquet"):
        load_text_data(_write(tmp_path / "x.txt", "words"))


def test_splits_must_agree(tmp_path: Path) -> None:
    _table(tmp_path / "train.csv", reviews(30))
    test = _table(tmp_path / "test.csv", [*reviews(2), {"text": "a", "label": "mixed"}])
    with pytest.raises(
        DataError, match="test row 3: label 'mixed' .* never occurs in train, which"
    ):
        load_text_data(tmp_path)
    _table(test, [{"body": "a", "label": "pos"}])
    with pytest.raises(DataError, match="the test split has no column 'text', only 'body'"):
        load_text_data(tmp_path)
    rows = [{"text": f"t{index}", "label": f"c{index}"} for index in range(20)]
    with pytest.raises(DataError, match="has 20 values in 20 rows: not classes"):
        load_text_data(_table(tmp_path / "many.csv", rows))


def test_tokens_labels_and_padding(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"sentence1": "the film was good", "sentence2": "a", "label": "pos"},
        {"sentence1": "bad " * 20, "sentence2": "plot", "label": "neg"},
    ] * 2
    data = load_text_data(_table(tmp_path / "d.jsonl", rows), validation=0, test=0)
    tokens = tokenize(data, tokenizer, max_length=12)
    batch = tokens.collator([tokens.splits["train"][index] for index in (0, 1)])
    assert batch["input_ids"].shape == (2, 12)
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].sum(1).tolist() == [8, 12]
    assert tokenizer.decode(batch["input_ids"][0]).split()[:4] == ["[CLS]", "the", "film", "was"]
    with pytest.raises(DataError, match="--max-length is 65, but the tokenizer allows 64"):
        tokenize(data, tokenizer, max_length=65)
    with pytest.raises(DataError, match="--max-length is 2: at least 4"):
        tokenize(data, tokenizer, max_length=2)


def test_causal_lm_labels_are_the_ids_without_padding(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_model(tmp_path / "m", "llama"), task="causal-lm")
    file = _table(tmp_path / "d.jsonl", [{"text": "the film was good"}, {"text": "a story"}] * 2)
    data = load_text_data(file, validation=0, test=0)
    assert data.task == "causal-lm" and data.label_names == ()
    tokens = tokenize(data, tokenizer, max_length=16)
    (batch,) = batches(tokens, count=1, batch_size=4)
    assert (batch["labels"] == -100).sum() == 2 * 2
    assert (batch["labels"][batch["attention_mask"] == 1] >= 0).all()
    assert model(**batch).loss.isfinite()
    short = _table(tmp_path / "s.jsonl", [{"text": "the film"}, {"text": "film"}])
    with pytest.raises(DataError, match="train row 2 is a single token"):
        tokenize(load_text_data(short, validation=0, test=0), tokenizer)


def test_batches_are_drawn_by_seed(tmp_path: Path, tokenizer: Any) -> None:
    data = load_text_data(save_reviews(tmp_path / "d.jsonl", 40), validation=0, test=0)
    tokens = tokenize(data, tokenizer)
    first, again, other = (batches(tokens, count=3, batch_size=5, seed=s) for s in (0, 0, 1))
    assert [len(batch["labels"]) for batch in first] == [5, 5, 5]
    same = [bool((a["labels"] == b["labels"]).all()) for a, b in zip(first, again, strict=True)]
    assert all(same)
    assert first[0]["input_ids"].tolist() != other[0]["input_ids"].tolist()
    assert sum(len(batch["labels"]) for batch in batches(tokens, count=9, batch_size=32)) == 40
    with pytest.raises(DataError, match="0 batches of 5 rows"):
        batches(tokens, count=0, batch_size=5)
