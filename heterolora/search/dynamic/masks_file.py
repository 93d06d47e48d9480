"""What a dynamic search leaves in a checkpoint: ranks in use, and everything that is parked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

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
        document = json.loads(text or "null")
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise TrainingError(f"{path}: not readable ({error}); use an earlier checkpoint") from error
    if not isinstance(document, dict):
        raise TrainingError(f"{path}: the entry {_KEY!r} of its metadata is no JSON object")
    version = document.get("schema_version")
    if not isinstance(version, int) or not _is_count(version, 2**31):
        raise TrainingError(f"{path}: schema_version is {version!r}")
    if version > SCHEMA_VERSION:
        raise TrainingError(
            f"{path}: schema_version is {version}, and this heterolora reads up to "
            f"{SCHEMA_VERSION}; upgrade it"
        )
    if not _is_count(document.get("step"), 2**62):
        raise TrainingError(f"{path}: step is {document.get('step')!r}")
    if not isinstance(document.get("settings"), dict):
        raise TrainingError(f"{path}: settings is no JSON object")
    for key in ("ranks", "ever"):
        ranks = document.get(key)
        if not isinstance(ranks, dict) or not all(_is_count(r, MAX_RANK) for r in ranks.values()):
            raise TrainingError(f"{path}: {key} does not map module names to ranks")
    return SavedSearch(
        step=document["step"],
        ranks=document["ranks"],
        ever=document["ever"],
        settings=document["settings"],
        tensors=tensors,
    )


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
