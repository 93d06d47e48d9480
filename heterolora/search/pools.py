"""Which candidates compete for which budget, and who gets what of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from heterolora.errors import BudgetError
from heterolora.search.budget import Budget, Priced, check_affordable, check_budget, solve
from heterolora.search.gains import Gains, by_layer, divided, rank_gains

__all__ = ["Pool", "choose_ranks", "gains_of", "make_pools"]


@dataclass(frozen=True)
class Pool:
    """Candidates that share one budget.

    Attributes:
        candidates: sites, shortcuts, or both.
        parameters: LoRA parameters to spend.
    """

    candidates: tuple[Priced, ...]
    parameters: int


def make_pools(
    sites: Sequence[Priced],
    shortcuts: Sequence[Priced],
    ranks: Sequence[int],
    budget: Budget,
    shortcut_budget: Budget | None = None,
) -> list[Pool]:
    """One pool of everything (HeteroLoRA's `combined`), or with a second budget one of the sites
    and one of the shortcuts (`separated`).

    Raises:
        BudgetError: a budget is not a Budget, buys nothing, or is of a rank above the largest.
        SearchSpaceError: as `heterolora.search.budget.solve`.
    """
    if shortcut_budget is None:
        return [_pool("budget", [*sites, *shortcuts], ranks, budget)]
    if not shortcuts:
        raise BudgetError("shortcut_budget is given, and the search space has no shortcuts")
    return [
        _pool("budget", sites, ranks, budget),
        _pool("shortcut_budget", shortcuts, ranks, shortcut_budget),
    ]


def choose_ranks(
    pools: Sequence[Pool],
    scores: Mapping[str, float],
    scales: Mapping[str, float] | None,
    ranks: Sequence[int],
    *,
    required: Collection[str] = (),
    seed: int = 0,
    equal_layers: bool = False,
) -> dict[str, int]:
    """{name: rank}: in every pool the ranks that spend its budget best by `scores`.

    Of one score each a rank gains as `heterolora.search.budget.log_gains` says; `Gains` say
    themselves what each rank is worth, and are compared as they are. A score counts per unit of
    scale: the gradients of A and B are proportional to alpha/r, so with other scales for shortcuts
    (HeteroLoRA: 0.5, and 2 for LoRA) the raw scores would compare the scales.

    Args:
        scores: of every candidate.
        scales: alpha/r of every candidate, at the rank it was scored with; None where scores do not
            depend on it, as those of "constant".
        ranks: to choose from.
        required: candidates that must get a rank above 0.
        seed: breaks ties only.
        equal_layers: within a pool every layer's scores count for the same total first, as
            `heterolora.search.gains.by_layer` makes them.

    Raises:
        ScoreError, DegenerateScoreError: as `heterolora.search.budget.normalise`, for each pool.
        BudgetError: the budget does not pay for what is required.
    """
    chosen: dict[str, int] = {}
    for pool in pools:
        names = [candidate.name for candidate in pool.candidates]
        gains = gains_of(names, scores, scales, ranks, equal_layers=equal_layers)
        for name, row in zip(names, gains, strict=True):
            if name in required and ranks[0] == 0:
                row[0] = -math.inf
        found = solve(pool.candidates, gains, ranks, pool.parameters, seed=seed)
        chosen.update(zip(names, found, strict=True))
    return chosen


def gains_of(
    names: Sequence[str],
    scores: Mapping[str, float],
    scales: Mapping[str, float] | None,
    ranks: Sequence[int],
    *,
    equal_layers: bool = False,
) -> list[list[float]]:
    """What each rank is worth on each of these candidates, which compete with each other.

    Args:
        names: of the candidates.
        scores, scales, ranks, equal_layers: as of `choose_ranks`.

    Raises:
        ScoreError, DegenerateScoreError: as `heterolora.search.budget.normalise`.
    """
    unlike = {} if scales is None or isinstance(scores, Gains) else scales
    own = divided(scores, {name: unlike.get(name, 1.0) for name in names})
    return rank_gains(by_layer(own) if equal_layers else own, ranks)


def _pool(label: str, candidates: Sequence[Priced], ranks: Sequence[int], budget: Budget) -> Pool:
    check_budget(label, budget)
    if budget.rank is not None and budget.rank > ranks[-1]:
        raise BudgetError(
            f"Budget(rank={budget.rank}) is above the largest rank to choose from ({ranks[-1]}), "
            "so it could not be spent; add larger ranks or lower the budget"
        )
    parameters = budget.parameters(candidates)
    check_affordable(candidates, ranks, parameters)
    return Pool(tuple(candidates), parameters)
