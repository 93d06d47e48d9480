"""A backward pass whose LoRA gradients the score op measures instead of writing them.

A `Scorer` is the `Fusion.runner` of a pass: the layers of a fused model hand it their calls.
What it cannot measure alone (a declined layer, one that is called twice in a pass, tied factors)
gets its gradients as usual, and the same statistics are taken of those.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from heterolora.fusion.fuse import fuse, fusion_of, unfuse
from heterolora.kernels import Branch, Site, group_linear_scored
from heterolora.kernels.aten.score import branch_score, statistics_dtype
from heterolora.kernels.spec import BranchScore

if TYPE_CHECKING:
    from heterolora.fusion.fused_model import Fusion

__all__ = ["Factors", "Scorer", "fused", "measured", "with_last"]

Factors = Mapping[str, tuple[Tensor, Tensor]]
T = TypeVar("T")


class Scorer:
    """The statistics of one backward pass, whose forward pass it runs (`fusion.interface.Runner`).

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
        """Count a layer's calls; checkpointing repeats them in backward, which does not count."""
        if self._in_forward:
            self._calls[name] += 1

    def run(
        self,
        names: Sequence[str],
        x: Tensor,
        sites: Sequence[Site],
        branches: Sequence[Branch],
        **options: Any,
    ) -> list[Tensor]:
        """The outputs of `group_linear`, whose backward pass measures instead of writing."""
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
        """Run the backward pass of the one forward pass that this scorer has run."""
        self._in_forward = False
        loss.backward()

    def scores(self) -> dict[str, BranchScore]:
        """The statistics of every layer, after :meth:`backward`; zeros where no gradient came."""
        return {
            name: self._scores[name] if name in self._scores else measured(*pair)
            for name, pair in self._factors.items()
        }

    def _select(self, names: Sequence[str], branches: Sequence[Branch]) -> bool:
        """Whether this call alone makes the gradients of these layers, as nothing changes them."""
        return all(
            self._calls[name] <= 1
            and name not in self._tied
            and _is_plain(branch.a)
            and _is_plain(branch.b)
            for name, branch in zip(names, branches, strict=True)
        )

    def _record(self, names: Sequence[str], scores: Sequence[BranchScore | None]) -> None:
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
    """The model's own fusion, or one for the duration; without a runner afterwards."""
    own = fusion_of(model) is not None
    if not own:
        fuse(model)
    fusion = fusion_of(model)
    assert fusion is not None
    try:
        yield fusion
    finally:
        fusion.runner = None
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
