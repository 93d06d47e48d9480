"""Gradient norm, as in HeteroLoRA (arXiv 2406.14956 and its official code)."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from heterolora.search.scores.gradients import Batch, Reduce, branch_statistics, on_host

__all__ = ["grad_norm"]


def grad_norm(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """||dL/dA||_F + ||dL/dB||_F. At B = 0 the first term is zero, and the second is not.

    Raises:
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    squares = {
        name: (score.gram_a.trace(), score.gram_b.trace())
        for name, score in branch_statistics(model, batches, reduce).items()
    }
    return {name: math.sqrt(a) + math.sqrt(b) for name, (a, b) in on_host(squares).items()}
