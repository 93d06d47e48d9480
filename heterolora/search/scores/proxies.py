"""Every proxy by its name. A new one is a file beside this one, and a line in `PROXIES`.

A proxy takes a model that already carries LoRA layers (one active adapter), and may carry
shortcuts, and batches with labels. It returns {name: score}, larger meaning more worth its
parameters, a LoRA branch going by its module's name in the base model, a shortcut by its own,
"<projection>:<kind>"; the spectral ones return `Gains`, which know what every rank is worth.
Gradients are summed over the batches, not averaged, in training mode, as in HeteroLoRA
(arXiv 2406.14956 and its official code). Modes and `.grad` are put back afterwards; what a
training-mode forward itself changes (BatchNorm statistics, RNG state) is not:
`heterolora.allocate` preserves that too.

With `reduce`, which adds up a list of tensors over processes in place, the sums are over the
batches of all of them. It is called at most once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from heterolora.errors import SearchSpaceError
from heterolora.search.scores.constant import constant
from heterolora.search.scores.grad_norm import grad_norm
from heterolora.search.scores.gradients import Batch, Reduce
from heterolora.search.scores.snip import snip
from heterolora.search.scores.spectral import spectral, spectral_sigma
from heterolora.search.scores.synflow import synflow, synflow_output

__all__ = ["PROXIES", "Proxy", "check_proxy"]


class _Score(Protocol):
    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
    ) -> dict[str, float]: ...


@dataclass(frozen=True)
class Proxy:
    """A way to score, and what it needs.

    Attributes:
        score: the function; calling the proxy calls it.
        nonzero_b: it is zero for every branch where every B is, so it scores a small random B.
        fused: it runs on fused layers; else on PEFT's own forward, which is sure to see tensors
            that are swapped by name for one pass.
        sketch: it sees the weight gradient through the probe adapter, the better the larger its
            rank.
    """

    score: _Score
    nonzero_b: bool = False
    fused: bool = True
    sketch: bool = False

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
    ) -> dict[str, float]:
        return self.score(model, batches, reduce=reduce)


PROXIES = {
    "constant": Proxy(constant),
    "grad-norm": Proxy(grad_norm),
    "snip": Proxy(snip, nonzero_b=True),
    "synflow": Proxy(synflow, nonzero_b=True, fused=False),
    "synflow-output": Proxy(synflow_output, nonzero_b=True, fused=False),
    "spectral": Proxy(spectral, sketch=True),
    "spectral-sigma": Proxy(spectral_sigma, sketch=True),
}


def check_proxy(name: str) -> None:
    """
    Raises:
        SearchSpaceError: there is no proxy of this name.
    """
    if name not in PROXIES:
        raise SearchSpaceError(f"unknown proxy {name!r}; choose one of {', '.join(PROXIES)}")
