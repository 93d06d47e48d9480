"""shrink: S = u A^T for every branch of a group, in one launch.

The product is [m, k] x [k, columns] with few columns, so it costs one read of each source. Columns
computed from the same source share that read, up to 128 of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, keep_tile, offsets, pick
from .launch import odd
from .tables import Pass, accumulator, chunks

__all__ = ["shrink", "shrink_kernel"]

# Rows that a program takes where there are many.
_ROWS_EACH = 64


@triton.jit(do_not_specialize=["m"])
def shrink_kernel(
    sources,  # per source: [m, k], rows source_strides apart
    source_strides,
    ks,
    packed,  # A of a segment: [width, k] from starts_a on; flags of the columns from valid on
    s,  # [splits, m, columns]
    chunk_sources,  # per chunk of at most BLOCK_R columns of one segment
    starts,
    widths,
    starts_a,
    branches,  # times 16, see `tables.times16`
    thresholds,  # drop probability in units of 2^-16
    seed,
    valid,
    m,
    columns,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    chunk, split = tl.program_id(1), tl.program_id(2)
    source = pick(chunk_sources, chunk)
    u, k = pick(sources, source), pick(ks, source)
    width = pick(widths, chunk)
    row = offsets(tl.program_id(0) * BLOCK_M, BLOCK_M, INDEX64)  # [BLOCK_M]
    rank = offsets(0, BLOCK_R, INDEX64)  # [BLOCK_R]
    column = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    # Loads beyond the last row repeat it instead of being masked: the store is.
    u_rows = u + tl.minimum(row, m - 1)[:, None] * pick(source_strides, source)
    a_rows = packed + pick(starts_a, chunk) + rank[None, :] * k
    ACC: tl.constexpr = tl.float64 if packed.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros((BLOCK_M, BLOCK_R), ACC)
    if DROPOUT:
        key, branch, threshold = tl.load(seed), pick(branches, chunk) // 16, pick(thresholds, chunk)
    # Over this program's share of k, cut at whole blocks. Reading u is what costs, so that one read
    # serves all columns of the chunk, which may be those of several branches.
    per_split = tl.cdiv(tl.cdiv(k, BLOCK_K), tl.num_programs(2)) * BLOCK_K
    for first in range(split * per_split, min((split + 1) * per_split, k), BLOCK_K):
        inside_a = rank[None, :] < width
        if EVEN_K:
            u_tile = tl.load(u_rows + first + column[None, :])  # [BLOCK_M, BLOCK_K]
        else:
            inside_u = first + column[None, :] < k
            u_tile = tl.load(u_rows + first + column[None, :], mask=inside_u, other=0.0)
            inside_a &= first + column[:, None] < k
        # [BLOCK_K, BLOCK_R]; zero beyond the chunk's columns.
        a_tile = tl.load(a_rows + first + column[:, None], mask=inside_a, other=0.0)
        if DROPOUT:
            keep = keep_tile(key, branch, threshold, row, first, BLOCK_M, BLOCK_K)
            u_tile = tl.where(keep, u_tile, 0.0)
        acc = tl.dot(u_tile, a_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    # Once for the sum instead of for each kept element.
    if DROPOUT:
        acc *= 65536.0 / (65536.0 - threshold.to(ACC))
    start = pick(starts, chunk)
    # Padding is written as zero, not as computed: infinity times a zero of A is not a number.
    flags = tl.load(packed + valid + start + rank, mask=rank < width, other=0.0)
    acc = tl.where(flags.to(tl.float32)[None, :] > 0, acc, 0.0)
    # [BLOCK_M, BLOCK_R] of this split's part of S.
    target = s + (split * m + row[:, None]) * columns + start + rank[None, :]
    tl.store(target, acc.to(s.dtype.element_ty), mask=(row[:, None] < m) & (rank[None, :] < width))


def shrink(group: Pass) -> tuple[Tensor, Tensor | None]:
    """S [m, columns] in the dtype of x, and None; or room for it, and the parts it is the sum of.

    Few rows leave most programs idle, so that several share a sum over k. `expand` adds up.

    Returns:
        S, and its parts [splits, m, columns] in float32 (float64 for float64) if the sum was split.
    """
    sources, layout, launch = group.sources, group.layout, group.launch
    m, x = sources[0].shape[0], sources[0]
    ks = [source.shape[1] for source in sources]
    s = torch.empty(m, layout.columns, dtype=x.dtype, device=x.device)
    if not layout.columns or not m:
        return s, None
    table = chunks(group)
    tile = launch.tile(
        "shrink",
        table.block,
        odd=odd(*sources),
        dropout=table.dropout,
        few=2 * ceil_div(m, _ROWS_EACH) * len(table.start) <= launch.programs,
        m=m,
        ns=ks[:1],
        k=ks[0],
    )
    row_blocks = ceil_div(m, tile.m)
    # Fewer than three parts, or than four steps in one, cost more to add up than they save.
    steps = min(ceil_div(k, tile.k) for k in ks)
    splits = min(launch.programs // (row_blocks * len(table.start)), steps // 4)
    splits = 1 if splits < 3 else splits
    parts = None
    if splits > 1:
        dtype = accumulator(x.dtype)
        parts = torch.empty(splits, m, layout.columns, dtype=dtype, device=x.device)
    launch.start(
        shrink_kernel,
        (row_blocks, len(table.start), splits),
        tuple(sources),
        tuple(source.stride(0) for source in sources),
        tuple(ks),
        group.packed.buffer,
        s if parts is None else parts,
        table.source,
        table.start,
        table.width,
        table.a,
        table.branch,
        table.threshold,
        group.call.seed,
        group.packed.valid,
        m,
        layout.columns,
        DROPOUT=table.dropout,
        PRECISION=launch.precision,
        INDEX64=group.index64,
        EVEN_K=all(k % tile.k == 0 for k in ks),
        BLOCK_M=tile.m,
        BLOCK_R=table.block,
        BLOCK_K=tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return s, parts
