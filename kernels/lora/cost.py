"""What a training step of a group should cost, by bytes, FLOPs and launches. Predictions only.

A pass of an implementation is a list of steps (:mod:`.cost_steps`)::

    t_step = max(bytes / bandwidth, FLOPs / (ceiling * efficiency)) + launches * gap       [s]
    t_pass = max(sum of t_step, launches * host)                                           [s]

with bytes [B] counted as if nothing stayed in a cache: each launch reads each of its operands once
and writes its results once. FLOPs are the 2 m n k of every matmul. `efficiency` is 1 but for the
base matmul of the Triton kernels (`Device.triton_matmul`); `host` is the device's, twice that for a
Triton launch. The two ceilings of a device, bandwidth [B/s] and FLOP/s, are those of
:mod:`.devices` or measured.

Left out, because it is the same whatever runs: gradients of biases, the optimizer, the accumulation
of a shortcut's dU into its source's gradient, and the fixed cost of calling an operation.

Within a step memory and arithmetic overlap, between steps nothing does. An accumulating matmul
(beta = 1) that is bound by FLOPs is therefore taken to read its output for nothing, which favours
`aten` a little.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .cost_steps import (
    LowRank,
    Problem,
    Step,
    aten_steps,
    base_steps,
    peft_steps,
    triton_steps,
)
from .devices import Device

__all__ = [
    "STEPS",
    "TRITON_HOST",
    "Estimate",
    "LowRank",
    "Pass",
    "Problem",
    "Step",
    "estimate",
    "fastest",
    "step_seconds",
]

# Host time of a Triton launch over that of a torch operation, assumed: its launcher is Python.
TRITON_HOST = 2.0

STEPS = {"base": base_steps, "peft": peft_steps, "aten": aten_steps, "triton": triton_steps}


@dataclass(frozen=True)
class Pass:
    """Forward or backward of one implementation.

    Attributes:
        device_seconds: time on the device, all steps one after the other.
        host_seconds: time the host needs to launch them.
        memory_seconds: the part of `device_seconds` in steps bound by bytes; gaps not included.
        compute_seconds: the part in steps bound by FLOPs.
        steps: what it is made of.
    """

    device_seconds: float
    host_seconds: float
    memory_seconds: float
    compute_seconds: float
    steps: tuple[Step, ...]

    @property
    def seconds(self) -> float:
        return max(self.device_seconds, self.host_seconds)

    @property
    def bytes(self) -> int:
        return sum(step.bytes for step in self.steps)

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def launches(self) -> int:
        return sum(step.launches for step in self.steps)

    @property
    def bound(self) -> str:
        """What most of the time goes to: "launches", "memory" or "compute"; "" for no steps."""
        if not self.steps:
            return ""
        gaps = self.device_seconds - self.memory_seconds - self.compute_seconds
        most = max(gaps, self.memory_seconds, self.compute_seconds)
        if self.host_seconds > self.device_seconds or gaps == most:
            return "launches"
        return "memory" if most == self.memory_seconds else "compute"


@dataclass(frozen=True)
class Estimate:
    """Both passes of one implementation; bytes, FLOPs, launches and seconds are those of both."""

    implementation: str
    forward: Pass
    backward: Pass

    @property
    def seconds(self) -> float:
        return self.forward.seconds + self.backward.seconds

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.backward.bytes

    @property
    def flops(self) -> int:
        return self.forward.flops + self.backward.flops

    @property
    def launches(self) -> int:
        return self.forward.launches + self.backward.launches


def estimate(problem: Problem, device: Device) -> dict[str, Estimate]:
    """What each implementation should take: "base" (the frozen layers alone: a floor for eager
    code), "peft", "aten" and "triton".
    """
    found = {}
    for name, steps in STEPS.items():
        forward, backward = steps(problem)
        host = device.host * (TRITON_HOST if name == "triton" else 1.0)
        found[name] = Estimate(name, _pass(forward, device, host), _pass(backward, device, host))
    return found


def fastest(
    problem: Problem,
    device: Device,
    among: Sequence[str] = ("aten", "triton"),
    *,
    backward: bool = True,
) -> str:
    """The implementation with the least expected time, the first of `among` in a tie.

    Args:
        among: names that `estimate` knows.
        backward: whether a backward pass follows the forward pass.
    """
    found = estimate(problem, device)

    def seconds(name: str) -> float:
        return found[name].seconds if backward else found[name].forward.seconds

    return min(among, key=seconds)


def step_seconds(step: Step, device: Device) -> tuple[float, float, float]:
    """Seconds by bytes, by FLOPs, and in gaps; the first two overlap."""
    ceiling = device.flops if step.itemsize <= 2 else device.flops32
    if step.own_matmul:
        ceiling *= device.triton_matmul
    return step.bytes / device.bandwidth, step.flops / ceiling, step.launches * device.gap


def _pass(steps: Sequence[Step], device: Device, host: float) -> Pass:
    memory = compute = gaps = 0.0
    for step in steps:
        by_bytes, by_flops, gap = step_seconds(step, device)
        if by_bytes >= by_flops:
            memory += by_bytes
        else:
            compute += by_flops
        gaps += gap
    launches = sum(step.launches for step in steps)
    return Pass(memory + compute + gaps, launches * host, memory, compute, tuple(steps))
