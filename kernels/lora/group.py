"""What a group is, in plain Python: sites, branches, and where each branch lies in the packed S."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

__all__ = ["Branch", "Columns", "GroupLayout", "Site", "group_layout"]


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
def _pack(
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
    """Pack the branches of a group.

    Args:
        ranks: rank of each branch, or what it is padded to; 0 included.
        branch_site: index of the site each branch adds to, below `sites`.
        branch_source: index of the tensor each branch reads, below `sources`; 0 is x.
        sites: number of sites in the group.
        sources: number of distinct sources, x included.
    """
    return _pack(tuple(ranks), tuple(branch_site), tuple(branch_source), sites, sources)
