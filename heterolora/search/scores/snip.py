"""SNIP (Lee, Ajanthan and Torr, arXiv 1810.02340) on the factors, as in HeteroLoRA (2406.14956)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from heterolora.search.scores.gradients import (
    Batch,
    Reduce,
    branch_statistics,
    require_nonzero_b,
    saliency,
)

__all__ = ["snip"]


def snip(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """sum|A * dL/dA| + sum|B * dL/dB|: the gradient of all-ones masks on A and B.

    Raises:
        DegenerateScoreError: every B is zero, where both terms vanish for every module
            (dL/dA = s B^T dL/dW, and B itself).
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    require_nonzero_b(model, "snip")
    return saliency(branch_statistics(model, batches, reduce))
