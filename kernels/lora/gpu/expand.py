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

from ..buckets import BucketLayout, ceil_div
from .device import find, offsets, pick, swizzle
from .launch import Launch, odd
from .pack import Packed
from .tables import common_block

__all__ = ["expand", "expand_kernel", "leading"]

_GROUP_M = 8


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
    for i in tl.static_range(len(ns)):
        tiles_n += tl.cdiv(ns[i], BLOCK_N)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        site, block_n = find(ns, block_n, BLOCK_N)
        n, width = pick(ns, site), pick(widths, site)
        row = offsets(block_m * BLOCK_M, BLOCK_M, INDEX64)
        column = offsets(block_n * BLOCK_N, BLOCK_N, INDEX64)
        in_rows, in_columns = row[:, None] < m, column[None, :] < n
        # Loads beyond the last row repeat it instead of being masked: the stores are, and a mask
        # costs instructions in every step.
        row_in, column_in = tl.minimum(row, m - 1), tl.minimum(column, n - 1)
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
            for first in range(0, k, BLOCK_K):
                w_tiles = w_columns + (first * step if TRANSPOSED else first)
                if EVEN_K:
                    x_tile = tl.load(x_rows + first)
                else:
                    x_tile = tl.load(x_rows + first, mask=first + inner[None, :] < k, other=0.0)
                if EVEN_K and not TRANSPOSED:
                    w_tile = tl.load(w_tiles)
                else:
                    in_w = in_columns & (first + inner[:, None] < k)
                    w_tile = tl.load(w_tiles, mask=in_w, other=0.0)
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        else:
            acc = tl.load(out, mask=in_rows & in_columns, other=0.0).to(ACC)
        rank = tl.arange(0, BLOCK_R)
        s_place = row_in[:, None] * columns + pick(starts, site) + rank[None, :]
        s_rows = s + s_place
        b_columns = packed + pick(b_starts, site) + column_in[None, :] * width + rank[:, None]
        for first in range(0, width, BLOCK_R):
            if SPLIT:
                total = tl.zeros((BLOCK_M, BLOCK_R), parts.dtype.element_ty)
                for part in range(splits):
                    total += tl.load(parts + part * m * columns + s_place + first)
                s_tile = total.to(s.dtype.element_ty)
                # For the backward pass, once: by the tile of the site's first columns.
                tl.store(s_rows + first, s_tile, mask=in_rows & (block_n == 0))
            else:
                s_tile = tl.load(s_rows + first)
            b_tile = tl.load(b_columns + first)
            acc = tl.dot(s_tile, b_tile, acc, input_precision=PRECISION, out_dtype=ACC)
        if BIAS:
            in_bias = column < pick(bias_sizes, site)
            bias = tl.load(pick(biases, site) + column, mask=in_bias, other=0.0)
            acc += bias.to(ACC)[None, :]
        tl.store(out, acc.to(s.dtype.element_ty), mask=in_rows & in_columns)


def leading(weights: Sequence[Tensor]) -> tuple[list[Tensor], list[int], bool]:
    """The weights with one dimension contiguous, their other strides, and whether it is n.

    All of a group must agree; weights that do not are copied.
    """
    if all(weight.stride(1) == 1 for weight in weights):
        return list(weights), [weight.stride(0) for weight in weights], False
    if all(weight.stride(0) == 1 for weight in weights):
        return list(weights), [weight.stride(1) for weight in weights], True
    weights = [weight.contiguous() for weight in weights]
    return weights, [weight.stride(0) for weight in weights], False


def expand(
    x: Tensor,
    s: Tensor,
    parts: Tensor | None,
    packed: Packed,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    outs: Sequence[Tensor],
    layout: BucketLayout,
    launch: Launch,
    *,
    index64: bool,
) -> None:
    """Write every site's output.

    Args:
        x: [m, k], last stride 1.
        s: [m, layout.columns]; written here if there are parts.
        parts: [splits, m, layout.columns] of `shrink`, or None.
        weights: [n_i, k] of the sites; empty to add the low-rank parts to what `outs` holds.
        biases: [n_i] or None; empty like weights.
        outs: [m, n_i], last stride 1.
    """
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
        packed.buffer,
        tuple(dense) or tuple(outs),
        tuple(given[0] if bias is None else bias for bias in biases) if given else tuple(outs),
        tuple(outs),
        tuple(strides) or ns,
        tuple(out.stride(0) for out in outs),
        ns,
        tuple(0 if bias is None else bias.shape[0] for bias in biases) if given else ns,
        tuple(columns.start for columns in layout.site),
        tuple(columns.width for columns in layout.site),
        packed.b,
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
        INDEX64=index64,
        EVEN_K=k % tile.k == 0,
        GROUP_M=_GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
