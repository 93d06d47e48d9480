"""The least work a step's adapted linears can do, for the roofline.

Matmuls count 2 FLOPs a multiply-add. Bytes are those of the ideal schedule of one group, in which
every activation is read or written once a pass and every weight once a pass: forward reads x, W, A
and B and writes Y; backward reads dY, x, W, A and B and writes dX, dA and dB. S is small enough to
be left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Work", "minimum"]


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one training step, forward and backward.

    Attributes:
        flops: with adapters.
        bytes: with adapters.
        base_flops: of the frozen layers alone, forward and dX.
        base_bytes: likewise.
    """

    flops: int
    bytes: int
    base_flops: int
    base_bytes: int

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The least time with adapters over the least without, at two ceilings of a device."""
        with_lora, frozen = (
            max(flops / flops_per_second, size / bytes_per_second)
            for flops, size in ((self.flops, self.bytes), (self.base_flops, self.base_bytes))
        )
        return with_lora / frozen

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.base_flops + other.base_flops,
            self.base_bytes + other.base_bytes,
        )


def minimum(
    groups: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    *,
    tokens: int,
    itemsize: int,
) -> Work:
    """The sum over `groups` of layers that read one input.

    Args:
        groups: module names; every layer in exactly one.
        shapes: (in_features, out_features) by module name.
        ranks: by module name; an adapter counts in float32, as PEFT keeps it.
        tokens: rows of every input.
        itemsize: bytes of an element of activations and base weights.
    """
    total = Work(0, 0, 0, 0)
    for names in groups:
        k = shapes[names[0]][0]
        n = sum(shapes[name][1] for name in names)
        base_flops = 2 * 2 * tokens * k * n
        base_bytes = itemsize * (2 * k * n + 2 * tokens * n + 2 * tokens * k)
        factors = sum(ranks[name] * sum(shapes[name]) for name in names)
        # S, dS, dA, dB and the two low-rank products: 2 forward, 4 backward.
        flops = base_flops + 3 * 2 * tokens * factors
        # Backward reads x again only where something of the group trains.
        extra = itemsize * tokens * k * (factors > 0) + 3 * 4 * factors
        total += Work(flops, base_bytes + extra, base_flops, base_bytes)
    return total
