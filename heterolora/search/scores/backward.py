"""A backward pass whose LoRA gradients the score op measures instead of writing them.

The layers of a fused model hand their calls to the `Scorer` while it stands at `Fusion.scorer`.
What it cannot measure alone (a declined layer, one that is called twice in a pass, tied factors)
gets its gradients as usual, and the same statistics are taken of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from heterolora.fusion.fuse import fuse, unfuse
from heterolora.kernels import Branch, Site, group_linear_scored
from heterolora.kernels.aten.score import branch_score, statistics_dtype
from heterolora.kernels.spec import BranchScore

if TYPE_CHECKING:
    from heterolora.fusion.binding import Fusion

__all__ = ["Factors", "Scorer", "fused", "measured", "with_last"]

Factors = Mapping[str, tuple[Tensor, Tensor]]
T = TypeVar("T")


class Scorer:
    """The statistics of one backward pass, whose forward pass it accompanies.

    Args:
        factors: (A [r, in], B [out, r]) by the branch's name; their `.grad` holds the sums of
            earlier batches, which the statistics include.
    """

    def __init__(self, factors: Factors) -> None:
        self._factors = factors
        owners = Counter(id(factor) for pair in factors.values() for factor in pair)
        self._tied = {n for n, pair in factors.items() if any(owners[id(f)] > 1 for f in pair)}
        self._calls: Counter[str] = Counter()
        self._in_forward = True
        self._scores: dict[str, BranchScore] = {}

    def called(self, name: str) -> None:
        """Counts a layer's calls. Checkpointing repeats them in backward, which does not count."""
        if self._in_forward:
            self._calls[name] += 1

    def run(
        self,
        names: list[str],
        x: Tensor,
        sites: list[Site],
        branches: list[Branch],
        **options: Any,
    ) -> list[Tensor]:
        """`group_linear` of these branches, with its options."""
        return group_linear_scored(
            x,
            sites,
            branches,
            partial(self._record, names),
            previous=[(_sum_so_far(branch.a), _sum_so_far(branch.b)) for branch in branches],
            select=partial(self._select, names, branches),
            **options,
        )

    def backward(self, loss: Tensor) -> None:
        """The backward pass of the one forward pass that this scorer has seen."""
        self._in_forward = False
        loss.backward()

    def scores(self) -> dict[str, BranchScore]:
        """The statistics of every layer, after :meth:`backward`; zeros where no gradient came."""
        return {
            name: self._scores[name] if name in self._scores else measured(*pair)
            for name, pair in self._factors.items()
        }

    def _select(self, names: list[str], branches: list[Branch]) -> bool:
        """Whether this call alone makes the gradients of these layers, as nothing changes them."""
        return all(
            self._calls[name] <= 1
            and name not in self._tied
            and _is_plain(branch.a)
            and _is_plain(branch.b)
            for name, branch in zip(names, branches, strict=True)
        )

    def _record(self, names: list[str], scores: list[BranchScore | None]) -> None:
        for name, score in zip(names, scores, strict=True):
            if score is not None:
                self._scores[name] = score


def measured(a: Tensor, b: Tensor) -> BranchScore:
    """The statistics of `a.grad` [r, in] and `b.grad` [out, r]; of zeros where there is none."""
    gradients = []
    for factor in (a, b):
        gradient = _sum_so_far(factor)
        if gradient is None:
            gradient = torch.zeros_like(factor, requires_grad=False)
        gradients.append(gradient.to(statistics_dtype(gradient.dtype)))
    return branch_score(a.detach(), b.detach(), *gradients)


@contextmanager
def fused(model: nn.Module) -> Iterator[Fusion]:
    """The model's own fusion, or one for the duration."""
    own = "_heterolora" in model.__dict__
    if not own:
        fuse(model)
    fusion = model.__dict__["_heterolora"]
    try:
        yield fusion
    finally:
        fusion.scorer = None
        if not own:
            unfuse(model)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one; reads one ahead."""
    iterator = iter(items)
    try:
        item = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield item, False
        item = following
    yield item, True


def _is_plain(factor: Tensor) -> bool:
    """Whether the gradient would arrive in `.grad` unchanged."""
    hooks = factor._backward_hooks or getattr(factor, "_post_accumulate_grad_hooks", None)
    return factor.requires_grad and factor.is_leaf and not hooks


def _sum_so_far(factor: Tensor) -> Tensor | None:
    return factor.grad if factor.is_leaf else None
