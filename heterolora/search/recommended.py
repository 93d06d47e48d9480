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
    """The proxy and variant that docs/evidence.md found no worse than uniform ranks, or on a budget
    that does not pay for these than ranks of equal scores, for budgets of parameters for modules:
    ``allocate(model, batches, budget=budget, **recommended(model, budget))``.

    Spectral gain; after 70 steps of the task head, where the model has one that is trained in full.
    Ranks that concentrate on a few layers lose, so where the budget is of parameters for modules
    alone every module gets rank 1 at least, if the budget pays for that, and otherwise every
    layer's scores count for the same total. The latter was measured at a quarter of the parameters
    of rank 2, and at rank 1, where uniform ranks were ahead of it. A budget of time gets neither,
    and lost 4.7 points at 0.6 of the step's time; shortcuts get neither, and were not measured so.

    Args:
        model, budget, space: as of `heterolora.allocate`.

    Raises:
        ModelError, SearchSpaceError: as `heterolora.allocate`.
    """
    space = space or SearchSpace()
    sites = find_sites(model, space.target_modules)
    plain = sum(site.unit_cost for site in sites)
    free = budget.step_time is None and not space.shortcuts
    floor = free and 1 in space.ranks and budget.parameters(sites) >= plain
    return {
        "proxy": "spectral",
        "variant": Variant(
            head_steps=_HEAD_STEPS if head_modules(model) else 0,
            floor=int(floor),
            by_layer=free and not floor,
        ),
    }
