"""What a task is: how its rows are loaded, a model for them is made, and what is reported."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from heterolora.errors import DataError, ModelError

__all__ = ["Example", "Splits", "Task", "Tokenised", "drawn"]

# All linear layers of a BERT encoder; not the pooler, which is trained in full.
_ENCODER = r".*\.encoder\..*(query|key|value|dense)"


@dataclass(frozen=True)
class Example:
    """A text, or a pair of them, and its class index or score; of an instruction set prompt,
    response and no label."""

    text: str
    pair: str | None
    label: int | float | None


Splits = tuple[list[Example], list[Example]]
"""Training and test rows."""

Tokenised = list[dict[str, Any]]
"""Rows of `input_ids`, `attention_mask`, `labels` and what else the model takes, not padded."""


@dataclass(frozen=True)
class Task:
    """One task: classes or a score of a text, or of a pair of them.

    Attributes:
        name: also of its folder.
        labels: names of the classes; empty for a regression.
        read: the rows in a folder.
        targets: regular expression of the modules that may be adapted.
        trained: endings of the names of modules that are trained in full beside the adapter and the
            head that PEFT trains by itself.
        evaluated: rows of an evaluation batch.
        adapts: `targets` in words.
        encoder: the model is BERT's encoder with a task head.
    """

    # On a CPU, 128 took 1.6 times as long a row.
    evaluated: ClassVar[int] = 32
    adapts: ClassVar[str] = "a BERT encoder"
    encoder: ClassVar[bool] = True

    name: str
    labels: tuple[str, ...]
    read: Callable[[Path], Splits]
    targets: str = _ENCODER
    trained: tuple[str, ...] = ("pooler",)

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
        return drawn(train, limit), drawn(test, limit)

    def check(self, model: str) -> None:
        """Whether a model is of use here.

        Raises:
            ModelError: it cannot be loaded, or has none of the `targets`.
        """
        made, _ = self.make(model, 0)
        if not any(re.fullmatch(self.targets, name) for name, _ in made.named_modules()):
            raise ModelError(
                f"task {self.name} adapts the linear layers of {self.adapts}, and the model "
                f"{model} has none; give another (--model)"
            )

    def make(self, model: str, seed: int) -> tuple[Any, Any]:
        """(model with a head drawn by `seed`, tokenizer).

        Raises:
            ModelError: as `heterolora.data.models.load_model`.
        """
        from heterolora.data.models import load_model

        if self.labels:
            return load_model(
                model,
                task="classification",
                num_labels=len(self.labels),
                label_names=self.labels,
                seed=seed,
            )
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

    def collator(self, tokenizer: Any) -> Callable[..., Any]:
        """Makes a batch of tokenised rows."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    @property
    def reduced(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """What `measure` needs of a batch's logits and labels; None for the logits themselves."""
        return None

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The mean loss (cross-entropy in nats, or squared error) and the task's metric.

        Args:
            logits: [rows, classes], or [rows, 1] for a regression.
            labels: [rows].
        """
        values = logits.astype(np.float64)
        if not self.labels:
            predicted = values.reshape(-1)
            # One prediction for all rows has no correlation, and says as little as one of 0.
            constant = bool(np.all(predicted == predicted[0]))
            # Of a run that diverged.
            with np.errstate(invalid="ignore", over="ignore"):
                pearson = 0.0 if constant else float(np.corrcoef(predicted, labels)[0, 1])
                loss = float(np.mean((predicted - labels) ** 2))
            return {"loss": loss, "pearson": pearson}
        top = values.max(axis=1, keepdims=True)
        logs = values - top - np.log(np.exp(values - top).sum(axis=1, keepdims=True))
        picked = logs[np.arange(len(labels)), labels.astype(np.int64)]
        right = values.argmax(axis=1) == labels
        return {"loss": float(-picked.mean()), "accuracy": float(right.mean())}


def drawn(rows: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` of the rows, the same ones every time."""
    if limit is None or len(rows) <= limit:
        return rows
    return random.Random(0).sample(rows, limit)
