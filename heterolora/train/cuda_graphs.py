"""CUDA graphs of a training step: captured once for each shape of batch, then replayed.

A replay starts a whole forward and backward pass with one launch, and no Python runs in it. What
Python decides in a step (a shape, a branch, a number) stays what it was in the captured one,
forward hooks do not run, and nothing in the step may read a tensor on the host.

A :class:`Recorder` makes a recording of any function; :class:`StepGraph` is one of a training step,
and :class:`StepGraphs` keeps one for each shape. Warm-up on a side stream and capture on the same
one follow PyTorch's notes on CUDA graphs
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = [
    "LIMIT",
    "WARM_UP",
    "CudaRecorder",
    "NoHostReads",
    "Recorder",
    "Recording",
    "StepGraph",
    "StepGraphs",
    "host_read",
]

logger = logging.getLogger("heterolora")

# As many runs as torch.cuda.make_graphed_callables makes first. They compile the kernels, and
# `fuse` finds its groups in the first two.
WARM_UP = 3
LIMIT = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Recording(Generic[T]):
    """A recorded function.

    Attributes:
        output: what the function returned; `replay` writes these tensors anew. Before the first
            replay they hold nothing.
        replay: does again what the function did on the device, on the current stream.
        pool: memory that other recordings may share, as long as none needs the output of another
            after its own replay.
    """

    output: T
    replay: Callable[[], None]
    pool: Any = None


class Recorder(Protocol):
    """How a function is made ready, and recorded without being run."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run the function as it will be recorded."""

    def record(self, function: Callable[[], T], pool: Any = None) -> Recording[T]:
        """Record the function; it is called, but nothing runs on the device.

        Raises:
            Exception: it cannot be recorded. The random state is then as before.
        """


class CudaRecorder:
    """Records by stream capture on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device(device.type, index)
        self._stream = torch.cuda.Stream(self._device)

    def warm_up(self, function: Callable[[], T]) -> T:
        """Run the function on the stream that captures use; the current stream waits for it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], T], pool: Any = None) -> Recording[T]:
        """Capture the function, into the memory pool of another recording if one is given.

        It is called twice. The first capture is thrown away: it looks at every operator before it
        runs, because a read on the host in the middle of a capture leaves torch's allocator and
        random generator in the middle of it too.

        Raises:
            RuntimeError: the function reads a tensor on the host.
            Exception: whatever else it raises.
        """
        if pool is None:
            pool = torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self._device.index]
        random_state = generator.get_state()
        try:
            # Entered here too, as `torch.cuda.graph` stays in its stream when a capture fails.
            with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
                scout, _ = self._capture(lambda: self._inspect(function), pool)
                graph, output = self._capture(function, pool)
                # Only now: a pool must not be without a graph in between.
                scout.reset()
        except Exception:
            # While the traceback still holds the graph, which the allocator would ask otherwise.
            self._mend(pool, generator, random_state)
            raise
        return Recording(output, graph.replay, pool)

    def _inspect(self, function: Callable[[], Any]) -> None:
        with NoHostReads(self._device.type):
            function()

    def _capture(self, function: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on: one that pins memory for the next batch, for example.
        with torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = function()
        return graph, output

    def _mend(self, pool: Any, generator: torch.Generator, state: Tensor) -> None:
        """End what a capture that broke off has begun, as far as torch did not."""
        # It raises where the allocator was told, as it is where the capture itself could end.
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
        try:
            torch.rand(1, device=self._device)
        except RuntimeError:
            # It waits for the end of the capture, and has no other way out.
            generator.graphsafe_set_state(torch.Generator(self._device))
        generator.set_state(state)


class NoHostReads(TorchDispatchMode):
    """Raises RuntimeError before an operator that makes the host wait for devices of a type."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reason = host_read(func, args, kwargs or {}, self._device_type)
        if reason is not None:
            raise RuntimeError(reason)
        return func(*args, **(kwargs or {}))


def host_read(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device_type: str
) -> str | None:
    """Why an operator call on devices of that type cannot be captured, or None: it reads a value or
    a size on the host, or copies between host and device.
    """
    name = func._schema.name
    devices = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
    if device_type not in devices:
        return None
    if torch.Tag.data_dependent_output in func.tags:
        return f"{name} reads a tensor on the host"
    if name in ("aten::index", "aten::index_put", "aten::index_put_"):
        if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
            return f"{name} with a mask reads on the host how many elements it selects"
    elif torch.Tag.dynamic_output_shape in func.tags:
        return f"{name} reads the size of its result on the host"
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        devices.add(torch.device(kwargs["device"]).type)
    if name in ("aten::_to_copy", "aten::copy_") and len(devices) > 1:
        return f"{name} copies between host and device"
    return None


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
