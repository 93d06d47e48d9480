"""Groups as large as the kernels' tiles: every rank and the sizes around a tile's edge."""

from collections.abc import Callable
from dataclasses import dataclass

from heterolora.kernels import Branch
from heterolora.verify.groups import Draw, Group

__all__ = ["LARGE", "RANKS", "Shape", "build"]

RANKS = (1, 2, 3, 4, 7, 8, 12, 16, 17, 24, 32, 48, 64, 96, 128, 160)


@dataclass(frozen=True)
class Shape:
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


def build(draw: Draw, shape: Shape) -> Group:
    """Random operands of a shape."""
    sources = [draw.tensor(shape.m, width) for width in shape.widths]
    branches = [
        draw.branch(site, rank, shape.k, shape.n[site], scale=0.5, dropout=shape.dropout)
        for site, rank in shape.lora
    ]
    branches += [
        draw.branch(
            site,
            rank,
            shape.widths[index],
            shape.n[site],
            scale=-2.0,
            source=sources[index],
            dropout=shape.dropout,
        )
        for site, rank, index in shape.shortcuts
    ]
    sites = [draw.site(n, shape.k, bias=i % 2 == 0) for i, n in enumerate(shape.n)]
    return draw.tensor(shape.m, shape.k), sites, branches


def shared_factors(draw: Draw) -> Group:
    """One pair of factors on two sources, as in ResLoRA: its gradients add up."""
    u = draw.tensor(5, 7)
    first = draw.branch(0, 3, 7, 4)
    second = Branch(0, first.a, first.b, 0.5, source=u)
    return draw.tensor(5, 7), [draw.site(4, 7)], [first, second]


def _shaped(shape: Shape) -> Callable[[Draw], Group]:
    return lambda draw: build(draw, shape)


# Each rank of RANKS, each size at, before and after a tile of 32, primes, and 1. Some have dropout,
# so all are called with a seed.
LARGE: dict[str, Callable[[Draw], Group]] = {
    "shared_factors": shared_factors,
    **{
        name: _shaped(shape)
        for name, shape in {
            "ranks_1_to_4": Shape(33, 37, (31, 33, 1, 17), ((0, 1), (1, 2), (2, 3), (3, 4))),
            "ranks_7_to_16": Shape(1, 97, (32, 65, 13), ((0, 7), (1, 8), (2, 12), (1, 16))),
            "ranks_17_to_32": Shape(31, 64, (64, 32), ((0, 17), (1, 24), (0, 32))),
            "ranks_48_64": Shape(37, 33, (61, 32), ((1, 48), (0, 64), (1, 1))),
            "rank_96_beside_1": Shape(61, 31, (33, 5), ((0, 96), (1, 1))),
            "rank_128_beside_0": Shape(32, 32, (32, 40), ((0, 128), (1, 0))),
            "rank_160_beside_17": Shape(29, 63, (47, 31), ((0, 160), (1, 17))),
            "one_of_everything": Shape(1, 1, (1,), ((0, 1),)),
            "rank_above_sizes": Shape(3, 5, (2, 7), ((0, 24), (1, 64))),
            "many_rows": Shape(131, 17, (19,), ((0, 12),)),
            "split_k": Shape(5, 389, (33,), ((0, 8), (0, 3))),
            "split_k_wide_n": Shape(2, 300, (257,), ((0, 16),)),
            "all_ranks": Shape(7, 11, (13,), tuple((0, rank) for rank in (1, 3, 7, 12, 17, 24))),
            "shortcuts": Shape(
                33, 40, (31, 48), ((0, 4), (1, 17)), ((1, 8, 0), (0, 2, 1), (1, 3, 1)), (23, 65)
            ),
            "shortcuts_only": Shape(17, 35, (33, 16), (), ((1, 8, 0), (0, 32, 0)), (67,)),
            "dropout_large": Shape(
                33, 41, (31, 17), ((0, 4), (1, 17), (0, 2)), ((1, 12, 0),), (53,), dropout=0.25
            ),
            "dropout_chunks": Shape(9, 32, (24,), ((0, 160), (0, 7)), dropout=0.5),
            "dropout_split_k": Shape(3, 391, (5,), ((0, 8),), dropout=0.1),
        }.items()
    },
}
