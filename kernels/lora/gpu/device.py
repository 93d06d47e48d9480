"""What kernels share: a row of a problem table, the order of tiles, the dropout mask of a tile.

A problem table is a tuple of kernel arguments, one entry per site, source or branch. It needs no
memory on the device: nothing is copied before a launch, and a captured graph holds it by value.
"""

import triton
import triton.language as tl

__all__ = ["GROUP_M", "ceil_div", "find", "keep_tile", "offsets", "pick", "swizzle"]

# Rows of tiles in a strip of :func:`swizzle`.
GROUP_M = 8


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, on the host, where `triton.cdiv` takes 3 us for it."""
    return -(-a // b)


@triton.jit
def pick(items, index):
    """items[index] for an index known at run time only.

    What all items share (alignment, above all) the compiler still knows of the result.
    """
    chosen = items[0]
    # Unrolled into selects: a tuple of arguments has no address that could be indexed.
    for i in tl.static_range(1, len(items)):
        chosen = tl.where(index == i, items[i], chosen)
    return chosen


@triton.jit
def find(sizes, tile, BLOCK: tl.constexpr):
    """The problem that a tile belongs to, and which of its tiles it is.

    Problems of the given sizes are cut into blocks and counted one after the other.
    """
    problem, before, passed = 0, 0, 0
    # Ends at the last problem that begins at or before the tile; unrolled as in `pick`.
    for i in tl.static_range(1, len(sizes)):
        passed += tl.cdiv(sizes[i - 1], BLOCK)
        problem = tl.where(tile >= passed, i, problem)
        before = tl.where(tile >= passed, passed, before)
    return problem, tile - before


@triton.jit
def swizzle(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down a strip of GROUP_M rows first, so that programs that run at
    the same time share operands in the L2 cache."""
    strip = tile // (GROUP_M * tiles_n)
    rows = min(tiles_m - strip * GROUP_M, GROUP_M)
    inside = tile % (GROUP_M * tiles_n)
    return strip * GROUP_M + inside % rows, inside // rows


@triton.jit
def offsets(start, SIZE: tl.constexpr, INDEX64: tl.constexpr):
    """start .. start + SIZE - 1, in int64 if products of it with a stride can pass 2^31."""
    index = start + tl.arange(0, SIZE)
    return index.to(tl.int64) if INDEX64 else index


@triton.jit
def keep_tile(seed, branch, threshold, row, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements of a [ROWS, COLUMNS] tile of a dropped-out source are kept.

    `spec.dropout_mask` is its meaning: one Philox call decides eight neighbouring columns.

    Args:
        row: [ROWS], row indices.
        first: first column, a multiple of 8.
        threshold: the drop probability in units of 2^-16.
    """
    block = first // 8 + tl.arange(0, COLUMNS // 8)  # [COLUMNS / 8]
    row32 = row.to(tl.uint32)[:, None] + tl.zeros((1, COLUMNS // 8), tl.uint32)
    block32 = block.to(tl.uint32)[None, :] + tl.zeros((ROWS, 1), tl.uint32)
    zero = tl.zeros_like(row32)
    # Each word is [ROWS, COLUMNS / 8].
    w0, w1, w2, w3 = tl.philox(seed, row32, block32, zero + branch.to(tl.uint32), zero, n_rounds=7)
    # join appends the fastest dimension: the words' high bit, their low bit, the half.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, COLUMNS / 8, 2, 2]
    halves = tl.join(words & 0xFFFF, words >> 16)  # [ROWS, COLUMNS / 8, 2, 2, 2]
    return tl.reshape(halves, (ROWS, COLUMNS)).to(tl.float32) >= threshold
