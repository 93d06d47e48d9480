"""dx: the input gradients of a group, in one persistent launch.

dX = [dY_1 ... dY_q | dS] [W_1; ...; W_q; A] is one matmul whose sum runs over the columns of every
dY and then over those of S, so siblings' gradients are never added up in memory. The gradients of
other sources (shortcuts), dU = dS A, are further problems of the same launch.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .device import GROUP_M, ceil_div, find, keep_tile, offsets, pick, swizzle
from .launch import odd
from .tables import Pass, leading, segments

__all__ = ["dx", "dx_kernel"]


@triton.jit(do_not_specialize=["m"])
def dx_kernel(
    dys,  # per site: [m, n]
    weights,  # [n, k], or [k, n] if TRANSPOSED
    dy_strides,
    weight_strides,
    ns,
    outs,  # per problem (a source): [m, k], contiguous; the first is that of x if SITES
    ks,
    out_sources,
    ds,  # [m, columns]
    packed,  # A of a segment: [width, k] from starts_a on
    segment_sources,  # per segment of columns of S
    starts,
    widths,
    starts_a,
    branches,  # times 16, see `tables.times16`
    thresholds,  # drop probability in units of 2^-16
    seed,
    m,
    columns,
    SITES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    EVEN_N: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if packed.dtype.element_ty == tl.float64 else tl.float32
    tiles_m, tiles_k = tl.cdiv(m, BLOCK_M), 0
    # The tiles of all sources stand in one row; unrolled, since `ks` is a tuple of arguments.
    for i in tl.static_range(len(ks)):
        tiles_k += tl.cdiv(ks[i], BLOCK_K)
    # Persistent: a program takes every programs-th tile of that row, as in `expand`.
    for tile in range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0)):
        block_m, block_k = swizzle(tile, tiles_m, tiles_k, GROUP_M)
        problem, block_k = find(ks, block_k, BLOCK_K)
        k, source = pick(ks, problem), pick(out_sources, problem)
        row = offsets(block_m * BLOCK_M, BLOCK_M, INDEX64)  # [BLOCK_M]
        column = offsets(block_k * BLOCK_K, BLOCK_K, INDEX64)  # [BLOCK_K]
        in_rows, in_columns = row[:, None] < m, column[None, :] < k
        # Loads beyond the last row repeat it instead of being masked: the stores are.
        row_in = tl.minimum(row, m - 1)
        acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
        inner = offsets(0, BLOCK_N, INDEX64)  # [BLOCK_N]
        # The base part of dX: all sites' sums over n, one after the other, into one accumulator.
        # Other sources reach no base layer: for them the loop runs no times.
        for site in range(tl.where(problem == 0, SITES, 0)):
            n, stride_w = pick(ns, site), pick(weight_strides, site)
            dy_rows = pick(dys, site) + row_in[:, None] * pick(dy_strides, site) + inner[None, :]
            weight = pick(weights, site)
            if TRANSPOSED:
                w_tiles = weight + column[None, :] * stride_w + inner[:, None]
            else:
                w_tiles = weight + inner[:, None] * stride_w + column[None, :]
            step = stride_w.to(tl.int64) if INDEX64 else stride_w
            # Over the columns of this site's dY, which are the rows of its weight.
            for first in range(0, n, BLOCK_N):
                in_w = in_columns
                if EVEN_N:
                    dy_tile = tl.load(dy_rows + first)  # [BLOCK_M, BLOCK_N]
                else:
                    dy_tile = tl.load(dy_rows + first, mask=first + inner[None, :] < n, other=0.0)
                    in_w = in_columns & (first + inner[:, None] < n)
                along = first if TRANSPOSED else first * step
                w_tile = tl.load(w_tiles + along, mask=in_w, other=0.0)  # [BLOCK_N, BLOCK_K]
                acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
        # The low-rank part. Which segments are this source's is known at run time only: the others
        # count as of width 0.
        for segment in range(SEGMENTS):
            width = tl.where(pick(segment_sources, segment) == source, pick(widths, segment), 0)
            ds_rows = ds + row_in[:, None] * columns + pick(starts, segment) + rank[None, :]
            a_rows = packed + pick(starts_a, segment) + rank[:, None] * k + column[None, :]
            # Each dropped-out branch has a mask of its own over the elements of dU, so that its
            # part is summed up apart.
            part = tl.zeros((BLOCK_M, BLOCK_K), ACC) if DROPOUT else acc
            # No mask: BLOCK_R divides every width, and padding is zero.
            for first in range(0, width, BLOCK_R):
                ds_tile = tl.load(ds_rows + first)  # [BLOCK_M, BLOCK_R]
                # [BLOCK_R, BLOCK_K]
                a_tile = tl.load(a_rows + first * k, mask=in_columns, other=0.0)
                part = tl.dot(ds_tile, a_tile, part, input_precision=PRECISION, out_dtype=ACC)
            if DROPOUT:
                threshold = pick(thresholds, segment)
                keep = keep_tile(
                    tl.load(seed), pick(branches, segment) // 16, threshold, row,
                    block_k * BLOCK_K, BLOCK_M, BLOCK_K,
                )  # fmt: skip
                acc += tl.where(keep, part * (65536.0 / (65536.0 - threshold.to(ACC))), 0.0)
            else:
                acc = part
        out = pick(outs, problem) + row[:, None] * k + column[None, :]
        tl.store(out, acc.to(ds.dtype.element_ty), mask=in_rows & in_columns)


def dx(
    group: Pass,
    dys: Sequence[Tensor],
    ds: Tensor,
    outs: Sequence[Tensor],
    out_sources: Sequence[int],
) -> None:
    """Write the gradients of some sources.

    Args:
        dys: [m, n_i] for each site, last stride 1.
        ds: [m, columns]; only its shape counts where no branch reads any of the sources.
        outs: [m, k_source], contiguous, in ascending order of source.
        out_sources: index of the source of each.
    """
    m, launch, weights = ds.shape[0], group.launch, group.call.weights
    reads = {segment.source for segment in group.layout.segments}
    table = segments(group) if reads.intersection(out_sources) else None
    block_r = table.block if table else 16
    base = bool(weights) and out_sources[0] == 0
    dense, strides, transposed = leading(weights)
    tile = launch.tile(
        "dx",
        block_r,
        odd=odd(*outs, *([*dys, *dense] if base else [])),
        dropout=table is not None and table.dropout,
        m=m,
        ns=[dy.shape[1] for dy in dys],
        k=outs[0].shape[1] if base else 0,
    )
    ks = tuple(out.shape[1] for out in outs)
    tiles = ceil_div(m, tile.m) * sum(ceil_div(k, tile.n) for k in ks)
    if not tiles:
        return
    launch.start(
        dx_kernel,
        (min(tiles, launch.programs),),
        tuple(dys),
        tuple(dense) if base else tuple(dys),
        tuple(dy.stride(0) for dy in dys),
        tuple(strides) if base else tuple(dy.stride(0) for dy in dys),
        tuple(dy.shape[1] for dy in dys),
        tuple(outs),
        ks,
        tuple(out_sources),
        ds,
        group.packed.buffer,
        table.source if table else (0,),
        table.start if table else (0,),
        table.width if table else (0,),
        table.a if table else (0,),
        table.branch if table else (0,),
        table.threshold if table else (0.0,),
        group.call.seed,
        m,
        ds.shape[1],
        SITES=len(dys) if base else 0,
        TRANSPOSED=transposed and base,
        SEGMENTS=len(table.source) if table else 0,
        DROPOUT=table is not None and table.dropout,
        PRECISION=launch.precision,
        INDEX64=group.index64,
        EVEN_N=all(dy.shape[1] % tile.k == 0 for dy in dys),
        GROUP_M=GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_K=tile.n,
        BLOCK_N=tile.k,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
