"""The tiles that are shipped: plain data, by compute capability and element size."""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["KERNELS", "Tile", "alternatives", "flops_per_byte", "shipped"]

KERNELS = ("shrink", "expand", "expand_tma", "dy", "dx", "da", "score")


@dataclass(frozen=True)
class Tile:
    """Block sizes of one kernel; each kernel's docstring says which dimensions m, n, k are.

    Attributes:
        m, n, k: powers of two, at least 16.
        warps, stages: passed to the compiler.
    """

    m: int
    n: int
    k: int
    warps: int = 8
    stages: int = 3


# Tiles, by kernel; "kernel 128" is for that block_r, "kernel odd", "kernel dropout" and "kernel
# few" as in `Launch.tile`. Reasons, none of them measured yet:
# - expand and dx are matmuls, bound by tensor cores where m, n and k are long. 128x256 does 85
#   operations for each byte it loads, 128x128 does 64; eight warps hold the wider accumulator only
#   where tensor cores read both operands from shared memory (Hopper, Blackwell). One program runs
#   on a multiprocessor, so its stages may fill the shared memory.
# - shrink, dy and da read one large operand once and are bound by memory. By Little's law an H100
#   needs 3.35 TB/s * 0.8 us / 132 = 20 KiB in flight on each multiprocessor: 64 rows of 128 columns
#   are 16 KiB a stage, of which all but one or two are in flight.
# - dy writes a share of dS for every block of columns, so blocks are as wide as registers allow.
# - With few rows shrink takes 16 at a time, so that more multiprocessors read; expand then has few
#   tiles too, and needs registers for adding up the parts of S.
# - A mask of dropout needs as many registers as the tile it masks; loads of single elements too.
_LARGE = {  # 163 KiB of shared memory for a block
    "shrink": Tile(64, 64, 128, stages=4),
    "shrink 128": Tile(64, 64, 128, stages=3),
    "shrink dropout": Tile(64, 64, 64, stages=4),
    "shrink odd": Tile(64, 64, 32, stages=2),
    "shrink few": Tile(16, 64, 64, warps=4, stages=4),
    "expand": Tile(128, 128, 64, stages=4),
    "expand_tma": Tile(128, 128, 64, stages=4),
    "expand few": Tile(64, 64, 64, stages=4),
    "expand odd": Tile(64, 64, 32, stages=2),
    "expand odd few": Tile(32, 64, 32, stages=2),
    "dx": Tile(128, 128, 64, stages=4),
    "dx dropout": Tile(128, 64, 64, stages=4),
    "dx odd": Tile(64, 64, 32, warps=4, stages=2),
    "dy": Tile(64, 256, 64, stages=3),
    "dy 128": Tile(64, 64, 64, stages=3),
    "dy odd": Tile(32, 64, 64, stages=2),
    "da": Tile(64, 64, 128, stages=4),
    "da odd": Tile(32, 64, 64, stages=2),
    "score": Tile(64, 64, 64, stages=3),
    # The Gram matrix of 128 columns fills half of the registers.
    "score 128": Tile(64, 16, 64, stages=3),
    "score odd": Tile(32, 64, 64, stages=2),
}
_HOPPER = {  # 227 KiB
    **_LARGE,
    "expand": Tile(128, 256, 64, stages=4),
    "expand_tma": Tile(128, 256, 64, stages=3),
    "dx": Tile(128, 256, 64, stages=4),
    # Two programs of two stages each instead of one of three.
    "dy": Tile(64, 256, 64, stages=2),
    "dy 64": Tile(64, 128, 64, stages=3),
    "dy 128": Tile(128, 128, 64, stages=2),
    "score 128": Tile(64, 64, 64, stages=3),
}
_SMALL = {  # 99 KiB
    **_LARGE,
    "shrink": Tile(64, 64, 128, stages=3),
    "shrink 128": Tile(64, 64, 64, stages=4),
    "expand_tma": Tile(128, 128, 64, stages=2),
    "dx": Tile(128, 128, 64, stages=3),
    "dy 64": Tile(64, 128, 64, stages=3),
    "score 64": Tile(64, 32, 64, stages=3),
}
_AMD = {  # 64 KiB
    **dict.fromkeys(KERNELS, Tile(64, 64, 64, warps=4, stages=2)),
    "expand": Tile(128, 128, 32, stages=2),
    "dx": Tile(128, 128, 32, stages=2),
}
# float32 is for exactness, not for speed: tiles that fit everywhere, small because without tensor
# cores each thread holds both operands of a product in registers.
_WIDE = {
    **dict.fromkeys(KERNELS, Tile(64, 64, 32, warps=4, stages=2)),
    "shrink": Tile(32, 64, 32, stages=2),
    "expand": Tile(64, 64, 32, warps=4, stages=3),
    "expand 64": Tile(32, 32, 32, warps=4, stages=3),
    "expand few": Tile(16, 32, 32, warps=4, stages=2),
    "dx 64": Tile(32, 32, 32, warps=4, stages=3),
    "da": Tile(32, 64, 64, stages=2),
    "da 128": Tile(32, 64, 32, stages=2),
    "dy": Tile(32, 64, 32, stages=2),
    "dy 64": Tile(32, 16, 32, stages=2),
    "dy 128": Tile(32, 16, 32, stages=2),
    "score": Tile(32, 32, 32, stages=2),
    "score 128": Tile(32, 16, 32, stages=2),
}
_AMD_WIDE = {
    **dict.fromkeys(KERNELS, Tile(64, 64, 32, warps=4, stages=2)),
    "dy": Tile(32, 32, 32, warps=4, stages=2),
}


def shipped(capability: tuple[int, int], itemsize: int, *, hip: bool = False) -> Mapping[str, Tile]:
    """The tiles for a GPU, not tuned yet. For one that is not known, those of its nearest kin.

    Every one of them was compiled for its architectures without spilling registers, within their
    shared memory (`aot`).

    Args:
        capability: compute capability, e.g. (9, 0).
        itemsize: bytes of an element of x, 2 or 4.
        hip: whether it is an AMD GPU.
    """
    if hip:
        return _AMD if itemsize == 2 else _AMD_WIDE
    if itemsize == 4:
        return _WIDE
    if capability[0] in (9, 10, 11):
        return _HOPPER
    return _LARGE if capability in ((8, 0), (8, 7)) else _SMALL


# Beside the shipped tile, for matmuls of which there are few tiles: large ones load least for each
# operation, smaller ones fill the last wave, or the multiprocessors at all. Which one a launch
# takes is counted in waves from its shapes (`gpu.waves`). Where tiles of one size differ in warps
# or stages, the compiler keeps a few bytes of a thread on the stack with the others.
_CHOOSING = ("expand", "expand_tma", "dx")
_LESS = {
    **dict.fromkeys(
        _CHOOSING, (Tile(64, 128, 64, warps=4, stages=3), Tile(64, 64, 64, warps=4, stages=4))
    ),
    "dx": (Tile(64, 128, 64, warps=4, stages=3), Tile(64, 64, 64, stages=4)),
}
_LESS_HOPPER = dict.fromkeys(
    _CHOOSING,
    (
        Tile(128, 128, 64, stages=4),
        Tile(64, 128, 64, warps=4, stages=4),
        Tile(64, 64, 64, warps=4, stages=4),
    ),
)
_LESS_BLACKWELL = {
    **_LESS_HOPPER,
    "expand_tma": (
        Tile(128, 128, 64, stages=4),
        Tile(128, 64, 64, warps=4, stages=4),
        Tile(64, 64, 64, warps=4, stages=4),
    ),
    "dx": (
        Tile(128, 128, 64, stages=3),
        Tile(128, 64, 64, warps=4, stages=4),
        Tile(64, 64, 64, stages=4),
    ),
}


def alternatives(
    capability: tuple[int, int], itemsize: int, *, hip: bool = False
) -> Mapping[str, tuple[Tile, ...]]:
    """Tiles to choose from by kernel, the shipped one first; arguments as :func:`shipped`.

    For 16-bit elements in aligned rows, without dropout; elsewhere there is no choice.
    """
    if hip or itemsize != 2:
        return {}
    tiles = shipped(capability, itemsize)
    less: Mapping[str, tuple[Tile, ...]] = _LESS
    if tiles is _HOPPER:
        less = _LESS_HOPPER if capability[0] == 9 else _LESS_BLACKWELL
    return {kernel: (tiles[kernel], *others) for kernel, others in less.items()}


def flops_per_byte(capability: tuple[int, int]) -> float:
    """FLOPs that a multiprocessor's tensor cores do, with 16-bit operands, for each byte that L2
    delivers to it while all of them read: below so many a tile is bound by loads.

    From NVIDIA's white papers: FLOPs in a clock of a multiprocessor 2048 (A100), 4096 (H100), 8192
    (B200), 1024 (GA10x, Ada, RTX Blackwell). L2 delivers 5120 bytes in a clock on an A100 (stated);
    as much on an H100, twice as much on a B200 and 16 a multiprocessor elsewhere are assumed.
    """
    if capability[0] == 8:
        return 2048 / (5120 / 108) if capability in ((8, 0), (8, 7)) else 1024 / 16
    return {9: 4096 / (5120 / 132), 10: 8192 / (10240 / 148)}.get(capability[0], 1024 / 16)
