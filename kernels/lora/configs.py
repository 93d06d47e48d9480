"""Tile sizes and launch options: plain data, chosen on the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

__all__ = ["KERNELS", "Launch", "Tile", "launch_for", "shipped", "start"]

KERNELS = ("shrink", "expand", "dy", "dx", "da", "score")


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


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream."""
    kernel[grid](*args, **options)


@dataclass(frozen=True)
class Launch:
    """How the kernels of a group are launched.

    Attributes:
        tiles: one for each name in `KERNELS`.
        programs: how many programs a persistent kernel starts, and what splits aim to fill.
        precision: of float32 products: "ieee", or "tf32" where torch allows it.
        index64: addresses in int64; None decides it from the sizes.
        tma: use tensor descriptors where strides allow.
        start: called as (kernel, grid, *arguments, **options) for every launch; `aot` compiles here
            instead, and tests count.
    """

    tiles: Mapping[str, Tile]
    programs: int
    precision: str = "ieee"
    index64: bool | None = None
    tma: bool = False
    start: Callable[..., None] = start

    def tile(self, kernel: str, block_r: int) -> Tile:
        """The block sizes of a kernel that takes this many columns of S at a time."""
        return self.tiles[kernel]


_INTERPRETER = Tile(32, 32, 32, warps=1, stages=1)


def shipped(capability: tuple[int, int], itemsize: int) -> dict[str, Tile]:
    """The tiles for a CUDA device: fitted to its shared memory, not tuned yet.

    Args:
        capability: compute capability, e.g. (9, 0).
        itemsize: bytes of an element of x, 2 or 4.
    """
    if itemsize == 4:
        small = Tile(64, 64, 32, warps=4, stages=2)
        return dict.fromkeys(KERNELS, small)
    # 8.0, 9.0 and 10.0 have 163 KiB or more of shared memory for a block; the others have 99 KiB.
    large = capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    matmul = Tile(128, 128, 64, warps=8, stages=3 if large else 2)
    return {
        "shrink": Tile(64, 64, 64, warps=4, stages=3),
        "expand": matmul,
        "dy": Tile(64, 128, 64, warps=4, stages=2),
        "dx": matmul,
        "da": Tile(64, 64, 128, warps=4, stages=2),
        "score": Tile(64, 64, 64, warps=4, stages=2),
    }


def launch_for(x: torch.Tensor) -> Launch:
    """The shipped options for the device and dtype of x."""
    if x.device.type == "cpu":
        return Launch(dict.fromkeys(KERNELS, _INTERPRETER), programs=3)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return _launch(x.device.index or 0, x.element_size(), tf32 and x.dtype == torch.float32)


@lru_cache
def _launch(device: int, itemsize: int, tf32: bool) -> Launch:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Launch(
        shipped(capability, itemsize),
        programs=properties.multi_processor_count,
        precision="tf32" if tf32 else "ieee",
        tma=capability >= (9, 0) and itemsize == 2,
    )
