"""Statistics of a group's gradients by matmul: `spec.group_score` without keeping a gradient.

The gradients of one batch are products in the dtype of x, as in the backward pass; sums over
batches and the statistics are float32, or float64 where x is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .aten import _rows, _scaled_b_t
from .layout import GroupLayout
from .spec import BranchScore

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
        return BranchScore(
            gram_a=torch.mm(d_a, d_a.t()),
            gram_b=torch.mm(d_b.t(), d_b),
            abs_a=(a * d_a).abs().sum(dtype=d_a.dtype),
            abs_b=(b * d_b).abs().sum(dtype=d_b.dtype),
        )


def group_score(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: GroupLayout,
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
) -> list[Tensor]:
    """Statistics of the gradients of A and B of every branch.

    Args:
        grads: dY [..., n_i] for each site; None for an output that nothing depends on.
        sources, a, b, s, scales, layout: as `aten.group_linear_backward`.
        previous_a: [r_j, k_source] for each branch, what to add to dA; or empty.
        previous_b: [n_site, r_j] for each branch, what to add to dB; or empty.

    Returns:
        gram_a, gram_b, abs_a and abs_b of the first branch, then of the second, and so on.
    """
    dtype = statistics_dtype(s.dtype)
    ds = torch.empty_like(s)
    d_a = [a_j.new_zeros(a_j.shape, dtype=dtype) for a_j in a]
    d_b = [b_j.new_zeros(b_j.shape, dtype=dtype) for b_j in b]
    with torch.autocast(s.device.type, enabled=False):
        for grad, branches in zip(grads, layout.by_site, strict=True):
            for j in branches:
                columns = slice(*layout.branch[j])
                if grad is None:
                    ds[:, columns].zero_()
                    continue
                dy = _rows(grad)
                torch.mm(dy, _scaled_b_t(b[j], scales[j], s.dtype).t(), out=ds[:, columns])
                # As (S^T dY)^T, as in the backward pass.
                d_b[j] = torch.mm(s[:, columns].t(), dy).t().to(dtype) * scales[j]
        for source, branches, (start, stop) in zip(
            sources, layout.by_source, layout.source, strict=True
        ):
            if branches:
                stacked = torch.mm(ds[:, start:stop].t(), _rows(source)).to(dtype)
                for j in branches:
                    first, last = layout.branch[j]
                    d_a[j] = stacked[first - start : last - start]
    found = []
    for j in range(len(a)):
        if previous_a:
            d_a[j], d_b[j] = d_a[j] + previous_a[j], d_b[j] + previous_b[j]
        score = branch_score(a[j], b[j], d_a[j], d_b[j])
        found += [score.gram_a, score.gram_b, score.abs_a, score.abs_b]
    return found
