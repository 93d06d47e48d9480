"""A group's backward pass by matmul that measures dA and dB: `spec.group_score`.

The gradients of one batch are those of the backward pass, products in the dtype of x; sums over
batches and the statistics are float32, or float64 where x is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import GroupLayout, group_layout
from ..spec import BranchScore
from .linear import _rows, group_linear_backward

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
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: GroupLayout,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
) -> list[Tensor]:
    """Backward of a group that measures the gradients of A and B of every branch.

    Args:
        grads: dY [..., n_i] for each site; None for an output that nothing depends on.
        sources, weights, a, b, s, scales, layout: as `aten.group_linear_backward`; no b at all
            means that every B is zero, and then the branches add nothing to dX, and dA is zero.
        needs: one flag for each source, then each site's bias.
        previous_a: [r_j, k_source] for each branch, what to add to dA; or empty.
        previous_b: [n_site, r_j] for each branch, what to add to dB; or empty.

    Returns:
        The gradients whose flag is set, in that order; then gram_a, gram_b, abs_a and abs_b of the
        first branch, of the second, and so on.
    """
    dtype = statistics_dtype(s.dtype)
    with torch.autocast(s.device.type, enabled=False):
        find = _gradients if b else _gradients_at_zero
        found, d_a, d_b = find(grads, sources, weights, a, b, s, scales, layout, needs)
        for j, factor in enumerate(a):
            of_a, of_b = d_a[j], d_b[j]
            # What is zero as one column, which broadcasts.
            zero = s.new_zeros(len(factor), 1, dtype=dtype)
            of_a = zero if of_a is None else of_a
            of_b = zero.t() if of_b is None else of_b
            if previous_a:
                of_a, of_b = of_a + previous_a[j], of_b + previous_b[j]
            score = _branch_score(factor, b[j] if b else zero.t(), of_a, of_b)
            found += [score.gram_a, score.gram_b, score.abs_a, score.abs_b]
    return found


def _branch_score(a: Tensor, b: Tensor, d_a: Tensor, d_b: Tensor) -> BranchScore:
    return BranchScore(
        gram_a=torch.mm(d_a, d_a.t()),
        gram_b=torch.mm(d_b.t(), d_b),
        abs_a=torch.linalg.vector_norm(a * d_a, 1),
        abs_b=torch.linalg.vector_norm(b * d_b, 1),
    )


def _gradients(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: GroupLayout,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """Gradients of sources and biases, of every A, and of every B."""
    t, dtype = len(a), statistics_dtype(s.dtype)
    # Gradients come in the dtype of their factor, and these are not to be rounded.
    wide = [factor.to(dtype) for factor in (*a, *b)]
    flags = [*needs, *[True] * (2 * t)]
    found = group_linear_backward(
        grads, sources, weights, wide[:t], wide[t:], s, scales, layout, flags
    )
    others = len(found) - 2 * t
    return found[:others], [*found[others : others + t]], [*found[others + t :]]


def _gradients_at_zero(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: GroupLayout,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """The same where every B is zero; None for what is zero too."""
    dtype = statistics_dtype(s.dtype)
    bare = group_layout((), (), (), sites=len(grads), sources=len(sources))
    found = group_linear_backward(grads, sources, weights, (), (), s[:, :0], (), bare, needs)
    d_b: list[Tensor | None] = [None] * len(a)
    for grad, branches in zip(grads, layout.by_site, strict=True):
        if grad is None:
            continue
        dy = _rows(grad)
        for j in branches:
            # As (S^T dY)^T, as in the backward pass.
            d_b_t = torch.mm(s[:, slice(*layout.branch[j])].t(), dy)
            d_b[j] = d_b_t[: a[j].shape[0]].to(dtype).t() * scales[j]
    return found, [None] * len(a), d_b
