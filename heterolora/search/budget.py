"""How many LoRA parameters may be spent, and the best way to spend them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np

from heterolora.errors import BudgetError, DegenerateScoreError, ScoreError, SearchSpaceError
from heterolora.search.space import MAX_RANK
from heterolora.sites import Site

__all__ = ["Budget", "check_affordable", "normalise", "rank_options", "solve"]

# Scores that differ by less than this fraction count as tied, and the seed decides between them.
_TIE = 1e-9
# Cells of the table of choices, a byte each: beyond this it would not fit in a common memory.
_MAX_CELLS = 2 * 2**30


@dataclass(frozen=True)
class Budget:
    """A limit on LoRA parameters; give exactly one of the two.

    Attributes:
        rank: as many parameters as uniform LoRA of this rank on every candidate module.
        params: an absolute number of parameters.

    Raises:
        BudgetError: none or both given, or not a positive integer.
    """

    rank: int | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.params is None):
            raise BudgetError("give exactly one of Budget(rank=...) and Budget(params=...)")
        name, value = ("rank", self.rank) if self.params is None else ("params", self.params)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise BudgetError(f"Budget({name}={value!r}): expected a positive integer")
        if self.rank is not None and self.rank > MAX_RANK:
            raise BudgetError(f"Budget(rank={self.rank}): the largest rank is {MAX_RANK}")

    def parameters(self, sites: Sequence[Site]) -> int:
        """The budget in LoRA parameters over `sites`."""
        if self.params is not None:
            return self.params
        assert self.rank is not None
        return self.rank * sum(site.unit_cost for site in sites)


def rank_options(site: Site, ranks: Sequence[int]) -> list[int]:
    """The ranks of `ranks` that make sense on `site`.

    A rank above min(in, out) buys parameters but no expressiveness, so it is dropped, unless that
    would leave nothing to choose.
    """
    limit = min(site.in_features, site.out_features)
    return [rank for rank in ranks if rank <= limit] or [ranks[0]]


def normalise(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores divided by the largest, so that SynFlow's 1e-28 and a gradient norm mean the same.

    Raises:
        ScoreError: a score is negative or not finite; the message names the module.
        DegenerateScoreError: every score is zero.
    """
    for name, score in scores.items():
        if not np.isfinite(score) or score < 0:
            raise ScoreError(f"the score of {name!r} is {score}; scores must be finite and >= 0")
    top = max(scores.values(), default=0.0)
    if top == 0:
        raise DegenerateScoreError(
            "every score is zero, so a ranking by them would be arbitrary; use another proxy"
        )
    return {name: score / top for name, score in scores.items()}


def solve(
    sites: Sequence[Site],
    weights: Sequence[float],
    ranks: Sequence[int],
    budget: int,
    *,
    seed: int = 0,
) -> list[int]:
    """The rank of every site that spends `budget` best: an exact multiple-choice knapsack.

    Site i at rank r gains ``weights[i] * log2(1 + r)``. The gain is concave in r because spreading
    rank beats concentrating it at equal parameters (each further direction of an update adds less
    than the one before); with ranks (0, R) and sites of equal size it reduces to switching on the
    top scores, the selection rule of HeteroLoRA (arXiv 2406.14956).

    Among the allocations that use the most parameters within the budget (all of it whenever some
    combination adds up to it), the one of largest total gain is returned. Scores that agree to a
    relative 1e-9 are ties: a jitter of that size, drawn from ``numpy.random.default_rng(seed)``,
    orders them, so ties are broken without favouring early layers and the same seed repeats.

    Dynamic programming over multiples of the greatest common divisor of all costs: time
    O(sites x ranks x units), memory one byte per site and unit.

    Args:
        sites: the candidates.
        weights: one non-negative finite weight per site, at least one above zero.
        ranks: the ranks to choose from, increasing.
        budget: LoRA parameters.
        seed: breaks ties only.

    Raises:
        BudgetError: the budget does not pay for the smallest choice.
        SearchSpaceError: no rank fits any module, or the sizes share so small a divisor that the
            table would not fit.
    """
    options, unit, units = check_affordable(sites, ranks, budget)
    gains = _jittered(np.asarray(weights, dtype=np.float64), seed)

    # best[u]: largest gain of the sites so far that spends exactly u units; -inf if none does.
    best = np.full(units + 1, -np.inf)
    best[0] = 0.0
    choices = np.zeros((len(sites), units + 1), dtype=np.min_scalar_type(len(ranks)))
    for i, (site, row) in enumerate(zip(sites, options, strict=True)):
        following = np.full(units + 1, -np.inf)
        for j, rank in enumerate(row):
            cost = site.unit_cost * rank // unit
            if cost > units:
                break
            candidate = best[: units + 1 - cost] + gains[i] * np.log2(1.0 + rank)
            better = candidate > following[cost:]
            following[cost:][better] = candidate[better]
            choices[i, cost:][better] = j
        best = following

    left = int(np.flatnonzero(np.isfinite(best))[-1])
    chosen = [0] * len(sites)
    for i in reversed(range(len(sites))):
        chosen[i] = options[i][choices[i, left]]
        left -= sites[i].unit_cost * chosen[i] // unit
    return chosen


def check_affordable(
    sites: Sequence[Site], ranks: Sequence[int], budget: int
) -> tuple[list[list[int]], int, int]:
    """What `solve` needs: (rank options of every site, parameters per unit, units to spend).

    Raises:
        BudgetError, SearchSpaceError: as `solve`; cheap, so call it before paying for scores.
    """
    options = [rank_options(site, ranks) for site in sites]
    costs = [
        [site.unit_cost * rank for rank in row] for site, row in zip(sites, options, strict=True)
    ]
    cheapest = sum(row[0] for row in costs)
    if cheapest > budget:
        raise BudgetError(
            f"a budget of {budget} parameters does not pay for the smallest rank on every module "
            f"({cheapest} parameters); raise the budget or add rank 0 to the search space"
        )
    adapters = [
        (cost, site.name)
        for site, row in zip(sites, costs, strict=True)
        for cost in row
        if cost > 0
    ]
    if not adapters:
        raise SearchSpaceError(
            "every rank above 0 exceeds min(in, out) of every candidate; add smaller ranks"
        )
    least, name = min(adapters)
    if least > budget:
        raise BudgetError(
            f"a budget of {budget} parameters is below one adapter of the smallest rank "
            f"({least} parameters on {name!r}); raise the budget"
        )
    unit = gcd(*(cost for row in costs for cost in row))
    units = min(budget, sum(row[-1] for row in costs)) // unit
    if len(sites) * (units + 1) > _MAX_CELLS:
        odd = min(sites, key=lambda site: site.unit_cost & -site.unit_cost)
        raise SearchSpaceError(
            f"{len(sites)} modules and {units} budget units of {unit} parameters are too many to "
            f"search exactly; leave out modules of odd size (such as {odd.name!r}, "
            f"{odd.in_features} + {odd.out_features}), or choose ranks with a larger common factor"
        )
    return options, unit, units


def _jittered(weights: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).random(len(weights))
    # Zero weights stay below every positive one, yet are ordered by the seed too.
    smallest = weights[weights > 0].min()
    return np.where(weights > 0, weights * (1.0 + _TIE * noise), _TIE * smallest * noise)
