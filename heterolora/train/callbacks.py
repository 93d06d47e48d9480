"""What `heterolora.train.run.train` adds to Trainer, one concern a callback."""

import logging
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from heterolora.errors import FuseError, TrainingError
from heterolora.fusion.fuse import FuseReport, fuse, unfuse

__all__ = ["FuseCallback", "Interrupt", "LossCheck", "Progress", "StepTimer"]

logger = logging.getLogger(__name__)


class FuseCallback(TrainerCallback):
    """Fuses the model when training begins and unfuses it when training ends.

    The groups of layers are found with one batch of rows of the training set before the first step,
    so that every step runs the same way, a resumed run repeats an uninterrupted one, and the report
    is of the size that is trained. No random state is used up. A training set without length (a
    stream) is not touched; groups are then found in the first step. Under `torch.nn.DataParallel`,
    which Trainer takes for several GPUs in one process, nothing is fused, and the log says so: its
    copies of a layer cannot be told apart.

    Args:
        strict, backend, captured: as of :func:`heterolora.fuse`.

    Attributes:
        report: what was fused and declined; None before training began, or if nothing was tried.

    Raises:
        FuseError: `strict` is set and a layer was declined, or the model has no LoRA layer.
    """

    def __init__(
        self, *, strict: bool = False, backend: str = "auto", captured: bool = False
    ) -> None:
        self.strict = strict
        self.backend = backend
        self.captured = captured
        self.report: FuseReport | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
            reason = "nn.DataParallel over several GPUs: start with torchrun or accelerate launch"
            if self.strict:
                raise FuseError(f"strict=True, but nothing can be fused under {reason}")
            logger.warning("not fused, %s", reason)
            return
        unwrapped = _unwrapped(model)
        with _random_state_kept():
            device, count = next(unwrapped.parameters()).device, args.per_device_train_batch_size
            example = _example(train_dataloader, device, count)
            self.report = fuse(
                unwrapped,
                strict=self.strict,
                backend=self.backend,
                example=example,
                captured=self.captured,
            )
        logger.info("%s", self.report)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        unfuse(_unwrapped(model))


class LossCheck(TrainerCallback):
    """Raises TrainingError on a NaN or infinite loss, before it is logged as fine or saved.

    The trainer has to call :meth:`observe` with each loss. Losses are looked at in bulk, because
    reading each one would make a GPU wait for every step. Before each checkpoint the trainable
    weights are looked at too: the last step can spoil them with a loss that is still finite.
    """

    def __init__(self, every: int = 25) -> None:
        self._every = every
        self._losses: list[tuple[int, torch.Tensor]] = []
        self._step = 0

    def observe(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Remember the loss of a batch; the tensor is read later."""
        self._losses.append((self._step, loss.detach()))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._step = state.global_step + 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = (
            control.should_log,
            control.should_save,
            control.should_evaluate,
            control.should_training_stop,
        )
        if any(asked) or len(self._losses) >= self._every:
            self._check(kwargs["model"], args, saving=control.should_save)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(kwargs["model"], args, saving=control.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(kwargs["model"], args, saving=True)

    def _check(self, model: torch.nn.Module, args: TrainingArguments, *, saving: bool) -> None:
        losses, self._losses = self._losses, []
        if losses:
            finite = torch.stack([loss.float() for _, loss in losses]).isfinite().tolist()
            if not all(finite):
                step, loss = losses[finite.index(False)]
                self._fail(f"the loss is {float(loss)} at step {step}", args)
        if saving:
            for name, weight in model.named_parameters():
                if weight.requires_grad and not bool(weight.isfinite().all()):
                    self._fail(f"{name} is no longer finite at step {self._step}", args)

    def _fail(self, what: str, args: TrainingArguments) -> None:
        raise TrainingError(
            f"{what}: try a smaller --lr (it is {args.learning_rate:g}) or another --seed; "
            "no checkpoint was saved from it"
        )


class Interrupt(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into a checkpoint and a stop at the end of the step.

    A second one stops at once, without a checkpoint. A signal in the last step changes nothing:
    the run is finished.

    Attributes:
        saved: training was cut short and its checkpoint is written.
    """

    def __init__(self) -> None:
        self.saved = False
        self._requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to signals; the handlers that were there come back. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        earlier = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in earlier:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        logger.warning("stopping after this step with a checkpoint; once more stops at once")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._requested or control.should_training_stop:
            return
        self.saved = True
        control.should_training_stop = True
        # At the end of an epoch the epoch's own evaluation and checkpoint follow; a second
        # checkpoint before them would hold another random state than an undisturbed run has.
        control.should_save = not _epoch_is_complete(state) or args.save_strategy != "epoch"

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.saved and not _epoch_is_complete(state):
            control.should_save = False
            control.should_evaluate = False


class StepTimer(TrainerCallback):
    """Wall time and tokens of the training steps, without evaluation, saving and the first steps.

    The trainer has to call :meth:`observe` with each batch. The device is waited for only where a
    stretch of steps ends, so timing does not slow training.

    Args:
        skipped: steps at the beginning that are left out.

    Attributes:
        seconds_per_step: mean; None where no step is left.
        tokens_per_second: attended tokens; None where no step is left.
    """

    def __init__(self, *, skipped: int = 1) -> None:
        self._started: float | None = None
        self._to_skip = skipped
        self._seconds = 0.0
        self._steps = 0
        self._tokens: Any = 0

    @property
    def seconds_per_step(self) -> float | None:
        return self._seconds / self._steps if self._steps else None

    @property
    def tokens_per_second(self) -> float | None:
        return int(self._tokens) / self._seconds if self._steps else None

    def observe(self, inputs: Mapping[str, Any], loss: torch.Tensor) -> None:
        """Count the tokens of a batch."""
        if self._to_skip:
            return
        if inputs.get("attention_mask") is not None:
            self._tokens = self._tokens + inputs["attention_mask"].sum()
        elif inputs.get("input_ids") is not None:
            self._tokens = self._tokens + inputs["input_ids"].numel()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._started is None and not self._to_skip:
            self._started = _now()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._to_skip:
            self._to_skip -= 1
            return
        self._steps += 1
        if control.should_save or control.should_evaluate or control.should_training_stop:
            self._pause()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._pause()

    def _pause(self) -> None:
        if self._started is not None:
            self._seconds += _now() - self._started
            self._started = None


class Progress(TrainerCallback):
    """A bar on stderr, or log lines where none can be drawn."""

    def __init__(self, *, draw: bool) -> None:
        self._draw = draw
        self._bar: Any = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._draw:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("train", total=state.max_steps, completed=state.global_step)
        self._bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs["logs"]
        shown = ", ".join(
            f"{name.removeprefix('eval_')} {float(logs[name]):.4g}"
            for name in ("loss", "eval_loss", "eval_accuracy")
            if name in logs
        )
        if not shown:
            return
        kind = "validation" if "eval_loss" in logs else "train"
        if self._bar is not None:
            self._bar.update(self._task, description=f"{kind} {shown}")
        logger.info("step %d/%d: %s %s", state.global_step, state.max_steps, kind, shown)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the terminal back; also after an exception, which passes on_train_end by."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _epoch_is_complete(state: TrainerState) -> bool:
    return float(state.epoch or 0).is_integer()


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel and torch.compile."""
    inner = extract_model_from_parallel(model)
    return getattr(inner, "_orig_mod", inner)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _example(dataloader: Any, device: torch.device, count: int) -> dict[str, Any] | None:
    """The first rows of the training set as a batch, or None where it has no length."""
    dataset: Any = getattr(dataloader, "dataset", None)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        return None
    rows = [dataset[index] for index in range(min(count, len(dataset)))]
    batch = dataloader.collate_fn(rows)
    return {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
