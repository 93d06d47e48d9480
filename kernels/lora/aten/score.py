"""A group's backward pass by matmul that measures dA and dB: `spec.group_score`.

The gradients of one batch are those of the backward pass, products in the dtype of x; sums over
batches and the statistics are float32, or float64 where x is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import Call, as_matrix, split
from ..spec import BranchScore
from .linear import group_linear_backward, layout_of

__all__ = ["branch_score", "group_score", "statistics_dtype"]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradient sums and statistics for an x of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def branch_score(a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor) -> BranchScore:
    """The statistics of gradients that exist, in their dtype.

    Args:
        a, d_a: [r, k].
        b, d_b: [n, r].
        d_a, d_b: both float32 or both float64.
    """
    # The casts to a lower precision that a surrounding autocast would make are not wanted here.
    with torch.autocast(d_a.device.type, enabled=False):
        return _branch_score(a, b, d_a, d_b)


def group_score(
    call: Call,
    grads: Sequence[Tensor | None],
    s: Tensor,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
) -> list[Tensor]:
    """Backward of a group that measures the gradients of A and B of every branch.

    Args:
        call: as `group_linear_backward` takes it. No b at all means that every B is zero: then the
            branches add nothing to dX, and dA is zero.
        grads: dY [..., n_i] for each site; None for an output that nothing depends on.
        s: [m, columns] as the forward pass returned it.
        needs: one flag for each source, then each site's bias.
        previous_a: [r_j, k_source] for each branch, what to add to dA; or empty.
        previous_b: [n_site, r_j] for each branch, what to add to dB; or empty.

    Returns:
        The gradients whose flag is set, in that order; then gram_a, gram_b, abs_a and abs_b of the
        first branch, of the second, and so on.
    """
    gradients = _gradients if call.b else _gradients_at_zero
    results, d_a, d_b = gradients(call, grads, s, needs)
    for j, a in enumerate(call.a):
        # What is zero as one column, which broadcasts.
        zero = s.new_zeros(len(a), 1, dtype=statistics_dtype(s.dtype))
        of_a, of_b = d_a[j], d_b[j]
        of_a = zero if of_a is None else of_a
        of_b = zero.t() if of_b is None else of_b
        if previous_a:
            of_a, of_b = of_a + previous_a[j], of_b + previous_b[j]
        score = _branch_score(a, call.b[j] if call.b else zero.t(), of_a, of_b)
        results += [score.gram_a, score.gram_b, score.abs_a, score.abs_b]
    return results


def _branch_score(a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor) -> BranchScore:
    return BranchScore(
        gram_a=torch.mm(d_a, d_a.t()),
        gram_b=torch.mm(d_b.t(), d_b),
        abs_a=torch.linalg.vector_norm(a * d_a, 1),
        abs_b=torch.linalg.vector_norm(b * d_b, 1),
    )


_Gradients = tuple[list[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]


def _gradients(
    call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool]
) -> _Gradients:
    """Gradients of sources and biases, of every A, and of every B."""
    t, dtype = len(call.a), statistics_dtype(s.dtype)
    # Gradients come in the dtype of their factor, and these are not to be rounded.
    wide = call._replace(a=[a.to(dtype) for a in call.a], b=[b.to(dtype) for b in call.b])
    results = group_linear_backward(wide, grads, s, [*needs, *[True] * (2 * t)])
    others, d_a, d_b = split(results, len(results) - 2 * t, t, t)
    return list(others), d_a, d_b


def _gradients_at_zero(
    call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool]
) -> _Gradients:
    """The gradients that :func:`_gradients` gives where every B is zero; None for a zero one."""
    results = group_linear_backward(call.without_branches(), grads, s[:, :0], needs)
    layout, dtype = layout_of(call, len(grads)), statistics_dtype(s.dtype)
    d_b: list[Tensor | None] = [None] * len(call.a)
    for grad, branches in zip(grads, layout.by_site, strict=True):
        if grad is None:
            continue
        dy = as_matrix(grad)
        for j in branches:
            # As (S^T dY)^T, as in the backward pass.
            d_b_t = torch.mm(s[:, slice(*layout.branch[j])].t(), dy)
            d_b[j] = d_b_t[: call.a[j].shape[0]].to(dtype).t() * call.scales[j]
    return results, [None] * len(call.a), d_b
