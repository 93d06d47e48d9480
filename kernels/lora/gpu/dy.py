"""dy: dS = dY B and dB = dY^T S for every site, in one pass over each dY.

dS needs a sum over n and dB one over m, so no division of dY among programs finishes both. Each
program takes some columns and some rows, and writes its share of either sum in fp32; the shares are
small, and `reduce` adds them up in fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, find, offsets, pick
from .launch import odd
from .reduce import Part, Sum, reduce_splits
from .tables import Pass, accumulator, block_for

__all__ = ["dy", "dy_kernel"]


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
    column = offsets(block * BLOCK_N, BLOCK_N, INDEX64)  # [BLOCK_N]
    rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    in_columns, in_rank = column < n, rank[None, :] < width
    dy_columns, stride = pick(dys, problem) + column[None, :], pick(dy_strides, problem)
    b_rows = packed + pick(b_starts, problem) + column[:, None] * pick(b_strides, problem)
    # [BLOCK_N, BLOCK_R], the same for all rows.
    b_tile = tl.load(b_rows + rank[None, :], mask=in_columns[:, None] & in_rank, other=0.0)
    ds_share = ds_parts + pick(ds_starts, problem)
    db = tl.zeros((BLOCK_N, BLOCK_R), ACC)
    # Down this program's rows of its columns of dY. Each tile is read once for both products: its
    # share of dS is written at once, that of dB summed up across all steps.
    rows_per_split = tl.cdiv(tl.cdiv(m, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    for top in range(split * rows_per_split, min((split + 1) * rows_per_split, m), BLOCK_M):
        row = offsets(top, BLOCK_M, INDEX64)
        in_rows = row[:, None] < m
        in_tile = in_rows & in_columns[None, :]
        # [BLOCK_M, BLOCK_N]
        dy_tile = tl.load(dy_columns + row[:, None] * stride, mask=in_tile, other=0.0)
        if NEED_DS:
            # [BLOCK_M, BLOCK_R]: what this block of columns adds to dS.
            share = tl.dot(dy_tile, b_tile, input_precision=PRECISION, out_dtype=ACC)
            ds_rows = ds_share + (block.to(tl.int64) * m + row[:, None]) * width
            tl.store(ds_rows + rank[None, :], share, mask=in_rows & in_rank)
        if NEED_DB:
            s_rows = s + row[:, None] * columns + pick(starts, problem)
            # [BLOCK_M, BLOCK_R]
            s_tile = tl.load(s_rows + rank[None, :], mask=in_rows & in_rank, other=0.0)
            db = tl.dot(tl.trans(dy_tile), s_tile, db, input_precision=PRECISION, out_dtype=ACC)
    if NEED_DB:
        db_rows = db_parts + pick(db_starts, problem) + (split * n + column[:, None]) * width
        tl.store(db_rows + rank[None, :], db, mask=in_columns[:, None] & in_rank)


def dy(
    group: Pass, dys: Sequence[Tensor], s: Tensor, *, need_ds: bool, need_db: bool
) -> tuple[Tensor, list[Part]]:
    """The pass over every dY, and the sum of its shares of dS.

    Args:
        dys: [m, n_i] for each site, last stride 1.
        s: [m, columns].

    Returns:
        dS [m, columns] in the dtype of s, empty if not needed; and the parts of dB.
    """
    layout, launch = group.layout, group.launch
    m = s.shape[0]
    block_r = block_for(max(columns.width for columns in layout.site))
    widths = [grad.shape[1] for grad in dys]
    tile = launch.tile("dy", block_r, odd=odd(*dys), m=m, ns=widths, k=sum(widths))
    # One for each site, or for each 128 of its columns of S.
    problems = [
        (i, start, min(columns.stop - start, block_r))
        for i, columns in enumerate(layout.site)
        for start in range(columns.start, columns.stop, block_r)
    ]
    ns = [dys[i].shape[1] for i, _, _ in problems]
    blocks = [ceil_div(n, tile.n) for n in ns]
    splits = max(1, min(2 * launch.programs // sum(blocks), ceil_div(m, tile.m)))
    dtype = accumulator(s.dtype)
    ds_sizes = [c * m * width for c, (_, _, width) in zip(blocks, problems, strict=True)]
    db_sizes = [splits * n * width for n, (_, _, width) in zip(ns, problems, strict=True)]
    ds_starts = [sum(ds_sizes[:p]) for p in range(len(problems))]
    db_starts = [sum(db_sizes[:p]) for p in range(len(problems))]
    ds_parts = s.new_empty(sum(ds_sizes) if need_ds else 0, dtype=dtype)
    db_parts = s.new_empty(sum(db_sizes) if need_db else 0, dtype=dtype)
    launch.start(
        dy_kernel,
        (sum(blocks), splits),
        tuple(dys[i] for i, _, _ in problems),
        tuple(dys[i].stride(0) for i, _, _ in problems),
        s,
        group.packed.buffer,
        ds_parts,
        db_parts,
        tuple(ns),
        tuple(start for _, start, _ in problems),
        tuple(width for _, _, width in problems),
        tuple(group.packed.b[i] + start - layout.site[i].start for i, start, _ in problems),
        tuple(layout.site[i].width for i, _, _ in problems),
        tuple(ds_starts),
        tuple(db_starts),
        m,
        layout.columns,
        NEED_DS=need_ds,
        NEED_DB=need_db,
        PRECISION=launch.precision,
        INDEX64=group.index64,
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
