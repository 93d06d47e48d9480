"""Recording what a function does on a CUDA device, to replay it with one launch.

Warm-up on a side stream and capture on the same one follow PyTorch's notes on CUDA graphs
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["WARM_UP", "CudaRecorder", "NoHostReads", "Recorder", "Recording", "host_read"]

# As many runs as torch.cuda.make_graphed_callables makes first. They compile the kernels, and
# `fuse` finds its groups in the first two.
WARM_UP = 3

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
