"""What a dynamic search leaves in a checkpoint: ranks in use, and everything that is parked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from heterolora.checked import Fields
from heterolora.errors import TrainingError
from heterolora.search.space import MAX_RANK

__all__ = ["FILE_NAME", "SCHEMA_VERSION", "SavedSearch", "read_search", "write_search"]

FILE_NAME = "heterolora_search.safetensors"
SCHEMA_VERSION = 1
_KEY = "heterolora"


@dataclass(frozen=True)
class SavedSearch:
    """The state of a dynamic search after a training step.

    Attributes:
        step: optimizer steps done.
        ranks: {module name: rank in use}.
        ever: {module name: largest rank that was in use during a step}.
        settings: of the search, to tell another one by.
        tensors: as `heterolora.search.dynamic.masks.RankMasks.tensors`.
    """

    step: int
    ranks: dict[str, int]
    ever: dict[str, int]
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def write_search(saved: SavedSearch, folder: Path) -> None:
    """Write `FILE_NAME` into a checkpoint's folder; there is the whole file or none.

    Raises:
        TrainingError: it cannot be written.
    """
    from safetensors.torch import save_file

    document = {
        "schema_version": SCHEMA_VERSION,
        "step": saved.step,
        "ranks": saved.ranks,
        "ever": saved.ever,
        "settings": saved.settings,
    }
    path = folder / FILE_NAME
    part = path.with_suffix(".part")
    tensors = {key: value.contiguous() for key, value in saved.tensors.items()}
    try:
        save_file(tensors, part, metadata={_KEY: json.dumps(document, sort_keys=True)})
        os.replace(part, path)
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error}; a run with a dynamic search saves its checkpoints "
            "in TrainingArguments.output_dir"
        ) from error


def read_search(folder: Path) -> SavedSearch:
    """Read what `write_search` wrote.

    Raises:
        TrainingError: missing, malformed or newer file; the message names the file and the key.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE_NAME
    if not path.is_file():
        raise TrainingError(
            f"{path}: no such file, so the search cannot go on where it was; resume from a "
            "checkpoint that was saved with DynamicSearchCallback (give its folder as "
            "resume_from= if it is not in output_dir)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path}: not readable ({error}); use an earlier checkpoint") from error
    if text is None:
        raise TrainingError(
            f"{path}: its metadata has no entry {_KEY!r}; use an earlier checkpoint"
        )
    file = Fields.parse(text, path, TrainingError)
    file.version(SCHEMA_VERSION)
    return SavedSearch(
        step=file.integer("step"),
        ranks=file.each("ranks", Fields.integer, high=MAX_RANK),
        ever=file.each("ever", Fields.integer, high=MAX_RANK),
        settings=file.fields("settings").values,
        tensors=tensors,
    )
