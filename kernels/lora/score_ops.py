"""The score op: a backward pass whose gradients of A and B become statistics instead of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten_score
from .layout import Branch, Site
from .ops import _buckets, _flat, _gradients, _GroupLinear, _layout, _prepare, _saved
from .spec import BranchScore

__all__ = ["Previous", "group_linear_scored"]

Previous = Sequence[tuple[Tensor | None, Tensor | None]]

_LIBRARY = torch.library.Library("heterolora", "FRAGMENT")
_LIBRARY.define(
    "group_score(Tensor?[] grads, Tensor[] sources, Tensor[] a, Tensor[] b, Tensor s, "
    "float[] scales, int[] branch_site, int[] branch_source, float[] dropout, Tensor? seed, "
    "str implementation, Tensor[] previous_a, Tensor[] previous_b) -> Tensor[]"
)


def group_linear_scored(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    record: Callable[[list[BranchScore | None]], None],
    *,
    previous: Previous | None = None,
    select: Callable[[], bool] | None = None,
    seed: Tensor | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """As :func:`group_linear`, but A and B get statistics of their gradients, and no gradients.

    The backward pass of the outputs gives x, the sources and the biases their usual gradients and
    calls `record` once; `spec.group_score` is the meaning of what it passes. Nothing is recorded
    without a backward pass through this call, so at least one of x, the sources, A and B has to
    require a gradient. Not for code that `torch.compile` traces.

    Args:
        x, sites, branches, seed, implementation: as `group_linear`; a scale that is a tensor is
            read to the host.
        record: called in the backward pass with one score for each branch, or None where nothing
            depends on the output that the branch adds to. The tensors are float32, or float64
            where x is.
        previous: for each branch the sums of dA [r, k_source] and dB [n, r] over earlier batches,
            which are added before the statistics; None for a sum of zero.
        select: asked in the backward pass, when it is known what else used A and B in the forward
            pass. False means: write gradients of A and B as `group_linear` does, record nothing.

    Returns:
        [..., n_i] for each site, in the dtype of x.

    Raises:
        ValueError: as `group_linear`; `previous` does not fit the branches; a scale that requires
            a gradient.
    """
    if any(isinstance(j.scale, Tensor) and j.scale.requires_grad for j in branches):
        raise ValueError("a scale that requires a gradient cannot be scored; detach it")
    branches = [replace(branch, scale=float(branch.scale)) for branch in branches]
    arguments = _prepare(x, sites, branches, seed, implementation)
    if not torch.is_grad_enabled():
        outputs, _ = torch.ops.heterolora.group_linear(*arguments)
        return outputs
    task = _Task(record, select, *_sums(previous, branches, arguments[0][0].dtype))
    *outputs, _ = _ScoredGroupLinear.apply(task, *_flat(*arguments))
    return outputs


class _Task(NamedTuple):
    record: Callable[[list[BranchScore | None]], None]
    select: Callable[[], bool] | None
    previous_a: list[Tensor]
    previous_b: list[Tensor]


def _sums(
    previous: Previous | None, branches: Sequence[Branch], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """`previous` as the op takes it: no lists at all, or a tensor for every branch."""
    if previous is None:
        return [], []
    if len(previous) != len(branches):
        raise ValueError(f"previous holds {len(previous)} pairs for {len(branches)} branches")
    if all(total is None for pair in previous for total in pair):
        return [], []
    sums: tuple[list[Tensor], list[Tensor]] = ([], [])
    for j, (branch, pair) in enumerate(zip(branches, previous, strict=True)):
        for found, total, factor in zip(sums, pair, (branch.a, branch.b), strict=True):
            if total is None:
                total = torch.zeros_like(factor, requires_grad=False)
            if total.shape != factor.shape:
                raise ValueError(
                    f"branch {j}: a previous sum is {tuple(total.shape)}, its factor "
                    f"{tuple(factor.shape)}"
                )
            found.append(total.detach().to(aten_score.statistics_dtype(dtype)))
    return sums


class _ScoredGroupLinear(_GroupLinear):
    """The same forward pass; backward hands A's and B's share to the score op."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *flat: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.task = task
        return _GroupLinear.forward(ctx, *flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, p, _, _ = ctx.meta
        task: _Task = ctx.task
        saved = _saved(ctx)
        scored = task.select is None or task.select()
        needed = ctx.needs_input_grad[2:]
        of_factors = [need and not scored for need in needed[q + 2 * p : -1]]
        needs = [*needed[:q], *needed[q + p : q + 2 * p], *of_factors]
        flat: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            flat = _gradients(saved, ctx.meta, grads, needs)
        if scored:
            task.record(_scores(saved, ctx.meta, grads, task))
        return (None, None, *flat[:q], *[None] * p, *flat[q:], None)


def _scores(
    saved: tuple[Any, ...], meta: tuple[Any, ...], grads: Sequence[Tensor | None], task: _Task
) -> list[BranchScore | None]:
    sources, _, a, b, s, seed = saved
    _, p, _, (*lists, implementation) = meta
    previous = task.previous_a, task.previous_b
    found = torch.ops.heterolora.group_score(
        list(grads[:p]), sources, a, b, s, *lists, seed, implementation, *previous
    )
    _, branch_site, *_ = lists
    return [
        None if grads[site] is None else BranchScore(*found[4 * j : 4 * j + 4])
        for j, site in enumerate(branch_site)
    ]


def _score(  # type: ignore[no-untyped-def]
    grads,
    sources,
    a,
    b,
    s,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
    previous_a,
    previous_b,
):
    if implementation == "triton":
        from . import fused

        buckets = _buckets(a, branch_site, branch_source, dropout, len(grads))
        with fused.on_device(s):
            return fused.group_score(
                grads, sources, a, b, s, scales, buckets, dropout, seed, previous_a, previous_b
            )
    layout = _layout(a, branch_site, branch_source, len(grads), len(sources))
    return aten_score.group_score(grads, sources, a, b, s, scales, layout, previous_a, previous_b)


def _score_fake(  # type: ignore[no-untyped-def]
    grads,
    sources,
    a,
    b,
    s,
    *options,
):
    dtype = aten_score.statistics_dtype(s.dtype)
    found = []
    for factor in a:
        rank = factor.shape[0]
        found += [s.new_empty(shape, dtype=dtype) for shape in ((rank, rank), (rank, rank), (), ())]
    return found


_LIBRARY.impl("group_score", _score, "CompositeExplicitAutograd")
torch.library.register_fake("heterolora::group_score", _score_fake, lib=_LIBRARY)
