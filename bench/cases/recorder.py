"""What a train case records inside a run of transformers' Trainer."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heterolora.bench.harness.timing import Stopwatch

__all__ = ["StepRecorder"]


class StepRecorder(TrainerCallback):
    """Losses of all steps, and the time of all but the first ones.

    The time is that from the end of the last untimed step to the end of the last step: data
    loading, logging and the optimizer are in it, checkpoints and evaluation are not, as long as
    the run is one epoch at most. The device is waited for only at these two moments.

    Args:
        untimed: first steps that are left out: caches, allocator, groups that are found.
        stopwatch: takes the time.
        adapters: how many adapters went through the fused op so far, or None not to count.

    Attributes:
        losses: as the model returns them, one a step, on its device.
        seconds: of a timed step by the stopwatch's clock, and by wall clock.
        adapters_run: adapters through the fused op, by step.
    """

    def __init__(
        self, untimed: int, stopwatch: Stopwatch, adapters: Callable[[], int] | None = None
    ) -> None:
        self.losses: list[torch.Tensor] = []
        self.seconds = (0.0, 0.0)
        self.adapters_run: list[int] = []
        self._untimed = untimed
        self._watch = stopwatch
        self._adapters = adapters
        self._before = 0
        self._in_step = False
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook = kwargs["model"].register_forward_hook(self._record)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_step = True
        if self._adapters is not None:
            self._before = self._adapters()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._in_step = False
        if self._adapters is not None:
            self.adapters_run.append(self._adapters() - self._before)
        if state.global_step == self._untimed:
            self._watch.start()
        elif state.global_step == state.max_steps:
            timed = state.max_steps - self._untimed
            clock, wall = self._watch.stop()
            self.seconds = clock / timed, wall / timed

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._hook.remove()

    def _record(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        # Outside a step the model is run to find the groups, and to evaluate.
        if self._in_step and isinstance(output, Mapping):
            self.losses.append(output["loss"].detach())
