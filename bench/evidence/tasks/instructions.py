"""Instruction sets: a causal language model learns to continue a prompt with its response.

The prompt is "### Instruction:", the instruction, an empty line, the input and an empty line if
there is one, and "### Response:", each on lines of its own. Response and end token follow it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from heterolora.bench.evidence.tasks.task import Example, Splits, Task, Tokenised
from heterolora.errors import DataError

__all__ = ["Instructions", "read_alpaca"]

# All linear layers of a Llama decoder.
_DECODER = r".*\.layers\..*\.(q|k|v|o|gate|up|down)_proj"
_TEST = 0.15
# Labels that the loss of transformers leaves out.
_NO_LABEL = -100


@dataclass(frozen=True)
class Instructions(Task):
    """A task whose model is a causal language model with the layers of a Llama. Its loss is that of
    the responses' tokens, and nothing is reported beside it.
    """

    targets: str = _DECODER
    trained: tuple[str, ...] = ()

    # The logits of 8 x 128 tokens and 49,152 words are 201 MB in float32.
    evaluated: ClassVar[int] = 8
    adapts: ClassVar[str] = "a decoder like Llama's"
    encoder: ClassVar[bool] = False

    def make(self, model: str, seed: int) -> tuple[Any, Any]:
        """(causal language model, tokenizer); all of it comes from the folder.

        Raises:
            ModelError: as `heterolora.data.models.load_model`.
        """
        from heterolora.data.models import load_model

        made, tokenizer = load_model(model, task="causal-lm", seed=seed)
        # Keys and values of earlier tokens, which only generation uses.
        made.config.use_cache = False
        return made, tokenizer

    def tokenise(self, rows: Sequence[Example], tokenizer: Any, max_length: int) -> Tokenised:
        """Token ids of prompt, response and end token, cut at `max_length`; the labels are those of
        response and end token. A row whose prompt alone fills `max_length` has no label, so it is
        left out: which rows these are depends on tokenizer and `max_length` only.

        Raises:
            DataError: no row is left.
        """
        found = []
        for row in rows:
            # Special tokens that the tokenizer puts before a text belong before the prompt only.
            prompt = tokenizer(row.text)["input_ids"]
            response = tokenizer(row.pair, add_special_tokens=False)["input_ids"]
            ids = [*prompt, *response, tokenizer.eos_token_id][:max_length]
            if len(prompt) < len(ids):
                labels = [_NO_LABEL] * len(prompt) + ids[len(prompt) :]
                mask = [1] * len(ids)
                found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        if not found:
            raise DataError(f"{self.name}: every prompt has max_length={max_length} tokens or more")
        return found

    def collator(self, tokenizer: Any) -> Callable[..., Any]:
        """Pads the labels too."""
        from transformers import DataCollatorForSeq2Seq

        return DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_NO_LABEL)

    @property
    def reduced(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A function to each row's summed loss: all logits would be [rows, tokens, words]."""
        return _row_losses

    def measure(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The mean loss of a token of the responses, in nats; long responses count for more.

        Args:
            logits: [rows] sums, as of `reduced`.
            labels: [rows, tokens].
        """
        return {"loss": float(logits.sum() / np.count_nonzero(labels[:, 1:] != _NO_LABEL))}


def _row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy in nats of each row, [rows] in float64.

    Args:
        logits: [rows, tokens, words]; those of a token are about the next one.
        labels: [rows, tokens].
    """
    losses = [
        cross_entropy(of[:-1].float(), label[1:], ignore_index=_NO_LABEL, reduction="none")
        for of, label in zip(logits, labels, strict=True)
    ]
    return torch.stack([loss.double().sum() for loss in losses])


def read_alpaca(folder: Path) -> Splits:
    """The rows of alpaca_en_demo.json: a list of objects with instruction, input and output. The
    set has no split of its own: 15 % of the rows, drawn with a fixed seed, are the test split.

    Raises:
        DataError: the file is missing or malformed.
    """
    path = folder / "alpaca_en_demo.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    if not isinstance(given, list):
        raise DataError(f"{path}: expected a list of rows")
    keys = ("instruction", "input", "output")
    for number, row in enumerate(given, 1):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise DataError(f"{path}, row {number}: expected texts {', '.join(keys)}")
    rows = [
        Example(_prompt(row["instruction"], row["input"]), row["output"], None) for row in given
    ]
    test = set(random.Random(0).sample(range(len(rows)), round(_TEST * len(rows))))
    return (
        [row for index, row in enumerate(rows) if index not in test],
        [row for index, row in enumerate(rows) if index in test],
    )


def _prompt(instruction: str, given: str) -> str:
    parts = [f"### Instruction:\n{instruction}", *([given] if given else []), "### Response:\n"]
    return "\n\n".join(parts)
