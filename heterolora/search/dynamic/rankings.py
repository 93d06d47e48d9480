"""What a dynamic search reports: its decisions, and the parameters that they put to use."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ParameterCounts", "Ranking"]


@dataclass(frozen=True)
class ParameterCounts:
    """LoRA parameters (values in A and B, of shortcuts too), counted three ways.

    Attributes:
        enabled: in use now.
        ever_trained: in use during at least one optimizer step so far, this one's included.
        stored: in the adapter that `heterolora.search.save_enabled` writes now. PEFT's own
            `save_pretrained` writes the full rank of every module, zeros included.
    """

    enabled: int
    ever_trained: int
    stored: int


@dataclass(frozen=True)
class Ranking:
    """One decision.

    Attributes:
        step: optimizer steps done before it.
        proxy: what scored.
        scores: {name of a module or shortcut: score}, as the proxy gave them.
        ranks: {name of a module or shortcut: rank in use from then on}.
    """

    step: int
    proxy: str
    scores: dict[str, float]
    ranks: dict[str, int]
