"""Which tile a launch of expand or dx takes, by counting waves.

Both kernels are persistent: P programs, one a multiprocessor, take every P-th tile, so a launch is
ceil(tiles / P) waves long. A tile costs, in the time of a FLOP of its multiprocessor::

    loops * latency + steps * max(FLOPs of a step, bytes it loads * FLOPs per byte)

Large tiles load least for each FLOP, smaller ones fill the last wave, or the multiprocessors at
all. Nobody has checked the count on a GPU: a tile that was measured comes before it.
"""

from collections.abc import Sequence

from ..tiles import Tile

__all__ = ["best_tile"]

# FLOPs that a multiprocessor could do until the first operands of a loop are there: 0.5 us, between
# L2 (0.2) and DRAM (0.8), at some 4096 FLOPs in a clock of 1.8 GHz. Assumed.
_LATENCY = 0.5e-6 * 1.8e9 * 4096
# What is only counted must differ by more than a few percent to matter.
_CLEARLY = 0.9
_ITEMSIZE = 2


def best_tile(
    kernel: str,
    tiles: Sequence[Tile],
    m: int,
    ns: Sequence[int],
    k: int,
    programs: int,
    flops_per_byte: float,
) -> Tile:
    """The tile with the least work in waves if it beats the first one by a tenth, else the first.

    Args:
        kernel: "expand", "expand_tma" or "dx".
        tiles: to choose from, the shipped one first; for 16-bit operands.
        m, ns, k: rows of x, outputs of each site, columns of x.
        programs: multiprocessors.
        flops_per_byte: of `tiles.flops_per_byte`.
    """

    def work(tile: Tile) -> float:
        # dx has a tile for each block of x's columns, and sums over the outputs of every site.
        columns = [k] if kernel == "dx" else ns
        sums = ns if kernel == "dx" else [k]
        count = _ceil_div(m, tile.m) * sum(_ceil_div(width, tile.n) for width in columns)
        flops = 2 * tile.m * tile.n * tile.k
        loads = (tile.m + tile.n) * tile.k * _ITEMSIZE * flops_per_byte
        steps = sum(_ceil_div(length, tile.k) for length in sums)
        return _ceil_div(count, programs) * (len(sums) * _LATENCY + steps * max(flops, loads))

    best = min(tiles, key=work)
    return best if work(best) < _CLEARLY * work(tiles[0]) else tiles[0]


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
