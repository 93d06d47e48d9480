"""Models and rows of the train cases: the film reviews that come with heterolora, at one length or
each at its own.

Nothing is downloaded. MiniLM has its real weights and tokenizer where their package is installed;
every other model has random weights and reads bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from heterolora.bench.cases import workloads
from heterolora.bench.harness.steps import SEED, Inputs, Workload, linears
from heterolora.data.columns import Task
from heterolora.data.models import disable_dropout, embedded_minilm, load_model
from heterolora.errors import ModelError

__all__ = ["RANDOM", "TrainingLoad", "classifier", "language", "minilm", "to_longest"]

RANDOM = "random weights, bytes"

Row = dict[str, Tensor]


@dataclass
class TrainingLoad(Workload):
    """A workload whose `inputs` are the first batch of a training set.

    Attributes:
        rows: int64 `input_ids` and `attention_mask` [length], `labels` [] or [length]; on the CPU.
        task: of the model.
        weights: where the base model's come from, and what its tokens are.
    """

    rows: Sequence[Row] = ()
    task: Task = "classification"
    weights: str = RANDOM


def classifier(*, batch: int, padded: bool = True, **sizes: Any) -> TrainingLoad:
    """`workloads.bert` on the bytes of the reviews, positive or negative.

    Args:
        padded: every row has `length`; if not, a batch is as long as its longest row.
        sizes: as of `workloads.bert`.
    """
    texts, labels = _labelled()
    length = sizes["length"]
    rows = _rows([list(text.encode())[:length] for text in texts], labels, length if padded else 0)
    return _load(workloads.bert(batch=batch, **sizes), rows)


def minilm(
    *, batch: int, length: int, dtype: Any, device: Any, padded: bool = True, **sizes: int
) -> TrainingLoad:
    """all-MiniLM-L6-v2 with a new head, its dropout off; as `classifier` where the package with its
    weights is not installed.

    Args:
        padded: as of `classifier`.
    """
    try:
        embedded_minilm()
    except ModelError:
        plain = {"length": length, "dtype": dtype, "device": device, **sizes}
        return classifier(batch=batch, padded=padded, **plain)
    name = str(dtype).removeprefix("torch.")
    model, tokenizer = load_model(
        "minilm", task="classification", num_labels=2, dtype=name, seed=SEED
    )
    disable_dropout(model)
    model.to(device).requires_grad_(False).train()
    texts, labels = _labelled()
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    rows = _rows(ids, labels, length if padded else 0)
    return TrainingLoad(
        model=model,
        targets=linears(model, r"bert\.encoder\..*"),
        rows=rows,
        weights="all-MiniLM-L6-v2",
        **_batch(model, rows, batch),
    )


def language(*, batch: int, length: int, **sizes: Any) -> TrainingLoad:
    """`workloads.llama` on the bytes of all reviews, end to end, next-byte loss."""
    texts = [text for split in ("train", "validation", "test") for text, _ in _lines(split)]
    ids = torch.tensor(list("\n".join(texts).encode()))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row}
        for row in ids.split(length)
        if len(row) == length
    ]
    load = _load(workloads.llama(batch=batch, length=length, **sizes), rows)
    load.task = "causal-lm"
    return load


def _load(plain: Workload, rows: list[Row]) -> TrainingLoad:
    """`plain` with `rows` in place of its random batch."""
    count = len(plain.inputs["input_ids"])
    return TrainingLoad(
        model=plain.model, targets=plain.targets, rows=rows, **_batch(plain.model, rows, count)
    )


def _batch(model: Any, rows: list[Row], count: int) -> dict[str, Any]:
    """The fields of a Workload that a batch of the first `count` rows gives."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in to_longest(rows[:count]).items()}
    entry = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    return {
        "inputs": inputs,
        "floor_inputs": {"inputs_embeds": entry, **rest},
        "run": _loss,
        "tokens": inputs["input_ids"].numel(),
        "layers": model.config.num_hidden_layers,
    }


def _loss(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [module(**inputs).loss]


def _rows(ids: Sequence[Sequence[int]], labels: Sequence[int], length: int) -> list[Row]:
    """Rows of `length`, or of their own where that is more."""
    rows = []
    for row, label in zip(ids, labels, strict=True):
        kept = torch.zeros(max(length, len(row)), dtype=torch.int64)
        kept[: len(row)] = torch.tensor(row)
        mask = (torch.arange(len(kept)) < len(row)).long()
        rows.append({"input_ids": kept, "attention_mask": mask, "labels": torch.tensor(label)})
    return rows


def to_longest(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch as long as its longest row; ids and mask are 0 where another one has ended."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: pad_sequence(column, batch_first=True) if column[0].ndim else torch.stack(column)
        for name, column in columns.items()
    }


def _labelled() -> tuple[list[str], list[int]]:
    pairs = _lines("train")
    return [text for text, _ in pairs], [int(label == "positive") for _, label in pairs]


def _lines(split: str) -> list[tuple[str, str]]:
    path = files("heterolora") / "demo" / "reviews" / f"{split}.tsv"
    _, *lines = path.read_text(encoding="utf-8").splitlines()
    return [(text, label) for text, _, label in (line.rpartition("\t") for line in lines)]
