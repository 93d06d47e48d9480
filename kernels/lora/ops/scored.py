"""The score op: a backward pass whose gradients of A and B become statistics instead of tensors.

It gives the other gradients as well, so that dS = s dY B, which dX and dA share, is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aten import linear as aten
from ..aten import score as aten_score
from ..group import Branch, Site
from ..spec import BranchScore
from .linear import _buckets, _flat, _gradients, _GroupLinear, _layout, _prepare, _saved

__all__ = ["Previous", "group_linear_scored"]

Previous = Sequence[tuple[Tensor | None, Tensor | None]]

_LIBRARY = torch.library.Library("heterolora", "FRAGMENT")
_LIBRARY.define(
    "group_score(Tensor?[] grads, Tensor[] sources, Tensor[] weights, Tensor[] a, Tensor[] b, "
    "Tensor s, float[] scales, int[] branch_site, int[] branch_source, float[] dropout, "
    "Tensor? seed, str implementation, bool[] needs, Tensor[] previous_a, Tensor[] previous_b) "
    "-> Tensor[]"
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
    branches = [
        replace(j, scale=float(j.scale)) if isinstance(j.scale, Tensor) else j for j in branches
    ]
    arguments = _prepare(x, sites, branches, seed, implementation)
    if not torch.is_grad_enabled():
        outputs, _ = torch.ops.heterolora.group_linear(*arguments)
        return outputs
    sums = _sums(previous, branches, arguments[0][0].dtype)
    task = _Task(record, select, _is_zero([j.b for j in branches], arguments[-1]), *sums)
    *outputs, _ = _ScoredGroupLinear.apply(task, *_flat(*arguments))
    return outputs


class _Task(NamedTuple):
    record: Callable[[list[BranchScore | None]], None]
    select: Callable[[], bool] | None
    b_is_zero: bool
    previous_a: list[Tensor]
    previous_b: list[Tensor]


def _is_zero(b: Sequence[Tensor], implementation: str) -> bool:
    """Whether every B is known to be zero, as in a fresh adapter: then only S and dB are not.

    A GPU is not asked, since the host would have to wait for its answer.
    """
    return implementation == "aten" and not any(
        factor.device.type != "cpu" or bool(factor.any()) for factor in b
    )


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
    def forward(  # type: ignore[override]
        ctx: Any, task: _Task, meta: tuple[Any, ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.task = task
        if not task.b_is_zero:
            return _GroupLinear.forward(ctx, meta, *tensors)
        # The branches add nothing: the base layers run without them, and S is kept to be measured.
        # dA is zero, so no source is kept, only its shape.
        q, p, t, (_, branch_site, branch_source, _, implementation) = meta
        bare: tuple[Any, ...] = (q, p, 0, ([], [], [], [], implementation))
        *outputs, _ = _GroupLinear.forward(ctx, bare, *tensors[: q + 2 * p], tensors[-1])
        sources: Any = tensors[:q]
        factors: Any = tensors[q + 2 * p : -1]
        layout = _layout(sources, factors[:t], branch_site, branch_source, p)
        s = aten._shrink(sources, factors[:t], layout)
        shapes = [source.new_zeros(()).expand(source.shape) for source in sources]
        ctx.meta = meta
        ctx.mark_non_differentiable(s)
        ctx.save_for_backward(*shapes, *tensors[q : q + p], *factors, s, tensors[-1])
        return (*outputs, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, p, t, _ = ctx.meta
        task: _Task = ctx.task
        saved = _saved(ctx)
        needed = ctx.needs_input_grad[2:]
        # The weights lie between the sources and the biases, and never get a gradient.
        needs = [*needed[:q], *needed[q + p : q + 2 * p]]
        if task.select is None or task.select():
            flat, scores = _measured(saved, ctx.meta, grads, needs, task)
            flat += [None] * (2 * t)
            task.record(scores)
        else:
            flat = _gradients(saved, ctx.meta, grads, [*needs, *needed[q + 2 * p : -1]])
        return (None, None, *flat[:q], *[None] * p, *flat[q:], None)


def _measured(
    saved: tuple[Any, ...],
    meta: tuple[Any, ...],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
    task: _Task,
) -> tuple[list[Tensor | None], list[BranchScore | None]]:
    """A gradient or None for each source and bias, and a score or None for each branch."""
    sources, weights, a, b, s, seed = saved
    _, p, _, (*lists, implementation) = meta
    _, branch_site, *_ = lists
    found = iter(
        torch.ops.heterolora.group_score(
            list(grads[:p]),
            sources,
            weights,
            a,
            [] if task.b_is_zero else b,
            s,
            *lists,
            seed,
            implementation,
            needs,
            task.previous_a,
            task.previous_b,
        )
    )
    flat = [next(found) if need else None for need in needs]
    scores = [BranchScore(*(next(found) for _ in range(4))) for _ in a]
    return flat, [
        None if grads[site] is None else score
        for site, score in zip(branch_site, scores, strict=True)
    ]


def _score(  # type: ignore[no-untyped-def]
    grads,
    sources,
    weights,
    a,
    b,
    s,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
    needs,
    previous_a,
    previous_b,
):
    previous = previous_a, previous_b
    if implementation == "triton":
        from ..gpu import passes as fused

        buckets = _buckets(a, branch_site, branch_source, dropout, len(grads))
        with fused.on_device(s):
            return fused.group_score(
                grads, sources, weights, a, b, s, scales, buckets, dropout, seed, needs, *previous
            )
    layout = _layout(sources, a, branch_site, branch_source, len(grads))
    return aten_score.group_score(
        grads, sources, weights, a, b, s, scales, layout, needs, *previous
    )


def _score_fake(  # type: ignore[no-untyped-def]
    grads,
    sources,
    weights,
    a,
    b,
    s,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
    needs,
    *previous,
):
    like = [source.new_empty(source.shape) for source in sources]
    like += [weight.new_empty(weight.shape[0]) for weight in weights]
    found = [grad for grad, need in zip(like, needs, strict=True) if need]
    dtype = aten_score.statistics_dtype(s.dtype)
    for factor in a:
        rank = factor.shape[0]
        found += [s.new_empty(shape, dtype=dtype) for shape in ((rank, rank), (rank, rank), (), ())]
    return found


_LIBRARY.impl("group_score", _score, "CompositeExplicitAutograd")
torch.library.register_fake("heterolora::group_score", _score_fake, lib=_LIBRARY)
