"""Ranks padded to buckets: where each branch lies in the S that the Triton kernels share.

A kernel is compiled for a block of columns, not for a rank, so ranks are padded to the blocks there
are. Unlike in :mod:`.layout`, columns are ordered by site first, so that the base matmul of a site
runs on over one contiguous range of S, whatever its branches read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from .group import Columns

__all__ = ["BUCKETS", "BucketLayout", "Segment", "bucket", "bucket_layout", "ceil_div"]

BUCKETS = (16, 32, 64, 128)


class Segment(NamedTuple):
    """Adjacent columns of S that are computed from the same input, dropout included.

    Attributes:
        source: index of the tensor they read.
        start, stop: the columns.
        branch: the one branch inside if its source is dropped out, else -1.
    """

    source: int
    start: int
    stop: int
    branch: int

    @property
    def width(self) -> int:
        return self.stop - self.start


# By identity: `bucket_layout` makes one object for each layout, and hashing all of it at every
# launch takes longer than what is remembered for it.
@dataclass(frozen=True, eq=False)
class BucketLayout:
    """Where each branch's columns lie in S [m, columns], packed by (site, source).

    Attributes:
        columns: width of S, the sum of all padded ranks.
        branch: columns of each branch in the caller's order, padding included.
        site: columns of each site; empty where it has no branch.
        segments: what one shrink product fills at a time, in column order.
        site_of: the site each branch adds to.
        source_of: the source each branch reads.
    """

    columns: int
    branch: tuple[Columns, ...]
    site: tuple[Columns, ...]
    segments: tuple[Segment, ...]
    site_of: tuple[int, ...]
    source_of: tuple[int, ...]


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up. On the host `triton.cdiv` takes 4 us for it."""
    return -(-a // b)


def bucket(rank: int) -> int:
    """The rank, padded: 0, 16, 32, 64, 128, and beyond that full chunks of 128 and a bucket."""
    # Not by divmod, which a symbolic size under torch.compile does not know.
    full, rest = rank // BUCKETS[-1], rank % BUCKETS[-1]
    return full * BUCKETS[-1] + (next(size for size in BUCKETS if rest <= size) if rest else 0)


@lru_cache(maxsize=4096)
def _pack(
    ranks: tuple[int, ...],
    branch_site: tuple[int, ...],
    branch_source: tuple[int, ...],
    dropped: tuple[bool, ...],
    sites: int,
) -> BucketLayout:
    branch = [Columns(0, 0)] * len(ranks)
    site: list[Columns] = []
    segments: list[Segment] = []
    position = 0
    order = sorted(range(len(ranks)), key=lambda j: (branch_source[j], j))
    for index in range(sites):
        first = position
        for j in order:
            if branch_site[j] != index or not ranks[j]:
                continue
            branch[j] = Columns(position, position + bucket(ranks[j]))
            key = (branch_source[j], j if dropped[j] else -1)
            if segments and (segments[-1].source, segments[-1].branch) == key:
                segments[-1] = segments[-1]._replace(stop=branch[j].stop)
            else:
                segments.append(Segment(key[0], *branch[j], key[1]))
            position = branch[j].stop
        site.append(Columns(first, position))
    return BucketLayout(
        position, tuple(branch), tuple(site), tuple(segments), branch_site, branch_source
    )


def bucket_layout(
    ranks: Sequence[int],
    branch_site: Sequence[int],
    branch_source: Sequence[int],
    dropped: Sequence[bool],
    *,
    sites: int,
) -> BucketLayout:
    """Pack the branches of a group at their padded ranks.

    Args:
        ranks: rank of each branch, 0 included.
        branch_site: index of the site each branch adds to, below `sites`.
        branch_source: index of the tensor each branch reads; 0 is x.
        dropped: whether each branch drops out its source.
        sites: number of sites in the group.
    """
    return _pack(tuple(ranks), tuple(branch_site), tuple(branch_source), tuple(dropped), sites)
