"""Problem tables built on the host: which columns of S a program works on, and from what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..buckets import BUCKETS, BucketLayout
from .pack import Packed

__all__ = ["ColumnTable", "alike", "chunks", "common_block", "segments", "thresholds"]


@dataclass(frozen=True)
class ColumnTable:
    """Runs of columns of S that read one source, as kernel arguments.

    Attributes:
        block: power of two; the columns a kernel takes at a time.
        source: index of the source of each run.
        start, width: its columns.
        a: element of the packed buffer where its rows of A begin.
        branch: its branch, times 16 (:func:`alike`), if the source is dropped out, else 0.
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


def alike(numbers: Iterable[int]) -> tuple[int, ...]:
    """Times 16, to be divided in the kernel: for entries such as ranks.

    The compiler makes a kernel of its own for every mixture of ones, multiples of 16 and others
    among a table's integers; all of these are multiples of 16 and none is 1.
    """
    return tuple(16 * number for number in numbers)


def thresholds(dropout: Iterable[float]) -> tuple[float, ...]:
    """Drop probabilities in units of 2^-16, rounded as `spec.dropout_mask` rounds them; floats,
    because the compiler specialises integers."""
    return tuple(float(round(p * 65536)) for p in dropout)


def common_block(widths: Iterable[int]) -> int:
    """The largest block that divides all widths, so that a loop over it needs no mask."""
    widths = list(widths)
    return next(size for size in (64, 32, 16) if all(width % size == 0 for width in widths))


def chunks(
    layout: BucketLayout, packed: Packed, ks: Sequence[int], dropout: Sequence[float]
) -> ColumnTable:
    """Every segment cut into chunks of at most `block` columns, the bucket of the widest."""
    return _chunks(layout, packed.a, tuple(ks), tuple(dropout))


def segments(
    layout: BucketLayout, packed: Packed, ks: Sequence[int], dropout: Sequence[float]
) -> ColumnTable:
    """Every segment whole; `block` divides all widths."""
    return _segments(layout, packed.a, tuple(ks), tuple(dropout))


@lru_cache(maxsize=4096)
def _chunks(
    layout: BucketLayout, starts_a: tuple[int, ...], ks: tuple[int, ...], dropout: tuple[float, ...]
) -> ColumnTable:
    widest = max(segment.width for segment in layout.segments)
    block = next((size for size in BUCKETS if size >= widest), BUCKETS[-1])
    return _table(layout, starts_a, ks, dropout, block, cut=True)


@lru_cache(maxsize=4096)
def _segments(
    layout: BucketLayout, starts_a: tuple[int, ...], ks: tuple[int, ...], dropout: tuple[float, ...]
) -> ColumnTable:
    block = common_block(segment.width for segment in layout.segments)
    return _table(layout, starts_a, ks, dropout, block, cut=False)


def _table(
    layout: BucketLayout,
    starts_a: tuple[int, ...],
    ks: tuple[int, ...],
    dropout: tuple[float, ...],
    block: int,
    *,
    cut: bool,
) -> ColumnTable:
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
        branch=alike(max(segment.branch, 0) for segment, _, _ in runs),
        threshold=threshold,
        dropout=any(threshold),
    )
