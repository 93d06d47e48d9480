"""pack: all A and B of a group in one buffer, scaled, cast and padded, so that the other kernels
read plain matrices whatever the ranks are.

The buffer holds, one after the other: A of each branch, [bucket, k], in the order of S's columns;
the packed B of each site, [n, site columns]; and for each column of S whether it is a rank (1) or
padding (0). It is made anew in every pass from a few hundred kilobytes; only where each part lies
is remembered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..group import BucketLayout, Call
from .device import ceil_div, pick
from .launch import Launch

__all__ = ["Packed", "one_dtype", "pack", "pack_kernel"]

_BLOCK = 1024


@triton.jit
def pack_kernel(
    factors_a,  # per branch: [r, k], contiguous
    factors_b,  # per branch: [n, r], contiguous
    packed,  # flat
    sizes_a,  # per branch: r * k
    padded_a,  # bucket * k
    starts_a,  # where the branch's A begins in packed
    sizes_b,  # n * r
    rows_b,  # n
    buckets,  # the padded rank
    starts_b,  # where the branch's first B column begins in packed
    strides_b,  # columns of the branch's site
    starts_valid,  # where the branch's columns' flags begin in packed
    scales,
    BRANCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program copies BLOCK elements of one factor: the A of branch j, or its B.
    problem = tl.program_id(1)
    j = problem % BRANCHES
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    rank_columns = pick(buckets, j)
    if problem < BRANCHES:
        # The rows of A that pad its rank lie at its end, so that flat indices stay the same.
        inside = index < pick(sizes_a, j)
        value = tl.load(pick(factors_a, j) + index, mask=inside, other=0.0)
        target = packed + pick(starts_a, j) + index
        tl.store(target, value.to(packed.dtype.element_ty), mask=index < pick(padded_a, j))
    else:
        rows = pick(rows_b, j)
        # A rank passed as such would compile the kernel anew for each; sizes are multiples of 16.
        rank = pick(sizes_b, j) // rows
        # B is written row by row at the padded width, into the columns of its site.
        row, column = index // rank_columns, index % rank_columns
        inside = (row < rows) & (column < rank)
        factor = tl.load(pick(factors_b, j) + row * rank + column, mask=inside, other=0.0)
        scaled = factor.to(tl.float64 if factor.dtype == tl.float64 else tl.float32)
        scaled *= pick(scales, j)
        flat = packed + pick(starts_b, j) + row * pick(strides_b, j) + column
        tl.store(flat, scaled.to(packed.dtype.element_ty), mask=row < rows)
        # One flag for each of its columns: the first elements write these.
        flag = packed + pick(starts_valid, j) + index
        is_rank = (index < rank).to(packed.dtype.element_ty)
        tl.store(flag, is_rank, mask=index < rank_columns)


@dataclass(frozen=True)
class Packed:
    """The packed factors.

    Attributes:
        buffer: flat, in the dtype of x.
        a: for each branch, the element where its A [bucket, k] begins.
        b: for each site, the element where its B [n, columns] begins.
        valid: where the flags of S's columns begin.
    """

    buffer: Tensor
    a: tuple[int, ...]
    b: tuple[int, ...]
    valid: int


class _Plan(NamedTuple):
    """What follows from the layout and the sizes of the factors alone.

    Attributes:
        order: the branches of a rank above 0, in the order of their columns.
        a, b, valid: of `Packed`.
        size: elements of the buffer.
        largest: elements of the largest padded factor.
        tables: the kernel's, between the buffer and the scales.
    """

    order: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    valid: int
    size: int
    largest: int
    tables: tuple[tuple[int, ...], ...]


# Making the tables takes longer than the launch.
@lru_cache(maxsize=4096)
def _plan(
    layout: BucketLayout, ks: tuple[int, ...], ns: tuple[int, ...], ranks: tuple[int, ...]
) -> _Plan:
    start_a, start_b = [0] * len(ks), [0] * len(layout.site)
    position = 0
    order = sorted((j for j, rank in enumerate(ranks) if rank), key=layout.branch.__getitem__)
    width = [columns.width for columns in layout.branch]
    for j in order:
        start_a[j] = position
        position += width[j] * ks[j]
    for j in order:
        site = layout.site[layout.branch_site[j]]
        if layout.branch[j].start == site.start:
            start_b[layout.branch_site[j]] = position
            position += site.width * ns[j]
    sites = [layout.site[layout.branch_site[j]] for j in order]
    tables = (
        tuple(ranks[j] * ks[j] for j in order),
        tuple(width[j] * ks[j] for j in order),
        tuple(start_a[j] for j in order),
        tuple(ns[j] * ranks[j] for j in order),
        tuple(ns[j] for j in order),
        tuple(width[j] for j in order),
        tuple(
            start_b[layout.branch_site[j]] + layout.branch[j].start - site.start
            for j, site in zip(order, sites, strict=True)
        ),
        tuple(site.width for site in sites),
        tuple(position + layout.branch[j].start for j in order),
    )
    return _Plan(
        tuple(order),
        tuple(start_a),
        tuple(start_b),
        position,
        position + layout.columns,
        max((width[j] * max(ks[j], ns[j]) for j in order), default=0),
        tables,
    )


def one_dtype(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors, all in float32 if their dtypes differ: a table holds pointers of one type."""
    dtypes = {factor.dtype for factor in factors}
    return list(factors) if len(dtypes) < 2 else [factor.float() for factor in factors]


def pack(call: Call, layout: BucketLayout, launch: Launch) -> Packed:
    """Launch one program per 1024 elements of each factor of a call, B times its scale."""
    x, a, b = call.sources[0], one_dtype(call.a), one_dtype(call.b)
    ranks, ks = zip(*(factor.shape for factor in a), strict=True) if a else ((), ())
    plan = _plan(layout, ks, tuple(factor.shape[0] for factor in b), ranks)
    buffer = torch.empty(plan.size, dtype=x.dtype, device=x.device)
    if plan.order:
        launch.start(
            pack_kernel,
            (ceil_div(plan.largest, _BLOCK), 2 * len(plan.order)),
            tuple(a[j].contiguous() for j in plan.order),
            tuple(b[j].contiguous() for j in plan.order),
            buffer,
            *plan.tables,
            tuple(float(call.scales[j]) for j in plan.order),
            BRANCHES=len(plan.order),
            BLOCK=_BLOCK,
            # With four, the assembler spills for some numbers of branches on sm_120.
            num_warps=8,
        )
    return Packed(buffer, plan.a, plan.b, plan.valid)
