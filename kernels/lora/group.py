"""What a group is, in plain Python: sites, branches, one call of them, and how its S is packed.

Two packings of S exist. `aten` keeps ranks as they are and orders columns by source first, so that
one product with stacked A fills all columns of a source (:func:`group_layout`). The Triton kernels
pad ranks, because a kernel is compiled for a block of columns and not for a rank, and order columns
by site first, so that the base matmul of a site runs on over one contiguous range of S, whatever
its branches read (:func:`bucket_layout`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from torch import Tensor

__all__ = [
    "BUCKETS",
    "Branch",
    "BucketLayout",
    "Call",
    "Columns",
    "GroupLayout",
    "Segment",
    "Site",
    "as_matrix",
    "bucket",
    "bucket_layout",
    "group_layout",
    "split",
]

BUCKETS = (16, 32, 64, 128)

_T = TypeVar("_T")


@dataclass(frozen=True)
class Site:
    """A frozen linear layer: ``x @ weight.T + bias``.

    Args:
        weight: [n, k], any strides (a transposed view serves `Conv1D`). Never receives a gradient.
        bias: [n] or None. May require a gradient.
    """

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class Branch:
    """A low-rank addition ``scale * (source * mask) @ a.T @ b.T`` to the output of one site.

    Args:
        site: index of the site it adds to.
        a: [r, k_source]. Rank 0 is allowed and adds nothing.
        b: [n, r].
        scale: alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA; may be a 0-dim tensor.
        source: [..., k_source] with the leading dimensions of x; None means x itself.
        mask: dropout mask, shaped like the source, already divided by the keep probability.
        dropout: probability of zeroing an element of the source, [0, 1). The mask is a function of
            the group's seed and the branch's index alone (`spec.dropout_mask`): nothing is stored.
    """

    site: int
    a: Tensor
    b: Tensor
    scale: float | Tensor = 1.0
    source: Tensor | None = None
    mask: Tensor | None = None
    dropout: float = 0.0


class Call(NamedTuple):
    """The operands of one call of a group, in the order in which every op takes them.

    The tensors come first. What follows them is true of a group from call to call.

    Attributes:
        sources: the distinct inputs [..., k_i], of equal leading dimensions and one dtype; x first.
        weights: [n_i, k] for each site, in the dtype of x; empty where the base layers run by
            themselves.
        biases: [n_i] or None for each site, in the dtype of x; empty like `weights`, and in a
            backward pass, which needs none.
        a: [r_j, k_source] for each branch, of any float dtype.
        b: [n_site, r_j] for each branch, of any float dtype.
        seed: int64 scalar on the device of x if any branch has dropout, else None.
        scales: one number for each branch.
        branch_site: the index of the site that each branch adds to.
        branch_source: the index of the source that each branch reads.
        dropout: the probability of zeroing an element of its source, for each branch.
        implementation: "aten" or "triton".
    """

    sources: Sequence[Tensor]
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    a: Sequence[Tensor]
    b: Sequence[Tensor]
    seed: Tensor | None
    scales: Sequence[float]
    branch_site: Sequence[int]
    branch_source: Sequence[int]
    dropout: Sequence[float]
    implementation: str

    @property
    def ranks(self) -> list[int]:
        return [factor.shape[0] for factor in self.a]

    def without_branches(self) -> "Call":
        """The same sources and sites with nothing added to them."""
        return Call(
            self.sources, self.weights, self.biases, (), (), None, (), (), (), (),
            self.implementation,
        )  # fmt: skip


def as_matrix(t: Tensor) -> Tensor:
    """[..., k] as [m, k]."""
    if t.dim() == 2:
        return t
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def split(items: Sequence[_T], *counts: int) -> list[Sequence[_T]]:
    """A flat list as consecutive parts of the given lengths."""
    parts, start = [], 0
    for count in counts:
        parts.append(items[start : start + count])
        start += count
    return parts


class Columns(NamedTuple):
    """A half-open range of columns of the packed S."""

    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class GroupLayout:
    """Where each branch's columns lie in S [m, columns], packed by (source, site) in that order.

    Attributes:
        columns: total width of S, the sum of all ranks as given.
        branch: columns of each branch, in the caller's order. If ranks are padded, the first ones
            are in use.
        source: columns of all branches of a source; one product with their stacked A fills them.
        by_source: the branch indices of each source, in packing order.
        by_site: the branch indices of each site, in packing order.
    """

    columns: int
    branch: tuple[Columns, ...]
    source: tuple[Columns, ...]
    by_source: tuple[tuple[int, ...], ...]
    by_site: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=4096)
def _group_layout(
    ranks: tuple[int, ...],
    branch_site: tuple[int, ...],
    branch_source: tuple[int, ...],
    sites: int,
    sources: int,
) -> GroupLayout:
    order = sorted(range(len(ranks)), key=lambda j: (branch_source[j], branch_site[j], j))
    branch = [Columns(0, 0)] * len(ranks)
    source = [Columns(0, 0)] * sources
    position = 0
    for index in range(sources):
        start = position
        for j in order:
            if branch_source[j] == index:
                branch[j] = Columns(position, position + ranks[j])
                position += ranks[j]
        source[index] = Columns(start, position)
    return GroupLayout(
        columns=position,
        branch=tuple(branch),
        source=tuple(source),
        # A rank of 0 adds nothing, so no implementation needs to see its branch.
        by_source=tuple(
            tuple(j for j in order if branch_source[j] == i and ranks[j]) for i in range(sources)
        ),
        by_site=tuple(
            tuple(j for j in order if branch_site[j] == i and ranks[j]) for i in range(sites)
        ),
    )


def group_layout(
    ranks: Sequence[int],
    branch_site: Sequence[int],
    branch_source: Sequence[int],
    *,
    sites: int,
    sources: int,
) -> GroupLayout:
    """Pack the branches of a group by (source, site).

    Args:
        ranks: the rank of each branch, or what it is padded to; 0 included.
        branch_site: index of the site each branch adds to, below `sites`.
        branch_source: index of the tensor each branch reads, below `sources`; 0 is x.
        sites: number of sites in the group.
        sources: number of distinct sources, x included.
    """
    return _group_layout(tuple(ranks), tuple(branch_site), tuple(branch_source), sites, sources)


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
        branch_site: the site each branch adds to.
    """

    columns: int
    branch: tuple[Columns, ...]
    site: tuple[Columns, ...]
    segments: tuple[Segment, ...]
    branch_site: tuple[int, ...]


def bucket(rank: int) -> int:
    """A rank padded to 0, 16, 32, 64 or 128; beyond that to chunks of 128 and one of these."""
    # Not by divmod, which a symbolic size under torch.compile does not know.
    full, rest = rank // BUCKETS[-1], rank % BUCKETS[-1]
    return full * BUCKETS[-1] + (next(size for size in BUCKETS if rest <= size) if rest else 0)


@lru_cache(maxsize=4096)
def _bucket_layout(
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
    return BucketLayout(position, tuple(branch), tuple(site), tuple(segments), branch_site)


def bucket_layout(
    ranks: Sequence[int],
    branch_site: Sequence[int],
    branch_source: Sequence[int],
    dropped: Sequence[bool],
    *,
    sites: int,
) -> BucketLayout:
    """Pack the branches of a group by (site, source), at their padded ranks.

    Args:
        ranks: the rank of each branch, 0 included.
        branch_site: index of the site each branch adds to, below `sites`.
        branch_source: index of the tensor each branch reads; 0 is x.
        dropped: whether each branch drops out its source.
        sites: number of sites in the group.
    """
    return _bucket_layout(
        tuple(ranks), tuple(branch_site), tuple(branch_source), tuple(dropped), sites
    )
