"""One run: make the model, adapt it, train it, measure it."""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from heterolora.bench.evidence.arms.registry import ARMS
from heterolora.bench.evidence.arms.setting import Setting, adapter_parameters
from heterolora.bench.evidence.config import Trial
from heterolora.bench.evidence.tasks.registry import TASKS
from heterolora.bench.evidence.tasks.task import Task, Tokenised
from heterolora.fusion.fuse import fuse
from heterolora.search import SearchSpace
from heterolora.train.callbacks import FuseCallback

__all__ = ["Trials"]

_HELD_OUT = 0.1


class Trials:
    """Runs one after the other; keeps the token ids of the tasks that it has met.

    Args:
        data: folder of the tasks' data.
    """

    def __init__(self, data: Path) -> None:
        self._data = data
        self._tokenised: dict[tuple[Any, ...], tuple[Tokenised, Tokenised]] = {}

    def run(self, run: Trial) -> dict[str, Any]:
        """The result of a run, ready for JSON.

        ``loss``, and the task's metric if it has one, are of the test rows, or of the held-out
        rows of a "choice" run, and None where the loss is not finite. ``fused_modules`` is None for
        an arm that `FuseCallback` is not for. Seconds come in pairs: ``wall``, and ``cpu`` of
        this process, which does not depend on what else the machine does.

        Raises:
            HeteroLoraError: the data, the model or the arm is at fault.
        """
        task, recipe = TASKS[run.task], run.recipe
        begin = _Clock()
        model, tokenizer = task.make(recipe.model, run.seed)
        train, test = self._splits(task, run, tokenizer)
        collate = task.collator(tokenizer)
        steps = math.ceil(math.ceil(len(train) / recipe.batch_size) * run.epochs)

        def draw(count: int) -> list[dict[str, Any]]:
            return _batches(train, collate, count, recipe.batch_size, run.seed)

        setting = Setting(
            model=model,
            rank=run.rank,
            seed=run.seed,
            steps=steps,
            space=SearchSpace(target_modules=task.targets),
            scoring_batches=recipe.scoring_batches,
            bf16=recipe.bf16,
            draw=draw,
        )
        torch.manual_seed(run.seed)
        preparing = _Clock()
        adapted = ARMS[run.arm].build(setting)
        prepared = preparing.seconds()
        heads = _train_in_full(adapted.model, () if adapted.head_only else task.trained)
        count = adapter_parameters(adapted.model)

        timer = _StepTimer()
        fusing = FuseCallback() if adapted.fused else None
        callbacks = [*adapted.callbacks, *([fusing] if fusing else []), timer]
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                model=adapted.model,
                args=_arguments(run, adapted.share, scratch),
                data_collator=collate,
                train_dataset=train,
                processing_class=tokenizer,
                callbacks=callbacks,
                preprocess_logits_for_metrics=task.reduced,
            )
            trainer.remove_callback(PrinterCallback)
            training = _Clock()
            outcome = trainer.train()
            trained = training.seconds()
            evaluating = _Clock()
            if adapted.fused:
                # The callback takes its fusion off when training ends.
                fuse(adapted.model)
            predicted = trainer.predict(test)
            evaluated = evaluating.seconds()
        measured = task.measure(predicted.predictions, predicted.label_ids)
        finite = math.isfinite(measured["loss"])
        result: dict[str, Any] = {
            **{key: value if math.isfinite(value) else None for key, value in measured.items()},
            "diverged": not finite,
            "train_loss": _finite(float(outcome.training_loss)),
            "parameters": {"enabled": count, "ever_trained": count, "stored": count},
            "trained_in_full": heads,
            "ranks": adapted.ranks,
            "steps": trainer.state.global_step,
            "train_rows": len(train),
            "test_rows": len(test),
            "seconds_per_step": timer.seconds_per_step(),
            "search_seconds": adapted.search_seconds,
            "prepare_seconds": prepared,
            "train_seconds": trained,
            "evaluate_seconds": evaluated,
            "fused_modules": _fused(fusing),
            **adapted.notes,
            **adapted.facts(),
        }
        return {**result, "seconds": begin.seconds()}

    def _splits(self, task: Task, run: Trial, tokenizer: Any) -> tuple[Tokenised, Tokenised]:
        recipe = run.recipe
        key = (task.name, recipe.model, recipe.limit, recipe.max_length)
        if key not in self._tokenised:
            rows = task.load(self._data, recipe.limit)
            train, test = (task.tokenise(r, tokenizer, recipe.max_length) for r in rows)
            self._tokenised[key] = train, test
        train, test = self._tokenised[key]
        if run.purpose == "test":
            return train, test
        order = np.random.default_rng(run.seed).permutation(len(train))
        cut = max(1, round(_HELD_OUT * len(train)))
        return [train[row] for row in sorted(order[cut:])], [train[row] for row in order[:cut]]


def _arguments(run: Trial, share: float, scratch: str) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=run.epochs * share,
        learning_rate=run.learning_rate,
        per_device_train_batch_size=run.recipe.batch_size,
        per_device_eval_batch_size=TASKS[run.task].evaluated,
        train_sampling_strategy="group_by_length",
        warmup_steps=run.recipe.warmup,
        lr_scheduler_type="linear",
        seed=run.seed,
        data_seed=run.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        bf16=run.recipe.bf16,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        remove_unused_columns=False,
    )


def _train_in_full(model: Any, endings: tuple[str, ...]) -> int:
    """Have modules beside the adapter train; the values trained that are no adapter's."""
    for name, module in model.get_base_model().named_modules():
        if name.split(".")[-1] in endings:
            module.requires_grad_(True)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable - adapter_parameters(model)


def _batches(
    rows: Tokenised, collate: Callable[..., Any], count: int, size: int, seed: int
) -> list[dict[str, Any]]:
    """Rows drawn by `seed` in batches of like length, which has little padding, in random order."""
    draw = random.Random(seed)
    drawn = draw.sample(rows, min(count * size, len(rows)))
    drawn.sort(key=lambda row: len(row["input_ids"]))
    starts = list(range(0, len(drawn), size))
    draw.shuffle(starts)
    return [dict(collate(drawn[start : start + size])) for start in starts]


def _fused(callback: FuseCallback | None) -> int | None:
    return len(callback.report.fused) if callback and callback.report else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Clock:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def seconds(self) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        return {"wall": wall - self._wall, "cpu": cpu - self._cpu}


class _StepTimer(TrainerCallback):
    """From the begin of each step to its end: no evaluation, no search between steps."""

    def __init__(self) -> None:
        self._clock: _Clock | None = None
        self._steps: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock = _Clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._clock is not None
        self._steps.append(self._clock.seconds())

    def seconds_per_step(self) -> dict[str, float | None]:
        """Mean and median over the steps but the first, which warms up."""
        steps = self._steps[1:]
        found: dict[str, float | None] = {}
        for kind in ("wall", "cpu"):
            values = [step[kind] for step in steps]
            found[kind] = sum(values) / len(values) if values else None
            found[f"{kind}_median"] = median(values) if values else None
        return found
