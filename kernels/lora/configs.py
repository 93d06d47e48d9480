"""Tile sizes and launch options: plain data, chosen on the host."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

__all__ = ["KERNELS", "Launch", "Tile", "launch_for", "odd", "shipped", "start"]

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


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on the current stream.

    Raises:
        RuntimeError: the stream is being captured and the kernel would first have to be compiled.
    """
    try:
        kernel[grid](*args, **options)
    except Exception as error:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{kernel.__name__} could not be launched inside a graph capture; run the step "
                "once before capturing it, so that its kernels are compiled"
            ) from error
        raise


@dataclass(frozen=True)
class Launch:
    """How the kernels of a group are launched.

    Attributes:
        tiles: one for each name in `KERNELS`; more for some blocks and circumstances, named as in
            :meth:`tile`.
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

    def tile(self, kernel: str, block_r: int, *, odd: bool = False, dropout: bool = False) -> Tile:
        """The block sizes of a kernel.

        Args:
            kernel: one of `KERNELS`.
            block_r: the columns of S it takes at a time.
            odd: of :func:`odd`; loads of single elements need registers.
            dropout: whether it makes masks, which need registers too.
        """
        names = [f"{kernel} {block_r}", kernel]
        if dropout:
            names = [f"{kernel} dropout", *names]
        if odd:
            names = [f"{kernel} odd", *names]
        return self.tiles[next((name for name in names if name in self.tiles), kernel)]


def odd(*matrices: torch.Tensor) -> bool:
    """Whether a row of any of these matrices, [m, k] with one stride of 1, begins or ends where the
    compiler cannot tell that 16 bytes go together: it knows of multiples of 16 elements only."""
    for matrix in matrices:
        inner = 1 if matrix.stride(1) == 1 else 0
        if matrix.data_ptr() % 16 or matrix.shape[inner] % 16 or matrix.stride(1 - inner) % 16:
            return True
    return False


_INTERPRETER = Tile(32, 32, 32, warps=1, stages=1)

# Tiles, by kernel; "kernel 128" is for that block_r, "kernel odd" and "kernel dropout" as in
# `Launch.tile`. Reasons, none of them measured yet:
# - expand and dx are matmuls, bound by tensor cores where m, n and k are long. 128x256 does 85
#   operations for each byte it loads, 128x128 does 64; eight warps hold the wider accumulator only
#   where tensor cores read both operands from shared memory (Hopper, Blackwell). One program runs
#   on a multiprocessor, so its stages may fill the shared memory.
# - shrink, dy and da read one large operand once and are bound by memory. By Little's law an H100
#   needs 3.35 TB/s * 0.8 us / 132 = 20 KiB in flight on each multiprocessor: 64 rows of 128 columns
#   are 16 KiB a stage, of which all but one or two are in flight.
# - dy writes a share of dS for every block of columns, so blocks are as wide as registers allow.
# - A mask of dropout needs as many registers as the tile it masks; loads of single elements too.
_LARGE = {  # 163 KiB of shared memory for a block
    "shrink": Tile(64, 64, 128, stages=4),
    "shrink 128": Tile(64, 64, 128, stages=3),
    "shrink dropout": Tile(64, 64, 64, stages=4),
    "shrink odd": Tile(64, 64, 32, stages=2),
    "expand": Tile(128, 128, 64, stages=4),
    "expand_tma": Tile(128, 128, 64, stages=4),
    "expand odd": Tile(64, 64, 32, stages=2),
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
    hip = torch.version.hip is not None
    return Launch(
        shipped(capability, itemsize, hip=hip),
        programs=properties.multi_processor_count,
        precision="tf32" if tf32 else "ieee",
        tma=capability >= (9, 0) and itemsize == 2 and not hip,
    )
