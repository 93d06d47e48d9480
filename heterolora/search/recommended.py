"""What to score with and how, where the user does not say."""

from __future__ import annotations

from typing import TypedDict

from torch import nn

from heterolora.search.budget import Budget
from heterolora.search.space import SearchSpace
from heterolora.search.variant import Variant
from heterolora.sites import find_sites, head_modules

__all__ = ["Recommended", "recommended"]

_HEAD_STEPS = 70


class Recommended(TypedDict):
    """Arguments of `heterolora.allocate`."""

    proxy: str
    variant: Variant


def recommended(model: nn.Module, budget: Budget, space: SearchSpace | None = None) -> Recommended:
    """The proxy and variant that docs/evidence.md found no worse than uniform ranks:
    ``allocate(model, batches, budget=budget, **recommended(model, budget))``.

    Spectral gain; after 70 steps of the task head, where the model has one that is trained in full;
    and rank 1 at least for every module, where the budget is of parameters for modules alone and
    pays for rank 2 everywhere. Below that a floor would leave little or nothing to allocate.

    Args:
        model, budget, space: as of `heterolora.allocate`.

    Raises:
        ModelError, SearchSpaceError: as `heterolora.allocate`.
    """
    space = space or SearchSpace()
    sites = find_sites(model, space.target_modules)
    plain = sum(site.unit_cost for site in sites)
    free = budget.step_time is None and not space.shortcuts
    floor = 1 if free and 1 in space.ranks and budget.parameters(sites) >= 2 * plain else 0
    return {
        "proxy": "spectral",
        "variant": Variant(head_steps=_HEAD_STEPS if head_modules(model) else 0, floor=floor),
    }
