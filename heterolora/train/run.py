"""Training with transformers' Trainer, as one function for the command line.

There is no training loop here. What Trainer lacks comes as callbacks: a stop on a loss that is not
finite before it can reach a checkpoint, a stop with a checkpoint on Ctrl-C, and step times that
leave evaluation and saving out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from heterolora.data.text import TokenizedData
from heterolora.errors import TrainingError
from heterolora.files.adapters import save_adapter
from heterolora.fusion.fuse import FuseReport, unfuse
from heterolora.shortcuts.checkpoints import ShortcutCallback
from heterolora.train.callbacks import FuseCallback, Interrupt, LossCheck, Progress, StepTimer
from heterolora.train.checkpoints import newest_checkpoint, prepare_folder
from heterolora.train.cuda_graphs import WARM_UP
from heterolora.train.trainers import (
    WatchedGraphedTrainer,
    WatchedTrainer,
    constant_length,
    graph_reason,
)

__all__ = ["TrainResult", "TrainingInterrupted", "train"]


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after a checkpoint was saved; the message says where and how to go on."""

    def __init__(self, checkpoint: Path, step: int, steps: int) -> None:
        super().__init__(
            f"stopped at step {step} of {steps} and saved {checkpoint}; "
            "run the same command with --resume to go on"
        )
        self.checkpoint = checkpoint


@dataclass(frozen=True)
class TrainResult:
    """What a finished training run gives.

    Attributes:
        adapter: folder with the trained adapter.
        metrics: ``validation_loss``, ``test_accuracy`` and so on, for the splits there are.
        log_history: Trainer's log, one dict an entry.
        steps: optimizer steps done in all, those before a resume included.
        seconds: of this call, evaluation and saving included.
        seconds_per_step: mean over the steps of this call without the first (with CUDA graphs the
            first four), evaluation and saving left out; None where no step is left.
        tokens_per_second: attended tokens over the same steps.
        report: what was fused; None without fusing.
        cuda_graph: what became of `cuda_graph=True`: "1 shape captured, 496 of 500 steps replayed",
            or why no step was; None if it was not asked for.
    """

    adapter: Path
    metrics: dict[str, float]
    log_history: list[dict[str, Any]]
    steps: int
    seconds: float
    seconds_per_step: float | None
    tokens_per_second: float | None
    report: FuseReport | None
    cuda_graph: str | None = None


def train(
    model: Any,
    data: TokenizedData,
    *,
    output_dir: str | Path,
    epochs: float = 3.0,
    max_steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    warmup: float = 0.06,
    weight_decay: float = 0.0,
    seed: int = 0,
    fused: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    save_steps: int | None = None,
    logging_steps: int = 10,
    gradient_checkpointing: bool = False,
    bf16: bool = False,
    cuda_graph: bool = False,
    progress: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainResult:
    """Train the adapter of a PeftModel, shortcuts included: AdamW, linear decay after a warm-up,
    Trainer's loop.

    Evaluates and saves a checkpoint every epoch, or every `save_steps` steps; the adapter goes to
    ``output_dir/adapter`` at the end. Runs on the first GPU there is, else on the CPU.

    Args:
        max_steps: optimizer steps, in place of `epochs`.
        warmup: fraction of the steps.
        fused: train through `heterolora.fuse`; the model comes back unfused either way.
        resume: go on from the newest checkpoint of `output_dir`. In fp32 on a CPU the weights are
            then those of an uninterrupted run, bit for bit.
        overwrite: delete the checkpoints and the adapter of an earlier run in `output_dir`.
        bf16: run the forward pass under bf16 autocast.
        cuda_graph: replay steps as CUDA graphs, as :class:`.trainers.GraphedTrainer`
            does, with every batch padded to the longest row of the data. It pays where a step is
            small enough to be bound by launches. Where no graph can be had (no CUDA device,
            `gradient_checkpointing`, ...) training runs without, and the log and the result say
            why.
        progress: draw a bar on stderr; otherwise the log goes to the ``heterolora`` logger.

    Raises:
        TrainingError: a setting is unusable, or the loss is not finite.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint was saved. Only the main thread
            listens to signals.
    """
    positive = {
        "--epochs": epochs,
        "--max-steps": max_steps,
        "--lr": learning_rate,
        "--batch-size": batch_size,
        "--save-steps": save_steps,
    }
    for flag, value in positive.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise TrainingError(f"{flag} is {value}: it must be above 0")
    if bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise TrainingError("--bf16: this GPU has no bf16 arithmetic, leave the flag out")
    _check_trainable(model, data)
    output = Path(output_dir)
    checkpoint = prepare_folder(output, model, resume=resume, overwrite=overwrite)
    validated = "validation" in data.splits
    every = "steps" if save_steps else "epoch"
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=max_steps or -1,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        warmup_steps=warmup,
        weight_decay=weight_decay,
        lr_scheduler_type="linear",
        seed=seed,
        data_seed=seed,
        # The same strategy for both: Trainer evaluates, then saves, so the random state in a
        # checkpoint is that of the moment when training goes on.
        save_strategy=every,
        eval_strategy=every if validated else "no",
        save_steps=save_steps or 500,
        eval_steps=save_steps or 500,
        save_total_limit=2,
        logging_steps=logging_steps,
        logging_nan_inf_filter=False,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        prediction_loss_only=data.task == "causal-lm",
        **(_checkpointing() if gradient_checkpointing else {}),
    )
    graphed = cuda_graph and graph_reason(arguments) is None
    fusing = FuseCallback(captured=graphed) if fused else None
    bar, check, interrupt = Progress(draw=progress), LossCheck(), Interrupt()
    timer = StepTimer(skipped=WARM_UP + 1 if graphed else 1)
    unfuse(model)
    trainer = _trainer(
        WatchedGraphedTrainer if cuda_graph else WatchedTrainer,
        model,
        data,
        args=arguments,
        data_collator=constant_length(data) if graphed else data.collator,
        # After the user's, so that these see what those asked for.
        callbacks=[
            *callbacks,
            ShortcutCallback(),
            *([fusing] if fusing else []),
            *(bar, check, interrupt, timer),
        ],
        watchers=[check.observe, timer.observe],
    )
    try:
        with interrupt.listening():
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        # An exception passes on_train_end by.
        unfuse(model)
        bar.close()
    if interrupt.saved:
        raise _interrupted(trainer, output)
    save_adapter(model, output / "adapter")
    return TrainResult(
        adapter=output / "adapter",
        metrics={"train_loss": float(outcome.training_loss), **_scores(trainer, data)},
        log_history=list(trainer.state.log_history),
        steps=trainer.state.global_step,
        seconds=float(outcome.metrics["train_runtime"]),
        seconds_per_step=timer.seconds_per_step,
        tokens_per_second=timer.tokens_per_second,
        report=fusing.report if fusing else None,
        cuda_graph=getattr(trainer, "graph_summary", None),
    )


def _check_trainable(model: Any, data: TokenizedData) -> None:
    if not isinstance(model, PeftModel):
        raise TrainingError(f"a PeftModel is needed, not {type(model).__name__}: adapt it first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("no parameter of the model is trainable")
    if len(data.splits["train"]) == 0:
        raise TrainingError("the train split has no rows")


def _trainer(
    kind: type[WatchedTrainer], model: Any, data: TokenizedData, **options: Any
) -> WatchedTrainer:
    """A trainer of the kind, with what the data decides: splits, tokenizer and metrics."""
    classify = data.task == "classification"
    trainer = kind(
        model=model,
        train_dataset=data.splits["train"],
        eval_dataset=data.splits.get("validation"),
        processing_class=data.tokenizer,
        compute_metrics=_accuracy if classify else None,
        preprocess_logits_for_metrics=_predictions if classify else None,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _interrupted(trainer: Trainer, output: Path) -> Exception | KeyboardInterrupt:
    """What to raise after a stop on request."""
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        return TrainingError(f"stopped on request, but no checkpoint is in {output}")
    return TrainingInterrupted(checkpoint, trainer.state.global_step, trainer.state.max_steps)


def _scores(trainer: Trainer, data: TokenizedData) -> dict[str, float]:
    """Loss and, of a classifier, accuracy on the validation and test splits that there are."""
    found = {}
    for split in ("validation", "test"):
        if split in data.splits:
            scores = trainer.evaluate(data.splits[split], metric_key_prefix=split)
            for name in (f"{split}_loss", f"{split}_accuracy"):
                if name in scores:
                    found[name] = float(scores[name])
    return found


def _checkpointing() -> dict[str, Any]:
    """Arguments for activation checkpointing, which transformers renamed during version 5."""
    named = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in named else "gradient"
    return {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def _predictions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Class indices instead of logits, so that evaluation keeps one number a row."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
