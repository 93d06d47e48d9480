"""CUDA graphs of a training step: captured once for each shape of batch, then replayed.

A replay starts a whole forward and backward pass with one launch, and no Python runs in it. What
Python decides in a step (a shape, a branch, a number) stays what it was in the captured one,
forward hooks do not run, and nothing in the step may read a tensor on the host.
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.train.capture import WARM_UP, Recorder

__all__ = ["LIMIT", "StepGraph", "StepGraphs"]

logger = logging.getLogger("heterolora")

LIMIT = 4


class StepGraph:
    """One recorded step: static inputs, a loss and static gradients.

    Args:
        function: called with the values of a batch by name; runs forward and backward and returns
            the loss.
        values: a batch. Tensors are copied to static ones, anything else stays as it is here.
        parameters: their gradients are those of the step.
        pool: of another graph of the same recorder, to share its memory.

    Raises:
        Exception: the step cannot be recorded; gradients and random state are as before.
    """

    def __init__(
        self,
        function: Callable[[dict[str, Any]], Tensor],
        values: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        recorder: Recorder,
        pool: Any = None,
    ) -> None:
        self._parameters = list(parameters)
        static = {
            name: value.detach().clone() if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        self._inputs = {name: v for name, v in static.items() if isinstance(v, Tensor)}

        def step() -> tuple[Tensor, list[Tensor | None]]:
            # So that backward makes new ones, in the graph's memory.
            for parameter in self._parameters:
                parameter.grad = None
            loss = function(dict(static))
            return loss, [parameter.grad for parameter in self._parameters]

        earlier = [parameter.grad for parameter in self._parameters]
        try:
            self._recording = recorder.record(step, pool)
        finally:
            for parameter, grad in zip(self._parameters, earlier, strict=True):
                parameter.grad = grad

    @property
    def pool(self) -> Any:
        """Memory that graphs of the same recorder may share."""
        return self._recording.pool

    @property
    def gradients(self) -> list[Tensor]:
        """The static gradients. After a replay that added to nothing `parameter.grad` is one."""
        return [grad for grad in self._recording.output[1] if grad is not None]

    def __call__(self, values: Mapping[str, Any], static: Collection[int]) -> Tensor:
        """Replay on another batch of the same shapes.

        As backward does, adds to the gradients that are there, and sets those that are None.

        Args:
            static: `id` of every gradient that this graph or one that shares its memory owns.

        Returns:
            The loss; a tensor of its own.
        """
        for name, buffer in self._inputs.items():
            buffer.copy_(values[name], non_blocking=True)
        self._set_aside(static)
        self._recording.replay()
        loss, gradients = self._recording.output
        sums, terms = [], []
        for parameter, grad in zip(self._parameters, gradients, strict=True):
            if grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = grad
            else:
                sums.append(parameter.grad)
                terms.append(grad)
        if sums:
            torch._foreach_add_(sums, terms)
        return loss.detach().clone()

    def _set_aside(self, static: Collection[int]) -> None:
        """Copy gradients out of the memory that the replay is about to write."""
        owned = [(p, p.grad) for p in self._parameters if p.grad is not None]
        owned = [(parameter, grad) for parameter, grad in owned if id(grad) in static]
        if not owned:
            return
        copies = [torch.empty_like(grad) for _, grad in owned]
        torch._foreach_copy_(copies, [grad for _, grad in owned])
        for (parameter, _), copy in zip(owned, copies, strict=True):
            parameter.grad = copy


class StepGraphs:
    """The graphs of one training step, one for each combination of shapes.

    A combination runs eagerly `warm_up` times, is then captured, and replayed from there on. At
    most `limit` are captured; they share one pool of memory. What cannot be captured runs eagerly,
    and the log says why, once.

    Attributes:
        steps: calls so far.
        replayed: how many of them were replays.
        reason: why calls run eagerly, warming up apart; None: none does.
    """

    def __init__(self, recorder: Recorder, *, warm_up: int = WARM_UP, limit: int = LIMIT) -> None:
        self.steps = 0
        self.replayed = 0
        self.reason: str | None = None
        self._recorder = recorder
        self._warm_up = warm_up
        self._limit = limit
        self._failed = False
        self._graphs: dict[Hashable, StepGraph] = {}
        self._static: set[int] = set()
        self._seen: Counter[Hashable] = Counter()
        self._parameters: list[tuple[int, bool]] = []

    def run(
        self,
        function: Callable[[dict[str, Any]], Tensor],
        values: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
        context: Hashable = None,
    ) -> Tensor:
        """Run `function` on `values`, by a graph where there is one.

        Args:
            function: as in :class:`StepGraph`, and the same on every call.
            values: tensors, and numbers, strings or None, each value of which takes a graph of its
                own.
            parameters: those that train.
            context: what else the function depends on.

        Returns:
            The loss.
        """
        self.steps += 1
        if self._graphs and self._parameters != _identity(parameters):
            logger.info("parameters were replaced or frozen: CUDA graphs are captured anew")
            self.reset()
        key = self._key(values, context)
        if key is None:
            return function(dict(values))
        graph = self._graphs.get(key)
        if graph is None:
            self._seen[key] += 1
            if self._seen[key] <= self._warm_up:
                return self._recorder.warm_up(lambda: function(dict(values)))
            graph = self._record(key, function, values, parameters)
            if graph is None:
                return function(dict(values))
        self.replayed += 1
        return graph(values, self._static)

    def reset(self) -> None:
        """Forget all graphs; each combination of shapes warms up again."""
        self._graphs.clear()
        self._static.clear()
        self._seen.clear()

    def summary(self) -> str:
        """What became of the steps, in one line."""
        if not self.replayed:
            return self.reason or f"no shape came more than {self._warm_up} times"
        shapes = "1 shape" if len(self._graphs) == 1 else f"{len(self._graphs)} shapes"
        text = f"{shapes} captured, {self.replayed} of {self.steps} steps replayed"
        return text if self.reason is None else f"{text}; {self.reason}"

    def _key(self, values: Mapping[str, Any], context: Hashable) -> Hashable:
        """What a graph is kept under; None where there is none and will be none."""
        if self._failed:
            return None
        parts: list[Hashable] = [context]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.layout is torch.strided:
                parts.append((name, value.shape, value.dtype, value.device))
            elif value is None or isinstance(value, bool | int | float | str):
                parts.append((name, type(value), value))
            else:
                self._note(f"{name} is a {type(value).__name__}, neither tensor nor plain value")
                return None
        key = tuple(parts)
        if key not in self._graphs and len(self._graphs) >= self._limit:
            self._note(f"shapes vary, and no more than {self._limit} are captured")
            return None
        return key

    def _record(
        self,
        key: Hashable,
        function: Callable[[dict[str, Any]], Tensor],
        values: Mapping[str, Any],
        parameters: Sequence[nn.Parameter],
    ) -> StepGraph | None:
        pool = next((graph.pool for graph in self._graphs.values()), None)
        try:
            graph = StepGraph(function, values, parameters, self._recorder, pool)
        # Whatever it is: an error of the step itself comes up again in the eager run that follows.
        except Exception as error:
            # Older graphs go too: the generator they draw from may have been replaced.
            self._failed = True
            self.reset()
            self._note(f"the step cannot be captured: {_cause(error)}")
            return None
        self._parameters = _identity(parameters)
        self._graphs[key] = graph
        self._static.update(id(grad) for grad in graph.gradients)
        return graph

    def _note(self, reason: str) -> None:
        if self.reason != reason:
            self.reason = reason
            logger.warning("steps run without a CUDA graph: %s", reason)


def _identity(parameters: Sequence[nn.Parameter]) -> list[tuple[int, bool]]:
    """What a graph has fixed about parameters, and code outside it can change."""
    return [(parameter.data_ptr(), parameter.requires_grad) for parameter in parameters]


def _cause(error: BaseException) -> str:
    """The first line of what went wrong first: ending a broken capture raises an error too."""
    if error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
