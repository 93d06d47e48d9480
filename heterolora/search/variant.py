"""Variants of the static search: what is trained before scoring, and how scores compete."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from heterolora.checked import is_integer, is_number
from heterolora.errors import SearchSpaceError
from heterolora.search.gains import averaged
from heterolora.search.scores.gradients import Batch, batch_loss, branch_factors, training_mode
from heterolora.search.scores.probe import Feed, tracked
from heterolora.search.scores.proxies import PROXIES
from heterolora.search.sites import head_modules

__all__ = ["SCORINGS", "Training", "Variant", "own_heads", "scored", "warmed_heads"]

# How often scores are taken over `train_steps`: each time costs a pass over the scoring batches.
SCORINGS = 4


@dataclass(frozen=True)
class Variant:
    """What a static search does beside running its proxy; by default nothing.

    Training is by AdamW without weight decay at a constant rate, on the scoring batches in turn,
    by the model's own loss. It is undone after the search.

    Attributes:
        head_steps: train the model's task head for so many steps before anything else. At
            initialisation gradients come through a head that has learned nothing.
        train_steps: then train the probe adapter, and the head, for so many steps, and take the
            mean of the scores after each quarter of them.
        lr: learning rate of both.
        floor: every candidate gets at least this rank. Smaller ranks are not offered.
        by_layer: every layer's scores count for the same total; a layer is the part of a name up to
            its first number, which is a stage of a Swin or Segformer.
        shuffle: deal the scores out anew among candidates of equal size: a control.

    Raises:
        SearchSpaceError: a field is malformed.
    """

    head_steps: int = 0
    train_steps: int = 0
    lr: float = 1e-3
    floor: int = 0
    by_layer: bool = False
    shuffle: bool = False

    def __post_init__(self) -> None:
        for key in ("head_steps", "train_steps", "floor"):
            value = getattr(self, key)
            if not is_integer(value):
                raise SearchSpaceError(f"{key}={value!r}: expected a whole number, 0 or more")
        for key in ("by_layer", "shuffle"):
            if not isinstance(getattr(self, key), bool):
                raise SearchSpaceError(f"{key}={getattr(self, key)!r}: expected True or False")
        if not is_number(self.lr) or self.lr <= 0:
            raise SearchSpaceError(f"lr={self.lr!r}: expected a positive number")

    def offered(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Those of `ranks` that a candidate may get.

        Raises:
            SearchSpaceError: none of them reaches the floor.
        """
        found = tuple(rank for rank in ranks if rank >= self.floor)
        if not found:
            raise SearchSpaceError(
                f"floor={self.floor} is above the largest rank to choose from ({ranks[-1]})"
            )
        return found


def own_heads(model: nn.Module) -> list[nn.Parameter]:
    """Give the model's task heads copies of their parameters, which may be trained, and return
    them; none where the model has no head that is trained in full.
    `heterolora.search.preserve.preserved` puts the originals back.
    """
    copies: dict[int, nn.Parameter] = {}
    for module in (part for head in head_modules(model) for part in head.modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            setattr(module, name, copies[id(parameter)])
    return list(copies.values())


class Training:
    """AdamW on `parameters`, and nothing else of the model, with a batch for each step, in turn.

    In float32 for parameters of 16 bits, in which AdamW's second moments and its eps may be 0.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        batches: Sequence[Batch],
        lr: float,
    ) -> None:
        self._model = model
        self._batches = batches
        self._parameters = list(parameters)
        self._wide = [p if p.itemsize > 2 else nn.Parameter(p.detach().float()) for p in parameters]
        self._optimizer = torch.optim.AdamW(self._wide, lr=lr, weight_decay=0.0)
        self._done = 0
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    def run(self, steps: int, label: str) -> None:
        """So many further steps.

        Raises:
            DataError, ModelError, ScoreError: as `batch_loss`.
        """
        with training_mode(self._model), tracked(range(steps), steps, label) as numbers:
            for _ in numbers:
                index = self._done % len(self._batches)
                batch_loss(self._model, self._batches[index], index).backward()
                self._step()
                self._done += 1

    @torch.no_grad()
    def _step(self) -> None:
        pairs = zip(self._parameters, self._wide, strict=True)
        narrow = [(parameter, wide) for parameter, wide in pairs if wide is not parameter]
        for parameter, wide in narrow:
            wide.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        for parameter, wide in narrow:
            parameter.copy_(wide)


def warmed_heads(model: nn.Module, feed: Feed, variant: Variant) -> list[nn.Parameter]:
    """The parameters of `own_heads` after `variant.head_steps`, or none where nothing trains.

    Raises:
        SearchSpaceError: head steps, and the model has no head.
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    if not variant.head_steps and not variant.train_steps:
        return []
    heads = own_heads(model)
    if variant.head_steps:
        if not heads:
            raise SearchSpaceError(
                f"{type(model).__name__} has no task head that is trained in full, so head_steps "
                "has nothing to train; leave it out"
            )
        training = Training(model, heads, feed.keep(), variant.lr)
        training.run(variant.head_steps, "training the head")
    return heads


def scored(
    probe: nn.Module, proxy: str, feed: Feed, heads: Sequence[nn.Parameter], variant: Variant
) -> dict[str, float]:
    """The scores of all batches by `proxy`; over `variant.train_steps` of training, their mean.

    Raises:
        HeteroLoraError: as the proxy.
    """

    def measure() -> dict[str, float]:
        with feed.progress(f"scoring ({proxy})") as stream:
            return PROXIES[proxy](probe, stream)

    if not variant.train_steps:
        return measure()
    factors = [factor for pair in branch_factors(probe).values() for factor in pair]
    training = Training(probe, [*heads, *factors], feed.keep(), variant.lr)
    parts = min(SCORINGS, variant.train_steps)
    ends = [variant.train_steps * (part + 1) // parts for part in range(parts)]
    measured = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        training.run(end - start, "training the probe adapter")
        measured.append(measure())
    return averaged(measured)
