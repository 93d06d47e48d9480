"""What an adapter may cost, in parameters, and the best way to spend them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Protocol

import numpy as np

from heterolora.checked import is_integer
from heterolora.errors import BudgetError, DegenerateScoreError, ScoreError, SearchSpaceError
from heterolora.search.space import MAX_RANK

__all__ = [
    "Budget",
    "Priced",
    "check_affordable",
    "check_budget",
    "jittered",
    "log_gains",
    "normalise",
    "rank_options",
    "solve",
]

# Scores that differ by less than this fraction count as tied, and the seed decides between them.
_TIE = 1e-9
# Cells of the table of choices, a byte each: beyond this it would not fit in a common memory.
_MAX_CELLS = 2 * 2**30


class Priced(Protocol):
    """What may get a rank: a `heterolora.search.sites.Site`, or a shortcut that a model could have.

    Attributes:
        name: unique among the candidates.
        unit_cost: parameters per unit of rank.
        max_rank: the largest rank that adds expressiveness.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit_cost(self) -> int: ...

    @property
    def max_rank(self) -> int: ...


@dataclass(frozen=True)
class Budget:
    """A limit on LoRA parameters, by `rank` or by `params`.

    Attributes:
        rank: as many parameters as uniform LoRA of this rank on every candidate.
        params: an absolute number of parameters.

    Raises:
        BudgetError: both or neither given, or not a positive integer.
    """

    rank: int | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.params is None):
            raise BudgetError("give exactly one of Budget(rank=...) and Budget(params=...)")
        name, value = ("rank", self.rank) if self.params is None else ("params", self.params)
        if not is_integer(value, low=1):
            raise BudgetError(f"Budget({name}={value!r}): expected a positive integer")
        if self.rank is not None and self.rank > MAX_RANK:
            raise BudgetError(f"Budget(rank={self.rank}): the largest rank is {MAX_RANK}")

    def parameters(self, candidates: Sequence[Priced]) -> int:
        """The budget in LoRA parameters over `candidates`."""
        if self.params is not None:
            return self.params
        assert self.rank is not None
        return self.rank * sum(candidate.unit_cost for candidate in candidates)


def rank_options(candidate: Priced, ranks: Sequence[int]) -> list[int]:
    """The ranks of `ranks` that make sense on `candidate`.

    A rank above `max_rank` buys parameters but no expressiveness, so it is dropped, unless that
    would leave nothing to choose.
    """
    return [rank for rank in ranks if rank <= candidate.max_rank] or [ranks[0]]


def check_budget(label: str, value: object) -> None:
    """Raises:
    BudgetError: `value` is no `Budget`.
    """
    if not isinstance(value, Budget):
        raise BudgetError(f"{label} must be a Budget(rank=... or params=...), not {value!r}")


def log_gains(weights: Sequence[float], ranks: Sequence[int]) -> list[list[float]]:
    """weights[i] * log2(1 + rank): the gains of candidates with one score each.

    Concave in the rank, because spreading rank beats concentrating it at equal parameters (each
    further direction of an update adds less than the one before). With ranks (0, R) and candidates
    of equal size the largest total is that of the top scores, the selection rule of HeteroLoRA
    (arXiv 2406.14956).
    """
    return [[float(weight * np.log2(1.0 + rank)) for rank in ranks] for weight in weights]


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
    candidates: Sequence[Priced],
    gains: Sequence[Sequence[float]],
    ranks: Sequence[int],
    budget: int,
    *,
    seed: int = 0,
) -> list[int]:
    """The rank of every candidate that spends `budget` best: an exact multiple-choice knapsack.

    Among the allocations that use the most parameters within the budget (all of it whenever some
    combination adds up to it), the one of largest total gain is returned. Gains that agree to a
    relative 1e-9 are ties: a jitter of that size, drawn from ``numpy.random.default_rng(seed)``,
    orders them, so ties are broken without favouring early layers and the same seed repeats.

    Dynamic programming over multiples of the greatest common divisor of all costs: time
    O(candidates x ranks x units), memory one byte per candidate and unit.

    Args:
        candidates: what may get a rank.
        gains: gains[i][j] >= 0 is what rank ranks[j] on candidate i is worth, not all zero; -inf if
            it must not have that rank. One for a rank above `max_rank` is not used.
        ranks: the ranks to choose from, increasing.
        budget: LoRA parameters.
        seed: breaks ties only.

    Raises:
        BudgetError: the budget does not pay for the smallest choice.
        SearchSpaceError: no rank fits any candidate, or the sizes share so small a divisor that the
            table would not fit.
    """
    options, unit, units = check_affordable(candidates, ranks, budget)
    worth = jittered(np.asarray(gains, dtype=np.float64), ranks, seed)

    # best[u]: largest gain of the candidates so far that spends exactly u units; -inf if none does.
    best = np.full(units + 1, -np.inf)
    best[0] = 0.0
    choices = np.zeros((len(candidates), units + 1), dtype=np.min_scalar_type(len(ranks)))
    for i, (candidate, row) in enumerate(zip(candidates, options, strict=True)):
        following = np.full(units + 1, -np.inf)
        for j, rank in enumerate(row):
            cost = candidate.unit_cost * rank // unit
            if cost > units:
                break
            total = best[: units + 1 - cost] + worth[i, j]
            better = total > following[cost:]
            following[cost:][better] = total[better]
            choices[i, cost:][better] = j
        best = following

    spendable = np.flatnonzero(np.isfinite(best))
    if len(spendable) == 0:
        raise BudgetError(
            f"a budget of {budget} parameters does not pay for what has to be adapted"
        )
    left = int(spendable[-1])
    chosen = [0] * len(candidates)
    for i in reversed(range(len(candidates))):
        chosen[i] = options[i][choices[i, left]]
        left -= candidates[i].unit_cost * chosen[i] // unit
    return chosen


def check_affordable(
    candidates: Sequence[Priced], ranks: Sequence[int], budget: int
) -> tuple[list[list[int]], int, int]:
    """What `solve` needs: (rank options of every candidate, parameters per unit, units to spend).

    Raises:
        BudgetError, SearchSpaceError: as `solve`; cheap, so call it before paying for scores.
    """
    options = [rank_options(candidate, ranks) for candidate in candidates]
    costs = [
        [candidate.unit_cost * rank for rank in row]
        for candidate, row in zip(candidates, options, strict=True)
    ]
    cheapest = sum(row[0] for row in costs)
    if cheapest > budget:
        raise BudgetError(
            f"a budget of {budget} parameters does not pay for the smallest rank on every module "
            f"({cheapest} parameters); raise the budget or add rank 0 to the search space"
        )
    adapters = [
        (cost, candidate.name)
        for candidate, row in zip(candidates, costs, strict=True)
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
    if len(candidates) * (units + 1) > _MAX_CELLS:
        odd = min(candidates, key=lambda candidate: candidate.unit_cost & -candidate.unit_cost)
        raise SearchSpaceError(
            f"{len(candidates)} modules and {units} budget units of {unit} parameters are too many "
            f"to search exactly; leave out modules of odd size (such as {odd.name!r}, "
            f"{odd.unit_cost} parameters per unit of rank), or choose ranks with a larger common "
            "factor"
        )
    return options, unit, units


def jittered(gains: np.ndarray, ranks: Sequence[int], seed: int) -> np.ndarray:
    """Gains [candidates, ranks] without ties between candidates, as `solve` orders them."""
    noise = np.random.default_rng(seed).random((len(gains), 1))
    # A candidate that gains nothing stays below all others, yet is ordered by the seed too.
    smallest = gains[gains > 0].min()
    nothing = _TIE * smallest * noise * np.log2(1.0 + np.asarray(ranks, dtype=np.float64))
    ordered = np.where(gains.max(axis=1, keepdims=True) > 0, gains * (1.0 + _TIE * noise), nothing)
    # What is ruled out stays so.
    return np.where(np.isneginf(gains), gains, ordered)
