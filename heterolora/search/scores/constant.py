"""The control that every other proxy has to beat."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from heterolora.search.scores.gradients import Batch, Reduce, branch_factors

__all__ = ["constant"]


def constant(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """1 for every branch, so that sizes and the seed decide."""
    return dict.fromkeys(branch_factors(model), 1.0)
