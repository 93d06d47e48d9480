"""What the launches of one pass share, and the problem tables that are made of it on the host."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..group import BUCKETS, BucketLayout, Call
from .launch import Launch
from .pack import Packed

__all__ = [
    "ColumnTable",
    "Pass",
    "accumulator",
    "block_for",
    "chunks",
    "common_block",
    "leading",
    "segments",
    "thresholds",
    "times16",
]


class Pass(NamedTuple):
    """One pass over a group, forward or backward: what all of its launches share.

    Attributes:
        call: the operands.
        sources: those of the call as [m, k_i], each with a last stride of 1.
        layout: where each branch lies in S.
        packed: every A and B.
        launch: tiles and options.
        index64: whether offsets into any of the matrices can pass 2^31.
    """

    call: Call
    sources: Sequence[Tensor]
    layout: BucketLayout
    packed: Packed
    launch: Launch
    index64: bool


@dataclass(frozen=True)
class ColumnTable:
    """Runs of columns of S that read one source, as kernel arguments.

    Attributes:
        block: power of two; the columns a kernel takes at a time.
        source: index of the source of each run.
        start, width: its columns.
        a: element of the packed buffer where its rows of A begin.
        branch: its branch, times 16 (:func:`times16`), if the source is dropped out, else 0.
        threshold: of :func:`thresholds`.
        dropout: whether any threshold is above 0.
    """

    block: int
    source: tuple[int, ...]
    start: tuple[int, ...]
    width: tuple[int, ...]
    a: tuple[int, ...]
    branch: tuple[int, ...]
    threshold: tuple[float, ...]
    dropout: bool


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the kernels add up in, and write parts of a sum in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def times16(numbers: Iterable[int]) -> tuple[int, ...]:
    """Table entries such as ranks, to be divided by 16 in the kernel.

    The compiler makes a kernel of its own for every mixture of ones, multiples of 16 and others
    among a table's integers; all of these are multiples of 16 and none is 1.
    """
    return tuple(16 * number for number in numbers)


def thresholds(dropout: Iterable[float]) -> tuple[float, ...]:
    """Drop probabilities in units of 2^-16, rounded as `spec.dropout_mask` rounds them; floats,
    because the compiler specialises integers."""
    return tuple(float(round(p * 65536)) for p in dropout)


def block_for(width: int) -> int:
    """The smallest bucket that holds so many columns, or the largest there is."""
    return next((size for size in BUCKETS if size >= width), BUCKETS[-1])


def common_block(widths: Iterable[int]) -> int:
    """The largest block that divides all widths, so that a loop over it needs no mask."""
    widths = list(widths)
    return next(size for size in (64, 32, 16) if all(width % size == 0 for width in widths))


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


def chunks(group: Pass) -> ColumnTable:
    """Every segment cut into chunks of at most `block` columns, the bucket of the widest."""
    return _table(group.layout, group.packed.a, *_about(group), cut=True)


def segments(group: Pass) -> ColumnTable:
    """Every segment whole; `block` divides all widths."""
    return _table(group.layout, group.packed.a, *_about(group), cut=False)


def _about(group: Pass) -> tuple[tuple[int, ...], tuple[float, ...]]:
    return tuple(source.shape[1] for source in group.sources), tuple(group.call.dropout)


# Making a table takes longer than a launch.
@lru_cache(maxsize=8192)
def _table(
    layout: BucketLayout,
    starts_a: tuple[int, ...],
    ks: tuple[int, ...],
    dropout: tuple[float, ...],
    *,
    cut: bool,
) -> ColumnTable:
    widths = [segment.width for segment in layout.segments]
    block = block_for(max(widths)) if cut else common_block(widths)
    branch_at = {columns.start: j for j, columns in enumerate(layout.branch) if columns.width}
    runs = [
        (segment, start, min(segment.stop - start, block) if cut else segment.width)
        for segment in layout.segments
        for start in (range(segment.start, segment.stop, block) if cut else [segment.start])
    ]
    threshold = thresholds(
        dropout[segment.branch] if segment.branch >= 0 else 0.0 for segment, _, _ in runs
    )
    return ColumnTable(
        block=block,
        source=tuple(segment.source for segment, _, _ in runs),
        start=tuple(start for _, start, _ in runs),
        width=tuple(width for _, _, width in runs),
        a=tuple(
            starts_a[branch_at[segment.start]] + (start - segment.start) * ks[segment.source]
            for segment, start, _ in runs
        ),
        branch=times16(max(segment.branch, 0) for segment, _, _ in runs),
        threshold=threshold,
        dropout=any(threshold),
    )
