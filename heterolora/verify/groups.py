"""Small groups that together hold every combination of branches the op has to get right."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from heterolora.kernels import Branch, Site

__all__ = ["GROUPS", "SEEDED", "Draw", "Group", "dropout_seed", "leaves", "named_leaves"]

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


# Those that draw their dropout masks from a seed, and so have to be called with one.
SEEDED: dict[str, Callable[[Draw], Group]] = {
    build.__name__: build for build in (seeded_dropout, seeded_shortcut)
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
