"""What vendors state of their GPUs."""

from typing import NamedTuple

__all__ = ["PEAKS", "Peak"]


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
