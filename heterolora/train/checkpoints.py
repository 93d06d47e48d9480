"""The folder of a training run: its checkpoints, and what may be resumed or deleted."""

import json
import shutil
from pathlib import Path
from typing import Any

from heterolora.errors import TrainingError

__all__ = ["newest_checkpoint", "prepare_folder"]


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step; one cut off while it was written is passed by.

    Trainer writes ``trainer_state.json`` last.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / "trainer_state.json").is_file():
            complete.append((int(step), path))
    return max(complete)[1] if complete else None


def prepare_folder(output: Path, model: Any, *, resume: bool, overwrite: bool) -> Path | None:
    """Make the folder of a run ready, and return the checkpoint to resume from if there is one.

    Raises:
        TrainingError: there is something else in it, or nothing to resume that fits the model.
    """
    if resume and overwrite:
        raise TrainingError("--resume and --overwrite exclude each other")
    if output.exists() and not output.is_dir():
        raise TrainingError(f"{output} is a file: --out must be a folder")
    if resume:
        checkpoint = newest_checkpoint(output)
        if checkpoint is None:
            raise TrainingError(f"nothing to resume: {output} has no complete checkpoint")
        _check_same_adapter(model, checkpoint)
        return checkpoint
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise TrainingError(
                f"{output} is not empty: choose another --out, or give --resume or --overwrite"
            )
        for path in (*output.glob("checkpoint-*"), output / "adapter"):
            if path.is_dir():
                shutil.rmtree(path)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"cannot write to {output}: {error.strerror}") from error
    return None


def _check_same_adapter(model: Any, checkpoint: Path) -> None:
    path = checkpoint / "adapter_config.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot resume from {checkpoint}: {path.name}: {error}") from error
    config = model.peft_config[model.active_adapter]
    for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        if saved.get(name) != getattr(config, name):
            raise TrainingError(
                f"cannot resume from {checkpoint}: it was trained with another {name}; "
                "give the allocation or rank of that run"
            )
