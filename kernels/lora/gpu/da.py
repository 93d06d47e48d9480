"""da: dA = dS^T u for every branch, in one pass over each source.

The sum is one over the rows. A program takes some columns of a source and some rows, for up to 128
columns of dS at a time, and writes its share in fp32; `reduce` adds the shares up in fixed order.
"""

import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, find, keep_tile, offsets, pick
from .launch import odd
from .reduce import Part
from .tables import Pass, accumulator, chunks

__all__ = ["da", "da_kernel"]


@triton.jit(do_not_specialize=["m"])
def da_kernel(
    sources,  # per source: [m, k]
    source_strides,
    ds,  # [m, columns]
    da_parts,  # per chunk: [splits, width, k] from da_starts on
    ks,  # per chunk of columns from here on
    chunk_sources,
    starts,
    widths,
    da_starts,
    branches,  # times 16, see `tables.times16`
    thresholds,  # drop probability in units of 2^-16
    seed,
    m,
    columns,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if ds.dtype.element_ty == tl.float64 else tl.float32
    chunk, block = find(ks, tl.program_id(0), BLOCK_K)
    split = tl.program_id(1)
    source, k, width = pick(chunk_sources, chunk), pick(ks, chunk), pick(widths, chunk)
    u, stride = pick(sources, source), pick(source_strides, source)
    column = offsets(block * BLOCK_K, BLOCK_K, INDEX64)  # [BLOCK_K]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    if DROPOUT:
        key, branch, threshold = tl.load(seed), pick(branches, chunk) // 16, pick(thresholds, chunk)
    acc = tl.zeros((BLOCK_R, BLOCK_K), ACC)
    # Down this program's rows of its columns of u. The mask of dropout is made again from the seed,
    # so that the forward pass stores none.
    rows_per_split = tl.cdiv(tl.cdiv(m, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    for top in range(split * rows_per_split, min((split + 1) * rows_per_split, m), BLOCK_M):
        row = offsets(top, BLOCK_M, INDEX64)
        in_rows = row[:, None] < m
        u_rows = u + row[:, None] * stride + column[None, :]
        # [BLOCK_M, BLOCK_K]
        u_tile = tl.load(u_rows, mask=in_rows & (column[None, :] < k), other=0.0)
        ds_rows = ds + row[:, None] * columns + pick(starts, chunk) + rank[None, :]
        # [BLOCK_M, BLOCK_R]
        ds_tile = tl.load(ds_rows, mask=in_rows & (rank[None, :] < width), other=0.0)
        if DROPOUT:
            keep = keep_tile(key, branch, threshold, row, block * BLOCK_K, BLOCK_M, BLOCK_K)
            u_tile = tl.where(keep, u_tile, 0.0)
        acc = tl.dot(tl.trans(ds_tile), u_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        acc *= 65536.0 / (65536.0 - threshold.to(ACC))
    target = da_parts + pick(da_starts, chunk) + (split * width + rank[:, None]).to(tl.int64) * k
    tl.store(target + column[None, :], acc, mask=(rank[:, None] < width) & (column[None, :] < k))


def da(group: Pass, ds: Tensor) -> list[Part]:
    """The pass over every source: the parts of dA.

    Args:
        ds: [m, columns].
    """
    sources, launch, table = group.sources, group.launch, chunks(group)
    m, columns = ds.shape
    first = sources[0].shape[1]
    tile = launch.tile(
        "da", table.block, odd=odd(*sources), dropout=table.dropout, m=m, ns=(first,), k=first
    )
    ks = [sources[i].shape[1] for i in table.source]
    blocks = sum(ceil_div(k, tile.k) for k in ks)
    splits = max(1, min(launch.programs * 2 // blocks, ceil_div(m, tile.m)))
    sizes = [splits * width * k for width, k in zip(table.width, ks, strict=True)]
    starts = [sum(sizes[:p]) for p in range(len(sizes))]
    parts = ds.new_empty(sum(sizes), dtype=accumulator(ds.dtype))
    launch.start(
        da_kernel,
        (blocks, splits),
        tuple(sources),
        tuple(source.stride(0) for source in sources),
        ds,
        parts,
        tuple(ks),
        table.source,
        table.start,
        table.width,
        tuple(starts),
        table.branch,
        table.threshold,
        group.call.seed,
        m,
        columns,
        DROPOUT=table.dropout,
        PRECISION=launch.precision,
        INDEX64=group.index64,
        BLOCK_M=tile.m,
        BLOCK_K=tile.k,
        BLOCK_R=table.block,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return [
        Part(start, start + width, parts[starts[p] :], k, width * k, splits)
        for p, (start, width, k) in enumerate(zip(table.start, table.width, ks, strict=True))
    ]
