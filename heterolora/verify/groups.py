"""Small groups that together hold every combination of branches the op has to get right."""

from collections.abc import Callable

import torch
from torch import Tensor

from heterolora.kernels import Branch, Site

__all__ = ["GROUPS", "Draw", "Group", "leaves"]

Group = tuple[Tensor, list[Site], list[Branch]]


class Draw:
    """Random operands of one dtype; factors may be of another."""

    def __init__(self, dtype: torch.dtype, factors: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self.factor_dtype = factors or dtype

    def tensor(self, *shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype).requires_grad_(grad)

    def site(self, n: int, k: int, bias: bool = True) -> Site:
        weight = self.tensor(n, k, grad=False)
        return Site(weight, self.tensor(n) if bias else None)

    def branch(
        self, site: int, rank: int, k: int, n: int, scale: float = 2.0, **options: Tensor
    ) -> Branch:
        a = torch.randn(rank, k, dtype=self.factor_dtype, requires_grad=True)
        b = torch.randn(n, rank, dtype=self.factor_dtype, requires_grad=True)
        return Branch(site, a, b, scale, **options)

    def mask(self, *shape: int) -> Tensor:
        return (torch.rand(*shape) > 0.3).to(self.dtype) / 0.7


def single(draw: Draw) -> Group:
    return draw.tensor(5, 7), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4)]


def no_branch(draw: Draw) -> Group:
    return draw.tensor(5, 7), [draw.site(4, 7), draw.site(3, 7, bias=False)], []


def rank_zero(draw: Draw) -> Group:
    sites = [draw.site(4, 7), draw.site(6, 7)]
    return draw.tensor(5, 7), sites, [draw.branch(0, 0, 7, 4), draw.branch(1, 2, 7, 6)]


def mixed_siblings(draw: Draw) -> Group:
    sites = [draw.site(4, 7), draw.site(6, 7, bias=False), draw.site(1, 7), draw.site(5, 7)]
    ranks = (3, 17, 1, 0)
    branches = [
        draw.branch(i, rank, 7, sites[i].weight.shape[0], scale=0.5 + i)
        for i, rank in enumerate(ranks)
    ]
    return draw.tensor(2, 3, 7), sites, branches


def two_sources(draw: Draw) -> Group:
    """LoRA from x and a shortcut from an earlier activation, out of order, on both sites."""
    x, u = draw.tensor(2, 3, 7), draw.tensor(2, 3, 5)
    sites = [draw.site(4, 7), draw.site(6, 7)]
    branches = [
        draw.branch(1, 2, 5, 6, source=u),
        draw.branch(0, 3, 7, 4),
        draw.branch(0, 1, 5, 4, scale=-1.5, source=u),
        draw.branch(1, 8, 7, 6),
    ]
    return x, sites, branches


def only_shortcut(draw: Draw) -> Group:
    """No branch reads x, and its gradient comes from the base matmul alone."""
    u = draw.tensor(5, 3)
    return draw.tensor(5, 7), [draw.site(4, 7)], [draw.branch(0, 2, 3, 4, source=u)]


def two_branches_one_source(draw: Draw) -> Group:
    branches = [draw.branch(0, 3, 7, 4), draw.branch(0, 2, 7, 4, scale=0.25)]
    return draw.tensor(5, 7), [draw.site(4, 7)], branches


def dropout(draw: Draw) -> Group:
    x, u = draw.tensor(5, 7), draw.tensor(5, 3)
    sites = [draw.site(4, 7), draw.site(6, 7)]
    branches = [
        draw.branch(0, 3, 7, 4, mask=draw.mask(5, 7)),
        draw.branch(1, 2, 7, 6, mask=draw.mask(5, 7)),
        draw.branch(1, 2, 3, 6, source=u, mask=draw.mask(5, 3)),
        draw.branch(1, 1, 7, 6),
    ]
    return x, sites, branches


def transposed_weight(draw: Draw) -> Group:
    weight = draw.tensor(7, 4, grad=False).t()
    return draw.tensor(5, 7), [Site(weight, draw.tensor(4))], [draw.branch(0, 3, 7, 4)]


def strided_input(draw: Draw) -> Group:
    base = draw.tensor(7, 6, 2)
    return base.permute(2, 1, 0), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4)]


def expanded_input(draw: Draw) -> Group:
    base = draw.tensor(1, 7)
    return base.expand(5, 7), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4)]


def one_row(draw: Draw) -> Group:
    return draw.tensor(7), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4)]


def no_rows(draw: Draw) -> Group:
    return draw.tensor(0, 7), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4)]


GROUPS: dict[str, Callable[[Draw], Group]] = {
    build.__name__: build
    for build in (
        single,
        no_branch,
        rank_zero,
        mixed_siblings,
        two_sources,
        only_shortcut,
        two_branches_one_source,
        dropout,
        transposed_weight,
        strided_input,
        expanded_input,
        one_row,
        no_rows,
    )
}


def leaves(group: Group) -> list[Tensor]:
    """Every tensor of the group that can need a gradient, each once."""
    x, sites, branches = group
    found = [x, *(site.bias for site in sites)]
    for branch in branches:
        found += [branch.a, branch.b, branch.source]
    return list(dict.fromkeys(t for t in found if t is not None))
