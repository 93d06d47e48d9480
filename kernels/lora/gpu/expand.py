"""expand: Y_i = x W_i^T + b_i + S_i B_i^T for every site of a group, in one persistent launch.

The base matmul's loop over k runs on over the site's columns of [S | B]: base, LoRA, shortcuts and
bias meet in one accumulator and leave in one store. Sites differ in n and rank; for a rank of 0 the
second loop runs no times. Where `shrink` split its sum, the parts are added up here, in a fixed
order.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .device import GROUP_M, ceil_div, find, offsets, pick, swizzle
from .launch import odd
from .tables import Pass, common_block, leading

__all__ = ["expand", "expand_kernel"]


@triton.jit(do_not_specialize=["m", "splits"])
def expand_kernel(
    x,  # [m, k], rows stride_x apart; unused without BASE
    s,  # [m, columns]; written with SPLIT
    parts,  # [splits, m, columns], which add up to s; read with SPLIT
    packed,  # B of a site: [n, width] from b_starts on
    weights,  # per site: [n, k], or [k, n] if TRANSPOSED
    biases,  # [bias_size]
    outs,  # [m, n], rows out_strides apart
    weight_strides,
    out_strides,
    ns,
    bias_sizes,  # n, or 0 without bias
    starts,  # the site's columns of S
    widths,
    b_starts,
    m,
    k,
    stride_x,
    columns,
    splits,
    BASE: tl.constexpr,  # False: outs holds the base layer's own output, to be added to
    TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    EVEN_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if s.dtype.element_ty == tl.float64 else tl.float32
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), 0
    # The tiles of all sites stand in one row; unrolled, since `ns` is a tuple of arguments.
    for i in tl.static_range(len(ns)):
        tiles_n += tl.cdiv(ns[i], BLOCK_N)
    # Persistent: a program takes every programs-th tile of that row, so that all sites share one
    # launch and its last, partly filled wave.
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        site, block_n = find(ns, block_n, BLOCK_N)
        n, width = pick(ns, site), pick(widths, site)
        row = offsets(block_m * BLOCK_M, BLOCK_M, INDEX64)  # [BLOCK_M]
        column = offsets(block_n * BLOCK_N, BLOCK_N, INDEX64)  # [BLOCK_N]
        in_rows, in_columns = row[:, None] < m, column[None, :] < n
        # Loads beyond the last row repeat it instead of being masked: the stores are, and a mask
        # costs instructions in every step.
        row_in, column_in = tl.minimum(row, m - 1), tl.minimum(column, n - 1)
        # [BLOCK_M, BLOCK_N] pointers.
        out = pick(outs, site) + row[:, None] * pick(out_strides, site) + column[None, :]
        if BASE:
            acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
            inner = tl.arange(0, BLOCK_K)
            x_rows = x + row_in[:, None] * stride_x + inner[None, :]
            weight, stride_w = pick(weights, site), pick(weight_strides, site)
            if TRANSPOSED:
                w_columns = weight + offsets(0, BLOCK_K, INDEX64)[:, None] * stride_w
                w_columns += column[None, :]
            else:
                w_columns = weight + column_in[None, :] * stride_w + inner[:, None]
            step = stride_w.to(tl.int64) if INDEX64 else stride_w
            # The base matmul, over k. The site was chosen outside, so that only loads and a product
            # are left for the compiler to pipeline.
            for first in range(0, k, BLOCK_K):
                w_tiles = w_columns + (first * step if TRANSPOSED else first)
                if EVEN_K:
                    x_tile = tl.load(x_rows + first)  # [BLOCK_M, BLOCK_K]
                else:
                    x_tile = tl.load(x_rows + first, mask=first + inner[None, :] < k, other=0.0)
                if EVEN_K and not TRANSPOSED:
                    w_tile = tl.load(w_tiles)  # [BLOCK_K, BLOCK_N]
                else:
                    in_w = in_columns & (first + inner[:, None] < k)
                    w_tile = tl.load(w_tiles, mask=in_w, other=0.0)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.load(out, mask=in_rows & in_columns, other=0.0).to(ACC)
        rank = tl.arange(0, BLOCK_R)  # [BLOCK_R]
        s_place = row_in[:, None] * columns + pick(starts, site) + rank[None, :]
        s_rows = s + s_place
        b_columns = packed + pick(b_starts, site) + column_in[None, :] * width + rank[:, None]
        # The branches, over the site's columns of S: the same product into the same accumulator. It
        # has no mask, since BLOCK_R divides every width and padding is zero.
        for first in range(0, width, BLOCK_R):
            if SPLIT:
                total = tl.zeros((BLOCK_M, BLOCK_R), parts.dtype.element_ty)
                # In the order of the parts, whichever program wrote which first.
                for part in range(splits):
                    total += tl.load(parts + part * m * columns + s_place + first)
                s_tile = total.to(s.dtype.element_ty)
                # For the backward pass, once: by the tile of the site's first columns.
                tl.store(s_rows + first, s_tile, mask=in_rows & (block_n == 0))
            else:
                s_tile = tl.load(s_rows + first)  # [BLOCK_M, BLOCK_R]
            b_tile = tl.load(b_columns + first)  # [BLOCK_R, BLOCK_N]
            acc = tl.dot(s_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            in_bias = column < pick(bias_sizes, site)
            bias = tl.load(pick(biases, site) + column, mask=in_bias, other=0.0)  # [BLOCK_N]
            acc += bias.to(ACC)[None, :]
        tl.store(out, acc.to(s.dtype.element_ty), mask=in_rows & in_columns)


def expand(group: Pass, s: Tensor, parts: Tensor | None, outs: Sequence[Tensor]) -> None:
    """Write every site's output, or add the low-rank parts to it where the call has no weights.

    Args:
        s: [m, columns]; written here if there are parts.
        parts: [splits, m, columns] of `shrink`, or None.
        outs: [m, n_i] for each site, last stride 1.
    """
    x, layout, launch = group.sources[0], group.layout, group.launch
    weights, biases = group.call.weights, group.call.biases
    m, k = x.shape
    ns = tuple(out.shape[1] for out in outs)
    block_r = common_block(columns.width for columns in layout.site)
    dense, strides, transposed = leading(weights)
    uneven = odd(*outs, *([x, *dense] if dense else []))
    few = parts is not None
    tile = launch.tile("expand", block_r, odd=uneven, few=few, m=m, ns=ns, k=k if dense else 0)
    tiles = ceil_div(m, tile.m) * sum(ceil_div(n, tile.n) for n in ns)
    if not tiles:
        return
    given = [bias for bias in biases if bias is not None]
    launch.start(
        expand_kernel,
        (min(tiles, launch.programs),),
        x,
        s,
        s if parts is None else parts,
        group.packed.buffer,
        tuple(dense) or tuple(outs),
        tuple(given[0] if bias is None else bias for bias in biases) if given else tuple(outs),
        tuple(outs),
        tuple(strides) or ns,
        tuple(out.stride(0) for out in outs),
        ns,
        tuple(0 if bias is None else bias.shape[0] for bias in biases) if given else ns,
        tuple(columns.start for columns in layout.site),
        tuple(columns.width for columns in layout.site),
        group.packed.b,
        m,
        k,
        x.stride(0),
        layout.columns,
        1 if parts is None else parts.shape[0],
        BASE=bool(weights),
        TRANSPOSED=transposed and bool(weights),
        SPLIT=few,
        BIAS=bool(given),
        PRECISION=launch.precision,
        INDEX64=group.index64,
        EVEN_K=k % tile.k == 0,
        GROUP_M=GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
