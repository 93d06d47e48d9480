"""What an arm is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heterolora.fusion.fuse import unfuse
from heterolora.search import Allocation, Budget, SearchSpace, adapt, allocate

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["SCALING", "Adapted", "Setting", "adapter_parameters", "onto", "searched"]

# alpha / r of every adapter.
SCALING = 2.0


@dataclass(frozen=True)
class Setting:
    """What an arm may use.

    Attributes:
        model: fresh, without an adapter; the arm may change it.
        rank: the budget, as the parameters of uniform LoRA of that rank on all candidates.
        seed: of everything random.
        steps: optimizer steps of the training to come.
        space: the candidates, and the ranks that an allocation chooses from.
        scoring_batches: how many batches a search sees.
        bf16: whether training, and so the search, runs under bf16 autocast.
        draw: see `batches`.
    """

    model: Any
    rank: int
    seed: int
    steps: int
    space: SearchSpace
    scoring_batches: int
    bf16: bool
    draw: Callable[[int], list[dict[str, Any]]]

    def batches(self, count: int | None = None) -> list[dict[str, Any]]:
        """`count` (by default `scoring_batches`) batches of training rows, the same every time."""
        return self.draw(self.scoring_batches if count is None else count)


@dataclass
class Adapted:
    """A model that is ready to train.

    Attributes:
        model: a PeftModel, not fused.
        ranks: {name of a module or shortcut: rank} at the start.
        fused: train it through `FuseCallback`.
        head_only: in full only the head is trained that PEFT trains by itself, and not what the
            task names beside it.
        share: of the run's epochs, so many are trained; the learning rate still falls to 0.
        callbacks: further callbacks of the Trainer.
        search_seconds: wall time of the search before training.
        notes: what else the result file should say.
        facts: asked after training, for "ranks" and "parameters" (enabled, ever_trained, stored)
            where they changed on the way, and anything else.
    """

    model: Any
    ranks: dict[str, int]
    fused: bool = True
    head_only: bool = False
    share: float = 1.0
    callbacks: list[TrainerCallback] = field(default_factory=list)
    search_seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)
    facts: Callable[[], dict[str, Any]] = dict


def onto(setting: Setting, allocation: Allocation) -> Adapted:
    """The setting's model with the ranks of an allocation."""
    model = adapt(setting.model, allocation)
    # Trainer's callback fuses it, and finds the groups with a batch of the training rows.
    unfuse(model)
    ranks = {**allocation.ranks, **allocation.shortcuts}
    notes: dict[str, Any] = {}
    if allocation.probe_rank is not None:
        notes["scores"] = dict(allocation.scores)
    return Adapted(model, ranks, search_seconds=allocation.seconds, notes=notes)


def searched(
    setting: Setting,
    proxy: str,
    ranks: Sequence[int] | None,
    budget: Budget,
    **options: Any,
) -> Allocation:
    """What `heterolora.allocate` finds on the setting's batches, under its autocast.

    Args:
        ranks: to choose from; None for those of the setting's space.
        options: as of `allocate`.
    """
    space = setting.space if ranks is None else replace(setting.space, ranks=tuple(ranks))
    device = next(setting.model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=setting.bf16):
        return allocate(
            setting.model,
            setting.batches(),
            budget=budget,
            proxy=proxy,
            space=space,
            seed=setting.seed,
            **options,
        )


def adapter_parameters(model: nn.Module) -> int:
    """Values in the trainable factors of LoRA, AdaLoRA and shortcuts."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (".lora_" in name or "low_rank_shortcuts." in name)
    )
