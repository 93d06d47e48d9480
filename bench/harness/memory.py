"""Memory of one training step: the peak of what it allocates, and the bytes it saves for the
backward pass.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = [
    "MemoryUse",
    "peak_bytes",
    "resident_bytes",
    "saved_bytes",
    "without_profiler_marks",
]


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one training step.

    Attributes:
        resident: parameters, buffers and optimizer state, alive before and after the step.
        peak: most that the step holds at once on top of what was alive before it.
        saved: kept from forward for backward, parameters and buffers excluded.
    """

    resident: int
    peak: int
    saved: int

    @property
    def total(self) -> int:
        return self.resident + self.peak


def peak_bytes(step: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at once during `step()`, over what was alive before it.

    On CUDA this is the caching allocator's own counter. The CPU allocator has none, so there the
    profiler records each allocation and release during the step and the running sum is followed.
    Scratch space that a library takes from the operating system by itself (oneDNN, BLAS) is not
    seen on either.

    Releases of tensors older than the step are not seen on a CPU: clear gradients before, not in, a
    measured step.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        without_profiler_marks(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        step()
    with tempfile.TemporaryDirectory() as folder:
        # The exported trace is the public form of the allocation events; `key_averages` has only
        # sums per operator.
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    return _peak_of_deltas(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )


@contextlib.contextmanager
def without_profiler_marks() -> Iterator[None]:
    """Drops the "USDT:" lines that the profiler library writes to stderr; all else there is kept.

    The library reads its log level from the environment when torch is loaded: too late to set it.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held:
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            held.seek(0)
            for line in held:
                if not line.startswith(b"USDT:"):
                    os.write(stderr, line)
            os.close(stderr)


def _peak_of_deltas(deltas: Iterable[tuple[float, int]]) -> int:
    alive = peak = 0
    for _, change in sorted(deltas, key=lambda delta: delta[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def saved_bytes(forward: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that `forward()` saves for backward through autograd, each storage counted once.

    `exclude` (parameters, buffers) shares its storage with what is saved at no cost and is not
    counted. What a custom function keeps outside `save_for_backward` is invisible here, though not
    to :func:`peak_bytes`.
    """
    free = {tensor.untyped_storage().data_ptr() for tensor in exclude}
    # The storages are held until the end, so that no address is handed out twice while counting.
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in free:
            seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = sum(storage.nbytes() for storage in seen.values())
    del result
    return total


def resident_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors` (tied weights count once)."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
