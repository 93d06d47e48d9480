"""What a training step of a group should cost, by bytes, FLOPs and launches. Predictions only.

A pass of an implementation is a list of steps (:mod:`.cost_steps`)::

    t_step = max(bytes / bandwidth, FLOPs / (ceiling * efficiency)) + launches * gap       [s]
    t_pass = max(sum of t_step, launches * host + call)                                    [s]

with bytes [B] counted as if nothing stayed in a cache: each launch reads each of its operands once
and writes its results once. FLOPs are the 2 m n k of every matmul. `efficiency` is 1 but for base
matmuls. There it is, for 16-bit operands on a GPU, by how much a last wave of tiles, edges and
short sums make the shape fall short of a long square one (:mod:`.schedule`; the library is taken
to have tiles like ours), and for those of the Triton kernels `Device.triton_matmul` besides. `host`
is the device's, or :data:`TRITON_HOST` for a Triton launch; `call` is the Python around the
launches (:data:`CALL`). A CPU runs an operation when it is launched, so there `call` is added to
the sum; a captured graph has neither. The two ceilings of a device, bandwidth [B/s] and FLOP/s, are
those of :mod:`.devices` or measured.

Left out, because it is the same whatever runs: gradients of biases, the optimizer, and the
accumulation of a shortcut's dU into its source's gradient.

Within a step memory and arithmetic overlap, between steps nothing does. An accumulating matmul
(beta = 1) that is bound by FLOPs is therefore taken to read its output for nothing, which favours
`aten` a little.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .cost_steps import LowRank, Problem, Step, aten_steps, base_steps, peft_steps, triton_steps
from .devices import Device
from .schedule import efficiency

__all__ = [
    "CALL",
    "STEPS",
    "TRITON_HOST",
    "Estimate",
    "Load",
    "LowRank",
    "Pass",
    "Problem",
    "Step",
    "estimate",
    "load_of",
    "step_seconds",
]

# Seconds of the host for a Triton launch: its arguments are bound in Python, 6 to 14 us measured
# for these kernels on one core of an AMD EPYC with a driver that launches nothing; 6 us for one
# that does is assumed.
TRITON_HOST = 15e-6
# Seconds of Python in a call, without the operations themselves: (forward, backward) of a group of
# one site, and of each site more. From steps of layers with 32 inputs and 4 rows on one core of an
# AMD EPYC, and for Triton from the launchers with a driver that launches nothing; `Device.call`
# scales it.
CALL = {
    "base": ((0.0, 0.0), (0.0, 0.0)),
    "peft": ((25e-6, 50e-6), (25e-6, 50e-6)),
    "aten": ((116e-6, 187e-6), (72e-6, 71e-6)),
    "triton": ((125e-6, 255e-6), (65e-6, 85e-6)),
}

STEPS = {"base": base_steps, "peft": peft_steps, "aten": aten_steps, "triton": triton_steps}


@dataclass(frozen=True)
class Load:
    """Seconds of work on the device and of launching it on the host, which overlap."""

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Load") -> "Load":
        return Load(self.device + other.device, self.host + other.host)

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)


@dataclass(frozen=True)
class Pass:
    """Forward or backward of one implementation.

    Attributes:
        device_seconds: time on the device, all steps one after the other.
        host_seconds: time the host needs to launch them, Python included.
        memory_seconds: the part of `device_seconds` in steps bound by bytes; gaps not included.
        compute_seconds: the part in steps bound by FLOPs.
        steps: what it is made of.
        ahead: whether the host runs ahead of the device; a CPU is both.
    """

    device_seconds: float
    host_seconds: float
    memory_seconds: float
    compute_seconds: float
    steps: tuple[Step, ...]
    ahead: bool = True

    @property
    def seconds(self) -> float:
        if not self.ahead:
            return self.device_seconds + self.host_seconds
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
    further = len(problem.sites) - 1
    for name, steps in STEPS.items():
        host = TRITON_HOST if name == "triton" and device.host else device.host
        first, more = CALL[name]
        passes = [
            _pass(taken, device, host, device.call * (once + further * each))
            for taken, once, each in zip(steps(problem), first, more, strict=True)
        ]
        found[name] = Estimate(name, *passes)
    return found


def load_of(steps: Iterable[Step], device: Device) -> Load:
    """Of steps one after the other, gaps included, without the Python between them."""
    seconds, launches = 0.0, 0
    for step in steps:
        by_bytes, by_flops, gap = step_seconds(step, device)
        seconds += max(by_bytes, by_flops) + gap
        launches += step.launches
    return Load(seconds, device.host * launches)


def step_seconds(step: Step, device: Device) -> tuple[float, float, float]:
    """Seconds by bytes, by FLOPs, and in gaps; the first two overlap."""
    ceiling = device.flops if step.itemsize <= 2 else device.flops32
    if step.own_matmul:
        ceiling *= device.triton_matmul
    if step.matmul is not None and device.chip is not None and step.itemsize <= 2:
        ceiling *= efficiency(*step.matmul, device.chip)
    return step.bytes / device.bandwidth, step.flops / ceiling, step.launches * device.gap


def _pass(steps: Sequence[Step], device: Device, host: float, call: float) -> Pass:
    memory = compute = gaps = 0.0
    for step in steps:
        by_bytes, by_flops, gap = step_seconds(step, device)
        if by_bytes >= by_flops:
            memory += by_bytes
        else:
            compute += by_flops
        gaps += gap
    host_seconds = sum(step.launches for step in steps) * host + call
    return Pass(
        memory + compute + gaps, host_seconds, memory, compute, tuple(steps), ahead=device.host > 0
    )
