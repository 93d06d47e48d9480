"""A training step that is replayed as one CUDA graph."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from heterolora.bench.harness.steps import Step
from heterolora.train.cuda_graphs import WARM_UP, CudaRecorder, Recorder, Recording

__all__ = ["GraphedStep"]


@dataclass
class GraphedStep(Step):
    """A step whose forward, backward and optimizer are one CUDA graph.

    The first call warms up with eager steps, captures, and replays once: it leaves the weights as
    `WARM_UP` + 1 eager steps do. Each further call is one replay. `Step.__call__` of it is still an
    eager step.

    Attributes:
        recorder: captures; None: CUDA graphs on the device of the inputs.
    """

    recorder: Recorder | None = None
    _recording: Recording[list[Tensor | None]] | None = field(default=None, init=False, repr=False)

    def __call__(self) -> None:
        if self._recording is None:
            self._recording = self._record()
        self._recording.replay()

    def _record(self) -> Recording[list[Tensor | None]]:
        recorder = self.recorder
        if recorder is None:
            recorder = CudaRecorder(next(iter(self.inputs.values())).device)
        for _ in range(WARM_UP):
            recorder.warm_up(lambda: Step.__call__(self))
        if self.optimizer is not None:
            # Not before: torch warns where such an optimizer steps outside a capture.
            for group in self.optimizer.param_groups:
                group["capturable"] = True
        return recorder.record(self._once)

    def _once(self) -> list[Tensor | None]:
        Step.__call__(self)
        # Held, so that clearing gradients frees none of the graph's memory.
        tensors: list[Any] = [*self._parameters, *self.inputs.values()]
        return [tensor.grad for tensor in tensors if tensor.requires_grad]
