"""Shortcuts in the checkpoints of transformers' Trainer.

Trainer saves a PeftModel by `save_pretrained`, which keeps what has "lora_" in its name. Shortcuts
are not named so on purpose: stock PEFT would load the file, drop them without a word, and compute
something else. A callback is the hook that Trainer has for further files of a checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heterolora.errors import AdapterFileError, TrainingError
from heterolora.shortcuts.files import SavedShortcuts, check_shortcuts, write_shortcuts
from heterolora.shortcuts.model import Shortcuts

__all__ = ["ShortcutCallback", "resumed_folder", "saved_folder"]


class ShortcutCallback(TrainerCallback):
    """Keeps the shortcuts of a model in Trainer's checkpoints, beside the adapter, which Trainer
    keeps by itself.

    Each checkpoint gets the two files that `save_adapter` writes, so that
    `heterolora.load_adapter` loads it. A resumed run takes their weights from its checkpoint, and
    `load_best_model_at_end` takes those of the best one. `Trainer.save_model` knows nothing of
    shortcuts: call `heterolora.save_adapter` in its place. Under DDP one process writes, and every
    one reads. A model without shortcuts is left alone.

    Args:
        resume_from: the checkpoint folder that training is resumed from, where it is not in
            `TrainingArguments.output_dir`.

    Raises:
        TrainingError: the checkpoint has shortcuts and the model has none, or the other way round;
            the weights are spread over processes (FSDP, DeepSpeed ZeRO-3, tensor parallelism); or
            the files cannot be written.
        AdapterFileError: a weight to save is not finite, or the checkpoint's files are malformed,
            or of other shortcuts, ranks or scales than the model's.
    """

    def __init__(self, *, resume_from: str | Path | None = None) -> None:
        self.resume_from = resume_from

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = _unwrapped(kwargs["model"])
        if Shortcuts.of(model) is not None and _spread(args, model):
            raise TrainingError(
                "shortcuts cannot be saved while FSDP, DeepSpeed ZeRO-3 or tensor parallelism "
                "spread their weights over processes: use DDP"
            )
        if state.global_step > 0:
            _restore(model, resumed_folder(args, state, self.resume_from))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        shortcuts = Shortcuts.of(_unwrapped(kwargs["model"]))
        if args.should_save and shortcuts is not None:
            folder = saved_folder(args, state)
            check_shortcuts(shortcuts, stock=False)
            try:
                write_shortcuts(shortcuts, folder)
            except OSError as error:
                raise TrainingError(
                    f"cannot write shortcuts to {folder}: {error}; their checkpoints are saved in "
                    "TrainingArguments.output_dir"
                ) from error

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _restore(_unwrapped(kwargs["model"]), Path(state.best_model_checkpoint))


def saved_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the checkpoint that Trainer has just written."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def resumed_folder(
    args: TrainingArguments, state: TrainerState, resume_from: str | Path | None
) -> Path:
    """The folder of the checkpoint that a run is resumed from, as far as a callback can know."""
    if resume_from is not None:
        return Path(resume_from)
    if isinstance(args.resume_from_checkpoint, str):
        return Path(args.resume_from_checkpoint)
    return saved_folder(args, state)


def _restore(model: Any, folder: Path) -> None:
    shortcuts = Shortcuts.of(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not folder.is_dir():
        if shortcuts is None:
            return
        raise TrainingError(
            f"{folder}: no such folder, and the shortcuts' weights are to be read from it; give "
            "the checkpoint's folder as resume_from= of the callback"
        )
    saved = SavedShortcuts.read(folder.resolve(), base)
    if saved is None and shortcuts is not None:
        raise TrainingError(
            f"{folder} has no shortcuts, and the model has: their weights are lost. Use a "
            "checkpoint that was saved with ShortcutCallback or DynamicSearchCallback, or give its "
            "folder as resume_from= of the callback"
        )
    if saved is not None and shortcuts is None:
        raise TrainingError(
            f"{folder} has shortcuts, and the model has none: call heterolora.add_shortcuts as "
            "before that run"
        )
    if saved is not None and shortcuts is not None:
        try:
            saved.restore(shortcuts)
        except AdapterFileError as error:
            raise AdapterFileError(f"{folder}: {error}") from error


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    inner = extract_model_from_parallel(model)
    return getattr(inner, "_orig_mod", inner)


def _spread(args: TrainingArguments, model: Any) -> bool:
    return bool(getattr(args, "fsdp", None)) or any(
        hasattr(p, "ds_id") or type(p.data).__name__ == "DTensor" for p in model.parameters()
    )
