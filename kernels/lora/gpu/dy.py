"""backward: the low-rank gradients, one pass over each dY and one over each source.

dS = dY B needs a sum over n and dB = dY^T S one over m, so no division of dY among programs
finishes both. Each program takes some columns and some rows, and writes its share of either sum in
fp32; the shares are small, and `reduce` adds them up in fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buckets import BUCKETS, BucketLayout, ceil_div
from .device import find, keep_tile, offsets, pick
from .launch import Launch, odd
from .pack import Packed
from .reduce import Sum, reduce_splits
from .tables import ColumnTable

__all__ = ["Part", "da_kernel", "dy_kernel", "grads_of_a", "grads_of_s_and_b"]


@triton.jit(do_not_specialize=["m"])
def dy_kernel(
    dys,  # per problem (a site, or 128 of its columns of S): [m, n]
    dy_strides,
    s,  # [m, columns]
    packed,  # B: [n, b_strides] from b_starts on
    ds_parts,  # [blocks of n, m, width] from ds_starts on
    db_parts,  # [splits, n, width] from db_starts on
    ns,
    starts,  # columns of S
    widths,
    b_starts,
    b_strides,
    ds_starts,
    db_starts,
    m,
    columns,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if s.dtype.element_ty == tl.float64 else tl.float32
    problem, block = find(ns, tl.program_id(0), BLOCK_N)
    split = tl.program_id(1)
    n, width = pick(ns, problem), pick(widths, problem)
    column, rank = offsets(block * BLOCK_N, BLOCK_N, INDEX64), tl.arange(0, BLOCK_R)
    in_columns, in_rank = column < n, rank[None, :] < width
    dy_columns, stride = pick(dys, problem) + column[None, :], pick(dy_strides, problem)
    b_rows = packed + pick(b_starts, problem) + column[:, None] * pick(b_strides, problem)
    b_tile = tl.load(b_rows + rank[None, :], mask=in_columns[:, None] & in_rank, other=0.0)
    ds_share = ds_parts + pick(ds_starts, problem)
    db = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    rows_per_split = tl.cdiv(tl.cdiv(m, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    for top in range(split * rows_per_split, min((split + 1) * rows_per_split, m), BLOCK_M):
        row = offsets(top, BLOCK_M, INDEX64)
        in_rows = row[:, None] < m
        in_tile = in_rows & in_columns[None, :]
        dy_tile = tl.load(dy_columns + row[:, None] * stride, mask=in_tile, other=0.0)
        if NEED_DS:
            share = tl.dot(dy_tile, b_tile, input_precision=PRECISION, out_dtype=ACC)
            ds_rows = ds_share + (block.to(tl.int64) * m + row[:, None]) * width
            tl.store(ds_rows + rank[None, :], share, mask=in_rows & in_rank)
        if NEED_DB:
            s_rows = s + row[:, None] * columns + pick(starts, problem)
            s_tile = tl.load(s_rows + rank[None, :], mask=in_rows & in_rank, other=0.0)
            db = tl.dot(tl.trans(dy_tile), s_tile, db, input_precision=PRECISION, out_dtype=ACC)
    if NEED_DB:
        db_rows = db_parts + pick(db_starts, problem) + (split * n + column[:, None]) * width
        tl.store(db_rows + rank[None, :], db, mask=in_columns[:, None] & in_rank)


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
    branches,  # times 16, see `tables.alike`
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
    column = offsets(block * BLOCK_K, BLOCK_K, INDEX64)
    rank = tl.arange(0, BLOCK_R)
    if DROPOUT:
        key, branch, threshold = tl.load(seed), pick(branches, chunk) // 16, pick(thresholds, chunk)
    acc = tl.zeros((BLOCK_R, BLOCK_K), ACC)
    rows_per_split = tl.cdiv(tl.cdiv(m, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    for top in range(split * rows_per_split, min((split + 1) * rows_per_split, m), BLOCK_M):
        row = offsets(top, BLOCK_M, INDEX64)
        in_rows = row[:, None] < m
        u_rows = u + row[:, None] * stride + column[None, :]
        u_tile = tl.load(u_rows, mask=in_rows & (column[None, :] < k), other=0.0)
        ds_rows = ds + row[:, None] * columns + pick(starts, chunk) + rank[None, :]
        ds_tile = tl.load(ds_rows, mask=in_rows & (rank[None, :] < width), other=0.0)
        if DROPOUT:
            keep = keep_tile(key, branch, threshold, row, block * BLOCK_K, BLOCK_M, BLOCK_K)
            u_tile = tl.where(keep, u_tile, 0.0)
        acc = tl.dot(tl.trans(ds_tile), u_tile, acc, input_precision=PRECISION, out_dtype=ACC)
    if DROPOUT:
        acc *= 65536.0 / (65536.0 - threshold.to(ACC))
    target = da_parts + pick(da_starts, chunk) + (split * width + rank[:, None]).to(tl.int64) * k
    tl.store(target + column[None, :], acc, mask=(rank[:, None] < width) & (column[None, :] < k))


class Part(NamedTuple):
    """Parts of a gradient that belong to some columns of S.

    Attributes:
        start, stop: the columns.
        parts: flat, fp32, from the first part on: dB as [n, width], dA as [width, k].
        part_stride: elements between a part's rows.
        split_stride: elements between parts.
        splits: how many parts.
    """

    start: int
    stop: int
    parts: Tensor
    part_stride: int
    split_stride: int
    splits: int


def grads_of_s_and_b(
    dys: Sequence[Tensor],
    s: Tensor,
    packed: Packed,
    layout: BucketLayout,
    launch: Launch,
    *,
    need_ds: bool,
    need_db: bool,
    index64: bool,
) -> tuple[Tensor, list[Part]]:
    """The pass over every dY, and the sum of its shares of dS.

    Args:
        dys: [m, n_i] for each site, last stride 1.
        s: [m, layout.columns].

    Returns:
        dS [m, layout.columns] in the dtype of s, empty if not needed; and the parts of dB.
    """
    m = s.shape[0]
    widest = max(columns.width for columns in layout.site)
    block_r = next((size for size in BUCKETS if size >= widest), BUCKETS[-1])
    widths = [dy.shape[1] for dy in dys]
    tile = launch.tile("dy", block_r, odd=odd(*dys), m=m, ns=widths, k=sum(widths))
    problems = [
        (i, start, min(columns.stop - start, block_r))
        for i, columns in enumerate(layout.site)
        for start in range(columns.start, columns.stop, block_r)
    ]
    ns = [dys[i].shape[1] for i, _, _ in problems]
    blocks = [ceil_div(n, tile.n) for n in ns]
    splits = max(1, min(2 * launch.programs // sum(blocks), ceil_div(m, tile.m)))
    wide = torch.float64 if s.dtype == torch.float64 else torch.float32
    ds_sizes = [c * m * width for c, (_, _, width) in zip(blocks, problems, strict=True)]
    db_sizes = [splits * n * width for n, (_, _, width) in zip(ns, problems, strict=True)]
    ds_starts = [sum(ds_sizes[:p]) for p in range(len(problems))]
    db_starts = [sum(db_sizes[:p]) for p in range(len(problems))]
    ds_parts = s.new_empty(sum(ds_sizes) if need_ds else 0, dtype=wide)
    db_parts = s.new_empty(sum(db_sizes) if need_db else 0, dtype=wide)
    launch.start(
        dy_kernel,
        (sum(blocks), splits),
        tuple(dys[i] for i, _, _ in problems),
        tuple(dys[i].stride(0) for i, _, _ in problems),
        s,
        packed.buffer,
        ds_parts,
        db_parts,
        tuple(ns),
        tuple(start for _, start, _ in problems),
        tuple(width for _, _, width in problems),
        tuple(packed.b[i] + start - layout.site[i].start for i, start, _ in problems),
        tuple(layout.site[i].width for i, _, _ in problems),
        tuple(ds_starts),
        tuple(db_starts),
        m,
        layout.columns,
        NEED_DS=need_ds,
        NEED_DB=need_db,
        PRECISION=launch.precision,
        INDEX64=index64,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    ds = torch.empty_like(s) if need_ds else s.new_empty(0)
    if need_ds:
        reduce_splits(
            [
                Sum(
                    ds[:, start : start + width],
                    ds_parts[ds_starts[p] :],
                    width,
                    m * width,
                    blocks[p],
                )
                for p, (_, start, width) in enumerate(problems)
            ],
            launch,
        )
    sums = [
        Part(start, start + width, db_parts[db_starts[p] :], width, ns[p] * width, splits)
        for p, (_, start, width) in enumerate(problems)
        if need_db
    ]
    return ds, sums


def grads_of_a(
    sources: Sequence[Tensor],
    ds: Tensor,
    table: ColumnTable,
    seed: Tensor | None,
    launch: Launch,
    *,
    index64: bool,
) -> list[Part]:
    """The pass over every source: parts of dA = dS^T u.

    Args:
        sources: [m, k_i] each, last stride 1.
        ds: [m, columns].
        table: of `tables.chunks`.

    Returns:
        The parts of dA.
    """
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
    wide = torch.float64 if ds.dtype == torch.float64 else torch.float32
    parts = ds.new_empty(sum(sizes), dtype=wide)
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
        seed,
        m,
        columns,
        DROPOUT=table.dropout,
        PRECISION=launch.precision,
        INDEX64=index64,
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
