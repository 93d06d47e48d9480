"""What a device sustains: FLOP/s of a large matmul, B/s of a large copy, seconds of a launch."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from heterolora.bench.harness.timing import BenchError, stopwatch_for

__all__ = ["Ceilings", "ceilings", "measure_ceilings"]


@dataclass(frozen=True)
class Ceilings:
    """Measured on one device.

    Attributes:
        flops: FLOP/s of a square matmul of bfloat16 operands.
        flops32: the same of float32 operands.
        bandwidth: B/s of a copy far larger than any cache, reads and writes together.
        host: seconds the host takes to launch one small operation.
    """

    flops: float
    flops32: float
    bandwidth: float
    host: float


def measure_ceilings(device: torch.device, *, scale: float = 1.0) -> Ceilings:
    """Each the best of five, in a few seconds; on a CPU by the CPU time of the process, as
    everywhere in the bench.

    Args:
        scale: shrinks the matrices, for tests.

    Raises:
        BenchError: the clock is too coarse for this device.
    """
    cuda = device.type == "cuda"
    side, megabytes = (8192, 1024) if cuda else (1024, 128)
    side, elements = max(16, int(side * scale)), max(4096, int(megabytes * 2**18 * scale))

    def flops(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        return 2 * side**3 / _best(lambda: torch.mm(a, a, out=out), device)

    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / _best(lambda: target.copy_(source), device)
    small = torch.ones(16, device=device)
    return Ceilings(
        flops=flops(torch.bfloat16),
        flops32=flops(torch.float32),
        bandwidth=bandwidth,
        host=_launch_seconds(lambda: small.mul_(1.0), device),
    )


def ceilings(device: torch.device, *, scale: float = 1.0) -> dict[str, Any]:
    """As results carry them: {"bandwidth": B/s, "flops": {"fp32", "bf16": FLOP/s}}."""
    found = measure_ceilings(device, scale=scale)
    return {"bandwidth": found.bandwidth, "flops": {"fp32": found.flops32, "bf16": found.flops}}


def _best(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Least seconds of one call; each repeat runs it three times, so that a clock can see it."""
    call()
    watch = stopwatch_for(device)
    best = float("inf")
    for _ in range(repeats):
        watch.start()
        for _ in range(3):
            call()
        best = min(best, watch.stop()[0] / 3)
    # A clock that saw nothing must not become an infinite ceiling.
    if best <= 0:
        raise BenchError("the clock is too coarse to measure this device")
    return best


def _launch_seconds(call: Callable[[], object], device: torch.device, count: int = 1000) -> float:
    """Seconds the host takes to launch one small operation."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        for _ in range(count):
            call()
        best = min(best, (clock() - started) / count)
    return best
