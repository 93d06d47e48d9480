"""What a device can sustain: the ceilings that :mod:`.cost` divides bytes and FLOPs by.

No GPU here was measured. The table holds the vendors' peak figures; a device that was measured is
built by :meth:`Device.measured`.
"""

import contextlib
import platform
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from .chips import Chip, chip_for
from .peaks import PEAKS

__all__ = ["CPU", "PEAKS", "Device", "cpu_name", "device_for"]

# Of the vendor's peak, what long matmuls and copies are assumed to reach.
SUSTAINED_FLOPS = 0.70
SUSTAINED_BANDWIDTH = 0.90
# Seconds in which a kernel fills and drains the device, assumed.
GAP = 2e-6
# Seconds the host needs to launch one torch operation, assumed: the low end of 5 to 10 us.
HOST = 5e-6
# Throughput of our base matmul over the vendor library's, assumed until it is measured; this one
# number decides most long shapes. At m = n = k = 4096 on an H100 NVL a third party saw 0.95 from a
# tuned TMA kernel (https://github.com/CentML/lorafusion/issues/8); tiles that nobody has tuned are
# expected to lose twice as much.
TRITON_MATMUL = 0.90


@dataclass(frozen=True)
class Device:
    """Ceilings of one device.

    Attributes:
        name: what it is called in tables.
        flops: FLOP/s of a large matmul of 16-bit operands.
        flops32: FLOP/s of a large matmul of float32 operands.
        bandwidth: B/s, reads and writes together, of a large copy.
        gap: seconds on the device for each launch, beside the work.
        host: seconds on the host for each launch of a torch operation; 0 if the host does not run
            ahead of the device (a CPU), or under a CUDA graph.
        call: the Python of a call over that of the machine it was measured on (`cost.CALL`).
        triton_matmul: throughput of the Triton base matmul over the vendor library's.
        source: where the ceilings come from.
        chip: of a GPU, for the waves of tiles over its multiprocessors; None counts no waves.
    """

    name: str
    flops: float
    flops32: float
    bandwidth: float
    gap: float = GAP
    host: float = HOST
    call: float = 1.0
    triton_matmul: float = TRITON_MATMUL
    source: str = ""
    chip: Chip | None = None

    def captured(self) -> "Device":
        """The same device when a CUDA graph launches everything: the host takes no part."""
        return replace(self, host=0.0, call=0.0)

    @classmethod
    def measured(
        cls,
        name: str,
        *,
        flops: float,
        bandwidth: float,
        flops32: float | None = None,
        gap: float = GAP,
        host: float = HOST,
        call: float = 1.0,
        triton_matmul: float = TRITON_MATMUL,
        chip: Chip | None = None,
    ) -> "Device":
        """A device from its two measured ceilings.

        Args:
            flops: FLOP/s of a large matmul in the dtype of x.
            bandwidth: B/s of a large copy, reads and writes together.
            flops32: the same in float32; default `flops`.

        Raises:
            ValueError: a ceiling that is not positive, or a negative cost of a launch.
        """
        if min(flops, bandwidth, flops if flops32 is None else flops32, triton_matmul) <= 0:
            raise ValueError(f"{name}: ceilings must be positive")
        if min(gap, host, call) < 0:
            raise ValueError(f"{name}: a launch cannot cost less than nothing")
        wide = flops if flops32 is None else flops32
        rest = (gap, host, call, triton_matmul, "measured", chip)
        return cls(name, flops, wide, bandwidth, *rest)


# One core of an AMD EPYC with AVX-512 and bfloat16, as the bench measured it. It stands for every
# CPU: what is asked of it is only whether the Python of a call outweighs what a call saves.
CPU = Device(
    "a CPU core",
    flops=2.1e11,
    flops32=9.5e10,
    bandwidth=2.4e10,
    gap=1.5e-6,
    host=0.0,
    source="one core of an AMD EPYC, measured",
)


_NEAREST = {(8, 0): "A100", (8, 6): "A10", (8, 9): "L40S", (9, 0): "H100", (10, 0): "B200"}


def device_for(name: str, capability: tuple[int, int] | None = None) -> Device:
    """Ceilings for a GPU by the name torch reports; for an unknown one, those of its architecture.

    Args:
        name: e.g. "NVIDIA H100 80GB HBM3".
        capability: compute capability, for GPUs that are not in the table; without it an H100.
    """
    words = _words(name)
    known = max((key for key in PEAKS if _words(key) <= words), key=len, default=None)
    label, key = name, known
    if key is None:
        nearest = "RTX 5090" if capability is not None and capability >= (12, 0) else "H100"
        key = _NEAREST.get(capability, nearest) if capability is not None else nearest
        label = f"{name} (unknown: figures of {key})"
    peak = PEAKS[key]
    return Device(
        label,
        flops=SUSTAINED_FLOPS * peak.bf16,
        flops32=SUSTAINED_FLOPS * peak.fp32,
        bandwidth=SUSTAINED_BANDWIDTH * peak.bandwidth,
        source=f"{SUSTAINED_FLOPS:.0%} and {SUSTAINED_BANDWIDTH:.0%} of the vendor's peak FLOP/s "
        f"and B/s of {key}, not measured",
        chip=chip_for(name, capability) if known is None else chip_for(key),
    )


@lru_cache
def cpu_name() -> str:
    """What the system calls the processor, "AMD EPYC" for one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
