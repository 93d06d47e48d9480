"""The score op: a backward pass whose gradients of A and B become statistics instead of tensors.

It gives the other gradients as well, so that dS = s dY B, which dX and dA share, is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..aten.linear import layout_of, shrink
from ..aten.score import statistics_dtype
from ..group import Branch, Call, Site
from ..spec import BranchScore
from .autograd import (
    Form,
    GroupFunction,
    flatten,
    gradients,
    keep,
    refuse_second_derivative,
    saved,
)
from .call import group_call
from .registry import OPERANDS, backend, below_autograd, register, without_autocast

__all__ = ["Previous", "group_linear_scored"]

Previous = Sequence[tuple[Tensor | None, Tensor | None]]


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
    """Apply a group like :func:`group_linear`; A and B get statistics instead of their gradients.

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
    call = group_call(x, sites, branches, seed, implementation)
    if not torch.is_grad_enabled():
        outputs, _ = torch.ops.heterolora.group_linear(*call)
        return outputs
    b_is_zero = _is_zero([branch.b for branch in branches], call.implementation)
    task = _Task(record, select, b_is_zero, *_sums(previous, branches, call.sources[0].dtype))
    *outputs, _ = _ScoredFunction.apply(task, *flatten(call))
    return outputs


class _Task(NamedTuple):
    """What the backward pass of a scored call is to do.

    Attributes:
        record, select: of `group_linear_scored`.
        b_is_zero: whether every B was known to be zero in the forward pass.
        previous_a, previous_b: a sum for each branch, or none at all.
    """

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
        for some, total, factor in zip(sums, pair, (branch.a, branch.b), strict=True):
            if total is None:
                total = torch.zeros_like(factor, requires_grad=False)
            if total.shape != factor.shape:
                raise ValueError(
                    f"branch {j}: a previous sum is {tuple(total.shape)}, its factor "
                    f"{tuple(factor.shape)}"
                )
            some.append(total.detach().to(statistics_dtype(dtype)))
    return sums


class _ScoredFunction(torch.autograd.Function):
    """The forward pass of `group_linear`, and a backward pass that measures A's and B's share."""

    @staticmethod
    def forward(ctx: Any, task: _Task, form: Form, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.task = task
        if not task.b_is_zero:
            return GroupFunction.forward(ctx, form, *tensors)
        # The branches add nothing: the base layers run without them, and S is kept to be measured.
        # dA is zero, so no source is kept, only its shape.
        _, call = form.unflatten(tensors)
        with below_autograd():
            outputs, _ = torch.ops.heterolora.group_linear(*call.without_branches())
        s = shrink(call, layout_of(call, form.weights))
        shapes = [source.new_zeros(()).expand(source.shape) for source in call.sources]
        keep(ctx, form, call._replace(sources=shapes), s)
        return (*outputs, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative("group_linear")
        form: Form = ctx.form
        task: _Task = ctx.task
        call, s = saved(ctx)
        needs = form.needs(ctx.needs_input_grad[2:])
        factors = 2 * form.branches
        if task.select is None or task.select():
            flat, scores = _measured(call, grads[:-1], s, needs[: len(needs) - factors], task)
            flat += [None] * factors
            task.record(scores)
        else:
            flat = gradients(call, grads[:-1], s, needs)
        return None, None, *form.spread(grads, flat)


def _measured(
    call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool], task: _Task
) -> tuple[list[Tensor | None], list[BranchScore | None]]:
    """A gradient or None for each source and bias, and a score or None for each branch."""
    given = call._replace(b=()) if task.b_is_zero else call
    results = iter(
        torch.ops.heterolora.group_score(grads, s, needs, task.previous_a, task.previous_b, *given)
    )
    flat = [next(results) if need else None for need in needs]
    scores = [BranchScore(*(next(results) for _ in range(4))) for _ in call.a]
    return flat, [
        None if grads[site] is None else score
        for site, score in zip(call.branch_site, scores, strict=True)
    ]


def _score(
    grads: list[Tensor | None],
    s: Tensor,
    needs: list[bool],
    previous_a: list[Tensor],
    previous_b: list[Tensor],
    *operands: Any,
) -> list[Tensor]:
    call = Call(*operands)
    with without_autocast(s):
        return backend(call).group_score(call, grads, s, needs, previous_a, previous_b)


def _score_fake(
    grads: list[Tensor | None],
    s: Tensor,
    needs: list[bool],
    previous_a: list[Tensor],
    previous_b: list[Tensor],
    *operands: Any,
) -> list[Tensor]:
    call = Call(*operands)
    like = [source.new_empty(source.shape) for source in call.sources]
    like += [weight.new_empty(weight.shape[0]) for weight in call.weights]
    results = [grad for grad, need in zip(like, needs, strict=True) if need]
    for rank in call.ranks:
        for shape in ((rank, rank), (rank, rank), (), ()):
            results.append(s.new_empty(shape, dtype=statistics_dtype(s.dtype)))
    return results


register(
    "group_score(Tensor?[] grads, Tensor s, bool[] needs, Tensor[] previous_a, "
    f"Tensor[] previous_b, {OPERANDS}) -> Tensor[]",
    _score,
    _score_fake,
)
