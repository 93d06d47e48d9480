"""What a device can sustain: the ceilings that :mod:`.cost` divides bytes and FLOPs by.

Nothing here was measured. The table holds the vendor's peak figures; a device that was measured is
built by :meth:`Device.measured`.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["PEAKS", "Device", "Peak", "device_for"]

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
        triton_matmul: throughput of the Triton base matmul over the vendor library's.
        source: where the ceilings come from.
    """

    name: str
    flops: float
    flops32: float
    bandwidth: float
    gap: float = GAP
    host: float = HOST
    triton_matmul: float = TRITON_MATMUL
    source: str = ""

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
        triton_matmul: float = TRITON_MATMUL,
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
        if min(gap, host) < 0:
            raise ValueError(f"{name}: a launch cannot cost less than nothing")
        wide = flops if flops32 is None else flops32
        return cls(name, flops, wide, bandwidth, gap, host, triton_matmul, "measured")


class Peak(NamedTuple):
    """Vendor peaks: dense FLOP/s of bf16 with float32 accumulation, of float32 without tensor
    cores, and B/s of memory.
    """

    bf16: float
    fp32: float
    bandwidth: float


# Keys are words of the name that torch reports; the entry with the most words found is taken.
# From NVIDIA's data sheets (A100, H100, H200, HGX B200, L40S, L4, A10) and architecture white
# papers (GA102, Ada, RTX Blackwell); figures given "with sparsity" are halved.
PEAKS: dict[str, Peak] = {
    "A100": Peak(312e12, 19.5e12, 2.039e12),
    "A100 40GB": Peak(312e12, 19.5e12, 1.555e12),
    "H100": Peak(989.4e12, 67e12, 3.35e12),
    "H100 PCIe": Peak(756e12, 51e12, 2.0e12),
    "H100 NVL": Peak(835e12, 60e12, 3.9e12),
    "H200": Peak(989.4e12, 67e12, 4.8e12),
    "B200": Peak(2250e12, 75e12, 8.0e12),
    "L40S": Peak(362e12, 91.6e12, 0.864e12),
    "L4": Peak(121e12, 30.3e12, 0.3e12),
    "A10": Peak(125e12, 31.2e12, 0.6e12),
    "RTX 3090": Peak(71e12, 35.6e12, 0.936e12),
    "RTX 4090": Peak(165.2e12, 82.6e12, 1.008e12),
    "RTX 5090": Peak(209.5e12, 104.8e12, 1.792e12),
}

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
    )


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower()))
