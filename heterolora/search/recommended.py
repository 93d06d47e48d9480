"""What to score with and how, where the user does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from torch import nn

from heterolora.search.budget import Budget, Priced, check_budget
from heterolora.search.sites import find_sites, head_modules
from heterolora.search.space import SearchSpace
from heterolora.search.variant import Variant
from heterolora.shortcuts.model import shortcut_candidates

__all__ = ["Recommended", "recommended"]

_HEAD_STEPS = 70


class Recommended(TypedDict):
    """Arguments of `heterolora.allocate`."""

    proxy: str
    variant: Variant


def recommended(
    model: nn.Module,
    budget: Budget,
    space: SearchSpace | None = None,
    shortcut_budget: Budget | None = None,
) -> Recommended:
    """The proxy and variant that docs/evidence.md supports:
    ``allocate(model, batches, budget=budget, **recommended(model, budget))``.

    Spectral gain; after 70 steps of the task head, where the model has one that is trained in full.
    Ranks that concentrate on a few layers lose, so every candidate, module or shortcut, gets the
    smallest rank above 0 at least, if the budgets pay for that, and otherwise every layer's scores
    count for the same total. Over modules the first was level with uniform ranks or ahead of them,
    at rank 2; the second was measured at a quarter of the parameters of rank 2, where it was level
    with ranks of equal scores, and at rank 1, where uniform ranks were ahead of it. With shortcuts
    the first was level with uniform ranks and the second was not measured.

    Args:
        model, budget, space, shortcut_budget: as of `heterolora.allocate`.

    Raises:
        BudgetError: a budget is no `Budget`.
        ModelError, SearchSpaceError, ShortcutError: as `heterolora.allocate`.
    """
    check_budget("budget", budget)
    if shortcut_budget is not None:
        check_budget("shortcut_budget", shortcut_budget)
    space = space or SearchSpace()
    sites: Sequence[Priced] = find_sites(model, space.target_modules)
    shortcuts: Sequence[Priced] = ()
    if space.shortcuts:
        shortcuts = shortcut_candidates(model, space.shortcuts, space.mapping)
    pools = [(budget, [*sites, *shortcuts])]
    if shortcut_budget is not None:
        pools = [(budget, [*sites]), (shortcut_budget, [*shortcuts])]
    least = min(rank for rank in space.ranks if rank > 0)
    affordable = all(
        own.parameters(candidates) >= least * sum(candidate.unit_cost for candidate in candidates)
        for own, candidates in pools
    )
    floor = least if affordable else 0
    return {
        "proxy": "spectral",
        "variant": Variant(
            head_steps=_HEAD_STEPS if head_modules(model) else 0,
            floor=floor,
            by_layer=not floor,
        ),
    }
