"""How the kernels are launched: options, and the choice of a tile."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from ..tiles import KERNELS, Tile, alternatives, flops_per_byte, shipped
from ..tuned.measured import MeasuredTile, shipped_for
from .waves import best_tile

__all__ = ["KERNELS", "Launch", "Tile", "launch_for", "odd", "shipped", "start"]


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
        measured: tiles that were timed on this device with elements of this size.
        alternatives: by kernel, the tiles among which the shapes choose where none was measured.
        flops_per_byte: of :func:`..tiles.flops_per_byte`; None makes no choice.
    """

    tiles: Mapping[str, Tile]
    programs: int
    precision: str = "ieee"
    index64: bool | None = None
    tma: bool = False
    start: Callable[..., None] = start
    measured: tuple[MeasuredTile, ...] = ()
    alternatives: Mapping[str, tuple[Tile, ...]] = field(default_factory=dict)
    flops_per_byte: float | None = None
    # What `tile` chose; not copied by `dataclasses.replace`.
    _chosen: dict[tuple[Any, ...], Tile] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def tile(
        self,
        kernel: str,
        block_r: int,
        *,
        odd: bool = False,
        dropout: bool = False,
        few: bool = False,
        m: int | None = None,
        ns: Sequence[int] = (),
        k: int | None = None,
    ) -> Tile:
        """The block sizes of a kernel.

        For shapes that are given, and none of `odd`, `dropout` and `few`: of the tiles measured
        with each of m, n and k within a factor of two, that of the nearest shapes; else the
        alternative with the least waves of work; else, as without shapes, the shipped one. The
        choice depends on shapes alone, with m rounded up to a power of two: a batch of another
        length compiles nothing, and a recomputed pass repeats the first one to the bit.

        Args:
            kernel: one of `KERNELS`.
            block_r: the columns of S it takes at a time.
            odd: of :func:`odd`; loads of single elements need registers.
            dropout: whether it makes masks, which need registers too.
            few: whether there are so few rows that sums are split.
            m, k: of x. None or 0 for k where the kernel has no base matmul.
            ns: n of each site.
        """
        if not (m and k and sum(ns)) or odd or dropout or few:
            return self._shipped(kernel, block_r, odd=odd, dropout=dropout, few=few)
        key = (kernel, block_r, (m - 1).bit_length(), tuple(ns), k)
        if key not in self._chosen:
            self._chosen[key] = self._choose(kernel, block_r, _power_of_two(m), tuple(ns), k)
        return self._chosen[key]

    def _shipped(
        self,
        kernel: str,
        block_r: int,
        *,
        odd: bool = False,
        dropout: bool = False,
        few: bool = False,
    ) -> Tile:
        names = [f"{kernel} {block_r}", kernel]
        if few:
            names = [f"{kernel} few", *names]
        if dropout:
            names = [f"{kernel} dropout", *names]
        if odd:
            names = [*([f"{kernel} odd few"] if few else []), f"{kernel} odd", *names]
        return self.tiles[next((name for name in names if name in self.tiles), kernel)]

    def _choose(self, kernel: str, block_r: int, m: int, ns: tuple[int, ...], k: int) -> Tile:
        def far(entry: MeasuredTile) -> list[float]:
            known = (max(entry.m, 1), max(entry.n, 1), max(entry.k, 1))
            return [abs(math.log2(a / b)) for a, b in zip(known, (m, sum(ns), k), strict=True)]

        near = [
            entry
            for entry in self.measured
            if (entry.kernel, entry.block_r) == (kernel, block_r) and max(far(entry)) <= 1
        ]
        if near:
            return min(near, key=lambda entry: sum(far(entry))).tile
        tiles = self.alternatives.get(kernel, ())
        if tiles and self.flops_per_byte is not None:
            return best_tile(kernel, tiles, m, ns, k, self.programs, self.flops_per_byte)
        return self._shipped(kernel, block_r)


def _power_of_two(m: int) -> int:
    return 1 << (m - 1).bit_length()


def odd(*matrices: torch.Tensor) -> bool:
    """Whether a row of any of these matrices, [m, k] with one stride of 1, begins or ends where the
    compiler cannot tell that 16 bytes go together: it knows of multiples of 16 elements only."""
    for matrix in matrices:
        inner = 1 if matrix.stride(1) == 1 else 0
        if matrix.data_ptr() % 16 or matrix.shape[inner] % 16 or matrix.stride(1 - inner) % 16:
            return True
    return False


_INTERPRETER = Tile(32, 32, 32, warps=1, stages=1)


def launch_for(x: torch.Tensor) -> Launch:
    """The options for the device and dtype of x: what was measured on it and shipped, else what
    ships for its kind."""
    if x.device.type == "cpu":
        return Launch(dict.fromkeys(KERNELS, _INTERPRETER), programs=3)
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return _launch(x.device.index or 0, x.element_size(), tf32 and x.dtype == torch.float32)


@lru_cache
def _launch(device: int, itemsize: int, tf32: bool) -> Launch:
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    hip = torch.version.hip is not None
    tuned = shipped_for(properties.name)
    return Launch(
        shipped(capability, itemsize, hip=hip),
        programs=properties.multi_processor_count,
        precision="tf32" if tf32 else "ieee",
        tma=capability >= (9, 0) and itemsize == 2 and not hip,
        measured=tuple(
            entry for entry in (tuned.tiles if tuned else ()) if entry.itemsize == itemsize
        ),
        alternatives=alternatives(capability, itemsize, hip=hip),
        flops_per_byte=None if hip else flops_per_byte(capability),
    )
