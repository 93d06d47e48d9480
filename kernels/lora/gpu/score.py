"""score: statistics of the gradients of A and B, taken where their sums end, so that no gradient
is ever written.

A program sums some columns of one branch's gradient over all rows, and writes what these columns
add to the branch's Gram matrix and to the sum of |factor * gradient|; `reduce` adds that up.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip

from ..group import BUCKETS
from .device import ceil_div, find, keep_tile, offsets, pick
from .launch import odd
from .pack import one_dtype
from .reduce import Sum, reduce_splits
from .tables import Pass, accumulator, block_for, thresholds, times16

__all__ = ["LARGEST_RANK", "score", "score_kernel"]

LARGEST_RANK = BUCKETS[-1]


@triton.jit(do_not_specialize=["m"])
def score_kernel(
    wides,  # per problem (a branch): the wide matrix, [m, size]: dY for dB, the source for dA
    wide_strides,
    sizes,
    narrow,  # the narrow matrix, [m, columns]: S for dB, dS for dA
    starts,  # the branch's columns of it
    widths,  # the rank, padded; the columns beyond the rank are zero
    ranks,  # times 16, see `tables.times16`
    factors,  # B [size, rank], or A [rank, size]
    previous,  # sums of earlier gradients, like the factors; unused without PREVIOUS
    scales,
    branches,  # times 16
    thresholds,  # drop probability in units of 2^-16, for dA
    seed,
    parts,  # per block of columns: the Gram matrix [BLOCK_R, BLOCK_R], the sum, 15 unused
    m,
    columns,
    BY_RANK: tl.constexpr,  # factors are [rank, size]
    PREVIOUS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    WIDE: tl.constexpr = narrow.dtype.element_ty == tl.float64
    ACC: tl.constexpr = tl.float64 if WIDE else tl.float32
    problem, block = find(sizes, tl.program_id(0), BLOCK_N)
    rank, size = pick(ranks, problem) // 16, pick(sizes, problem)
    width = pick(widths, problem)
    wide, stride = pick(wides, problem), pick(wide_strides, problem)
    column = offsets(block * BLOCK_N, BLOCK_N, INDEX64)  # [BLOCK_N]
    lane = tl.arange(0, BLOCK_R)  # [BLOCK_R]
    inside = (lane[:, None] < rank) & (column[None, :] < size)
    if DROPOUT:
        key, branch, threshold = (
            tl.load(seed),
            pick(branches, problem) // 16,
            pick(thresholds, problem),
        )
    acc = tl.zeros((BLOCK_R, BLOCK_N), ACC)
    # Over all rows: |factor * gradient| needs the finished sum, so no other program may hold a part
    # of it, and the columns alone are divided.
    for top in range(0, m, BLOCK_M):
        row = offsets(top, BLOCK_M, INDEX64)
        in_rows = row[:, None] < m
        wide_rows = wide + row[:, None] * stride + column[None, :]
        # [BLOCK_M, BLOCK_N]
        wide_tile = tl.load(wide_rows, mask=in_rows & (column[None, :] < size), other=0.0)
        narrow_rows = narrow + row[:, None] * columns + pick(starts, problem) + lane[None, :]
        # [BLOCK_M, BLOCK_R]
        narrow_tile = tl.load(narrow_rows, mask=in_rows & (lane[None, :] < width), other=0.0)
        if DROPOUT:
            keep = keep_tile(key, branch, threshold, row, block * BLOCK_N, BLOCK_M, BLOCK_N)
            wide_tile = tl.where(keep, wide_tile, 0.0)
        acc = tl.dot(
            tl.trans(narrow_tile), wide_tile, acc, input_precision=PRECISION, out_dtype=ACC
        )
    acc *= pick(scales, problem)
    if DROPOUT:
        acc *= 65536.0 / (65536.0 - threshold.to(ACC))
    if BY_RANK:
        at = lane[:, None].to(tl.int64) * size + column[None, :]
    else:
        at = column[None, :].to(tl.int64) * rank + lane[:, None]
    if PREVIOUS:
        acc += tl.load(pick(previous, problem) + at, mask=inside, other=0.0)
    acc = tl.where(inside, acc, 0.0)
    # [BLOCK_R, BLOCK_N], like the gradient.
    factor = tl.load(pick(factors, problem) + at, mask=inside, other=0.0).to(ACC)
    part = parts + tl.program_id(0).to(tl.int64) * (BLOCK_R * BLOCK_R + 16)
    # Three products of TF32 are as exact as one of float32, which NVIDIA's tensor cores lack.
    EXACT: tl.constexpr = "ieee" if WIDE or is_hip() else "tf32x3"
    gram = tl.dot(acc, tl.trans(acc), input_precision=EXACT, out_dtype=ACC)
    tl.store(part + lane[:, None] * BLOCK_R + lane[None, :], gram)
    tl.store(part + BLOCK_R * BLOCK_R, tl.sum(tl.abs(factor * acc)))


def score(
    group: Pass,
    wides: Sequence[Tensor],
    narrow: Tensor,
    previous: Sequence[Tensor],
    *,
    by_rank: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """The statistics of every dA, or of every dB, in fp32 (fp64 for fp64).

    Args:
        wides: every source [m, k_i], for dA, or every dY [m, n_i], for dB; last stride 1.
        narrow: dS for dA, S for dB, [m, columns].
        previous: for each branch an earlier gradient to add, in the dtype of the result; or empty.
        by_rank: whether it is dA.

    Returns:
        The Gram matrix [r, r] and the sum of |factor * gradient| [] of each branch of a rank above
        0, which `LARGEST_RANK` bounds.
    """
    call, layout, launch = group.call, group.layout, group.launch
    branches = [j for j, rank in enumerate(call.ranks) if rank]
    of_branch = call.branch_source if by_rank else call.branch_site
    wides = [wides[of_branch[j]] for j in branches]
    factors = one_dtype([(call.a if by_rank else call.b)[j].contiguous() for j in branches])
    earlier = [previous[j].contiguous() for j in branches] if previous else []
    scales = [1.0 if by_rank else float(call.scales[j]) for j in branches]
    dropout = [call.dropout[j] if by_rank else 0.0 for j in branches]
    m = narrow.shape[0]
    ranks = [factor.shape[0 if by_rank else 1] for factor in factors]
    block_r = block_for(max(ranks))
    tile = launch.tile("score", block_r, odd=odd(*wides), dropout=any(dropout))
    sizes = [wide.shape[1] for wide in wides]
    blocks = [ceil_div(size, tile.n) for size in sizes]
    dtype = accumulator(narrow.dtype)
    part_size = block_r * block_r + 16
    parts = narrow.new_empty(sum(blocks) * part_size, dtype=dtype)
    launch.start(
        score_kernel,
        (sum(blocks),),
        tuple(wides),
        tuple(wide.stride(0) for wide in wides),
        tuple(sizes),
        narrow,
        tuple(layout.branch[j].start for j in branches),
        tuple(layout.branch[j].width for j in branches),
        times16(ranks),
        tuple(factors),
        tuple(earlier) or tuple(factors),
        tuple(scales),
        times16(branches),
        thresholds(dropout),
        call.seed,
        parts,
        m,
        layout.columns,
        BY_RANK=by_rank,
        PREVIOUS=bool(earlier),
        DROPOUT=any(dropout),
        PRECISION=launch.precision,
        INDEX64=group.index64,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    grams = [narrow.new_empty(rank, rank, dtype=dtype) for rank in ranks]
    totals = [narrow.new_empty((), dtype=dtype) for _ in ranks]
    todo = []
    for p, count in enumerate(blocks):
        gram = parts[sum(blocks[:p]) * part_size :]
        todo.append(Sum(grams[p], gram, block_r, part_size, count))
        todo.append(Sum(totals[p].view(1, 1), gram[block_r * block_r :], 1, part_size, count))
    reduce_splits(todo, launch)
    return grams, totals
