"""What one multiprocessor of a GPU does in a clock: the constants of :mod:`.schedule`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .peaks import PEAKS

__all__ = ["CHIPS", "Chip", "chip_for"]

# Bytes that one multiprocessor takes from L2 in a clock at most, assumed.
_PORT = 64


@dataclass(frozen=True)
class Chip:
    """Constants of one GPU.

    Attributes:
        name: key of `CHIPS`.
        capability: compute capability.
        multiprocessors: how many there are.
        clock: Hz at which the vendor states the peaks.
        flops, flops32: FLOPs of a multiprocessor in a clock: tensor cores with 16-bit operands, and
            float32 without them.
        l2: bytes that L2 delivers to all of them in a clock.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    flops: float
    flops32: float
    l2: float

    def l2_share(self, running: int | None = None) -> float:
        """Bytes in a clock for each of `running` multiprocessors, None for all."""
        return min(_PORT, self.l2 / (running or self.multiprocessors))


class _Size(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    l2: float


# Multiprocessors, and the boost clock that the vendor states its peaks for: architecture white
# papers and data sheets, as `PEAKS`; where only the peak is stated (H100 PCIe and NVL,
# B200, L40S) the clock that gives it. L2: 5120 bytes in a clock is stated for A100 (white paper);
# that H100 has as much, B200 twice as much (two dies) and the others 16 for each multiprocessor is
# assumed.
_SIZES: Mapping[str, _Size] = {
    "A100": _Size((8, 0), 108, 1.410e9, 5120),
    "A100 40GB": _Size((8, 0), 108, 1.410e9, 5120),
    "H100": _Size((9, 0), 132, 1.830e9, 5120),
    "H100 PCIe": _Size((9, 0), 114, 1.620e9, 5120),
    "H100 NVL": _Size((9, 0), 132, 1.545e9, 5120),
    "H200": _Size((9, 0), 132, 1.830e9, 5120),
    "B200": _Size((10, 0), 148, 1.856e9, 10240),
    "L40S": _Size((8, 9), 142, 2.490e9, 16 * 142),
    "L4": _Size((8, 9), 58, 2.040e9, 16 * 58),
    "A10": _Size((8, 6), 72, 1.695e9, 16 * 72),
    "RTX 3090": _Size((8, 6), 82, 1.695e9, 16 * 82),
    "RTX 4090": _Size((8, 9), 128, 2.520e9, 16 * 128),
    "RTX 5090": _Size((12, 0), 170, 2.407e9, 16 * 170),
}
_NEAREST = {(8, 0): "A100", (8, 7): "A100", (8, 6): "A10", (8, 9): "L40S"}
_KIN = {9: "H100", 10: "B200", 11: "B200"}


def _chip(name: str, size: _Size) -> Chip:
    peak, of_all = PEAKS[name], size.multiprocessors * size.clock
    return Chip(
        name,
        size.capability,
        size.multiprocessors,
        size.clock,
        peak.bf16 / of_all,
        peak.fp32 / of_all,
        size.l2,
    )


CHIPS: Mapping[str, Chip] = {name: _chip(name, size) for name, size in _SIZES.items()}


def chip_for(name: str, capability: tuple[int, int] | None = None) -> Chip:
    """The chip of a GPU by the name torch reports; for an unknown one, that of its architecture.

    Args:
        name: e.g. "NVIDIA H100 80GB HBM3".
        capability: compute capability; without it an unknown GPU is taken for an H100.
    """
    words = set(name.lower().replace("-", " ").split())
    known = [key for key in CHIPS if set(key.lower().split()) <= words]
    if known:
        return CHIPS[max(known, key=len)]
    if capability is None:
        return CHIPS["H100"]
    return CHIPS[_NEAREST.get(capability) or _KIN.get(capability[0], "RTX 5090")]
