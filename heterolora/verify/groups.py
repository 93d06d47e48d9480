"""The groups that the rungs try: small ones, which together hold every combination of branches
that an op has to get right, and large ones, with every rank and the sizes around a kernel's tile.

`GROUPS` and `SEEDED` are small, `LARGE` is as large as a tile; each entry builds its operands from
a `Draw`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heterolora.kernels import Branch, Site

__all__ = [
    "GROUPS",
    "LARGE",
    "RANKS",
    "SEEDED",
    "Draw",
    "Group",
    "Sizes",
    "build",
    "dropout_seed",
    "leaves",
    "named_leaves",
]

Group = tuple[Tensor, list[Site], list[Branch]]


class Draw:
    """Random operands of one dtype, the same for the same seed; factors may be of another dtype."""

    def __init__(
        self,
        dtype: torch.dtype,
        factors: torch.dtype | None = None,
        *,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.dtype = dtype
        self.factor_dtype = factors or dtype
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, *shape: int, grad: bool = True) -> Tensor:
        return self._normal(shape, self.dtype).requires_grad_(grad)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self.generator)

    def site(self, n: int, k: int, bias: bool = True) -> Site:
        weight = self.tensor(n, k, grad=False)
        return Site(weight, self.tensor(n) if bias else None)

    def branch(
        self, site: int, rank: int, k: int, n: int, scale: float | Tensor = 2.0, **options: Any
    ) -> Branch:
        a = self._normal((rank, k), self.factor_dtype).requires_grad_()
        b = self._normal((n, rank), self.factor_dtype).requires_grad_()
        return Branch(site, a, b, scale, **options)

    def mask(self, *shape: int) -> Tensor:
        kept = torch.rand(shape, device=self.device, generator=self.generator) > 0.3
        return kept.to(self.dtype) / 0.7


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


def two_shortcuts(draw: Draw) -> Group:
    """Two earlier activations of different widths beside LoRA, one of them read by both sites."""
    u, v = draw.tensor(5, 3), draw.tensor(5, 9)
    sites = [draw.site(4, 7, bias=False), draw.site(6, 7)]
    branches = [
        draw.branch(0, 1, 7, 4),
        draw.branch(0, 2, 3, 4, source=u),
        draw.branch(0, 3, 9, 4, scale=-0.5, source=v),
        draw.branch(1, 2, 9, 6, source=v),
        draw.branch(1, 0, 7, 6),
    ]
    return draw.tensor(5, 7), sites, branches


def tensor_scale(draw: Draw) -> Group:
    scale = torch.tensor(-1.5, dtype=draw.factor_dtype, device=draw.device)
    return draw.tensor(5, 7), [draw.site(4, 7)], [draw.branch(0, 3, 7, 4, scale=scale)]


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


def seeded_dropout(draw: Draw) -> Group:
    """Dropout of different strength beside branches without, on one source."""
    sites = [draw.site(4, 7), draw.site(6, 7)]
    branches = [
        draw.branch(0, 3, 7, 4, dropout=0.5),
        draw.branch(0, 2, 7, 4),
        draw.branch(1, 2, 7, 6, dropout=0.1),
        draw.branch(1, 1, 7, 6, dropout=0.1),
    ]
    return draw.tensor(2, 3, 7), sites, branches


def seeded_shortcut(draw: Draw) -> Group:
    """Dropout on LoRA and on a shortcut, wider than one Philox call, next to a stored mask."""
    u = draw.tensor(5, 19)
    branches = [
        draw.branch(0, 2, 19, 4, source=u, dropout=0.3),
        draw.branch(0, 3, 11, 4, dropout=0.3),
        draw.branch(1, 2, 19, 6, source=u),
        draw.branch(1, 1, 11, 6, mask=draw.mask(5, 11)),
    ]
    return draw.tensor(5, 11), [draw.site(4, 11), draw.site(6, 11, bias=False)], branches


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
        two_shortcuts,
        tensor_scale,
        transposed_weight,
        strided_input,
        expanded_input,
        one_row,
        no_rows,
    )
}


# These draw their dropout masks from a seed, and so have to be called with one.
SEEDED: dict[str, Callable[[Draw], Group]] = {
    build.__name__: build for build in (seeded_dropout, seeded_shortcut)
}


RANKS = (1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 160)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a group.

    Attributes:
        m, k: rows and columns of x.
        n: outputs of each site; every other site has no bias.
        lora: (site, rank) of each branch that reads x.
        shortcuts: (site, rank, source) of each branch that reads an earlier activation.
        widths: columns of each such activation.
        dropout: probability on every branch.
    """

    m: int
    k: int
    n: tuple[int, ...]
    lora: tuple[tuple[int, int], ...]
    shortcuts: tuple[tuple[int, int, int], ...] = ()
    widths: tuple[int, ...] = ()
    dropout: float = 0.0


def build(draw: Draw, sizes: Sizes) -> Group:
    """Random operands of a sizes."""
    sources = [draw.tensor(sizes.m, width) for width in sizes.widths]
    branches = [
        draw.branch(site, rank, sizes.k, sizes.n[site], scale=0.5, dropout=sizes.dropout)
        for site, rank in sizes.lora
    ]
    branches += [
        draw.branch(
            site,
            rank,
            sizes.widths[index],
            sizes.n[site],
            scale=-2.0,
            source=sources[index],
            dropout=sizes.dropout,
        )
        for site, rank, index in sizes.shortcuts
    ]
    sites = [draw.site(n, sizes.k, bias=i % 2 == 0) for i, n in enumerate(sizes.n)]
    return draw.tensor(sizes.m, sizes.k), sites, branches


def shared_factors(draw: Draw) -> Group:
    """One pair of factors on two sources, as in ResLoRA: its gradients add up."""
    u = draw.tensor(5, 7)
    first = draw.branch(0, 3, 7, 4)
    second = Branch(0, first.a, first.b, 0.5, source=u)
    return draw.tensor(5, 7), [draw.site(4, 7)], [first, second]


def _sized(sizes: Sizes) -> Callable[[Draw], Group]:
    return lambda draw: build(draw, sizes)


# Each rank of RANKS, each size at, before and after a tile of 32, primes, and 1. Some have dropout,
# so all are called with a seed.
LARGE: dict[str, Callable[[Draw], Group]] = {
    "shared_factors": shared_factors,
    **{
        name: _sized(sizes)
        for name, sizes in {
            "ranks_1_to_4": Sizes(33, 37, (31, 33, 1, 17), ((0, 1), (1, 2), (2, 3), (3, 4))),
            "ranks_7_to_16": Sizes(1, 97, (32, 65, 13), ((0, 7), (1, 8), (2, 12), (1, 16))),
            "ranks_17_to_32": Sizes(31, 64, (64, 32), ((0, 17), (1, 24), (0, 32))),
            "ranks_48_64": Sizes(37, 33, (61, 32), ((1, 48), (0, 64), (1, 1))),
            "rank_96_beside_1": Sizes(61, 31, (33, 5), ((0, 96), (1, 1))),
            "rank_128_beside_0": Sizes(32, 32, (32, 40), ((0, 128), (1, 0))),
            "rank_160_beside_17": Sizes(29, 63, (47, 31), ((0, 160), (1, 17))),
            "one_of_everything": Sizes(1, 1, (1,), ((0, 1),)),
            "rank_above_sizes": Sizes(3, 5, (2, 7), ((0, 24), (1, 64))),
            "many_rows": Sizes(131, 17, (19,), ((0, 12),)),
            "split_k": Sizes(5, 389, (33,), ((0, 8), (0, 3))),
            "split_k_wide_n": Sizes(2, 300, (257,), ((0, 16),)),
            "all_ranks": Sizes(7, 11, (13,), tuple((0, rank) for rank in (1, 3, 7, 12, 17, 24))),
            "shortcuts": Sizes(
                33, 40, (31, 48), ((0, 4), (1, 17)), ((1, 8, 0), (0, 2, 1), (1, 3, 1)), (23, 65)
            ),
            "shortcuts_only": Sizes(17, 35, (33, 16), (), ((1, 8, 0), (0, 32, 0)), (67,)),
            "dropout_large": Sizes(
                33, 41, (31, 17), ((0, 4), (1, 17), (0, 2)), ((1, 12, 0),), (53,), dropout=0.25
            ),
            "dropout_chunks": Sizes(9, 32, (24,), ((0, 160), (0, 7)), dropout=0.5),
            "dropout_split_k": Sizes(3, 391, (5,), ((0, 8),), dropout=0.1),
        }.items()
    },
}


def dropout_seed(device: str = "cpu") -> Tensor:
    """A seed with bits in both halves of its 64."""
    return torch.tensor(0x1234_5678_9ABC_DEF0, device=device)


def leaves(group: Group) -> list[Tensor]:
    """Every tensor of the group that can need a gradient, each once."""
    return list(named_leaves(group))


def named_leaves(group: Group) -> dict[Tensor, str]:
    """Every tensor of the group that can need a gradient, with the name of its first use."""
    x, sites, branches = group
    found = [("x", x), *((f"bias of site {i}", site.bias) for i, site in enumerate(sites))]
    for j, branch in enumerate(branches):
        found += [(f"A of branch {j}", branch.a), (f"B of branch {j}", branch.b)]
        found.append((f"source of branch {j}", branch.source))
    names: dict[Tensor, str] = {}
    for name, tensor in found:
        if tensor is not None:
            names.setdefault(tensor, name)
    return names
