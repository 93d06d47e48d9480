"""Saliency proxies: one number per low-rank branch, larger meaning more worth its parameters.

Every proxy takes a model that already carries LoRA layers (one active adapter), and may carry
shortcuts, and batches with labels. It returns {name: score}, a LoRA branch going by its module's
name in the base model, a shortcut by its own, "<projection>:<kind>"; the spectral ones return
`Gains`, which know what every rank is worth. Gradients are summed over the batches, not averaged,
in training mode, as in HeteroLoRA (arXiv 2406.14956 and its official code). Modes and `.grad` are
put back afterwards; what a training-mode forward itself changes (BatchNorm statistics, RNG state)
is not: `heterolora.allocate` preserves that too.

With `reduce`, which adds up a list of tensors over processes in place, the sums are over the
batches of all of them. It is called at most once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from torch import nn

from heterolora.search.scores.gradients import (
    Batch,
    Reduce,
    batch_loss,
    branch_factors,
    branch_statistics,
    model_device,
    on_host,
    require_nonzero_b,
    saliency,
)
from heterolora.search.scores.spectral import spectral, spectral_sigma
from heterolora.search.scores.synflow import synflow, synflow_output

__all__ = [
    "NEEDS_NONZERO_B",
    "PROXIES",
    "SKETCHES",
    "UNFUSED",
    "Batch",
    "Proxy",
    "Reduce",
    "batch_loss",
    "branch_factors",
    "constant",
    "grad_norm",
    "model_device",
    "snip",
    "spectral",
    "spectral_sigma",
    "synflow",
    "synflow_output",
]


class Proxy(Protocol):
    """A function of this module that scores."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
    ) -> dict[str, float]: ...


def constant(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """1 for every branch, so sizes and the seed decide: the control every other proxy must beat."""
    return dict.fromkeys(branch_factors(model), 1.0)


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


PROXIES: dict[str, Proxy] = {
    "constant": constant,
    "grad-norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
    "synflow-output": synflow_output,
    "spectral": spectral,
    "spectral-sigma": spectral_sigma,
}

# Zero for every branch where every B is.
NEEDS_NONZERO_B = frozenset({"snip", "synflow", "synflow-output"})
# These swap tensors by name for one pass, which only PEFT's own forward is sure to see.
UNFUSED = frozenset({"synflow", "synflow-output"})
# These see the weight gradient through the probe adapter, the better the larger its rank.
SKETCHES = frozenset({"spectral", "spectral-sigma"})
