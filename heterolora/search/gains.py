"""Scores that know the rank, and what may be done to scores before they compete.

The functions take either kind of scores, {name: score} or `Gains`, and return the same kind.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from heterolora.search.budget import Priced, log_gains, normalise

__all__ = [
    "Gains",
    "averaged",
    "by_layer",
    "divided",
    "numbers",
    "rank_gains",
    "renumbered",
    "shuffled",
]

_LAYER = re.compile(r"(?:^|\.)\d+\.")


class Gains(dict[str, float]):
    """{name: what the largest rank that was measured is worth}, and what each rank below it is.

    They are worth the same whatever alpha/r a branch was measured with.

    Args:
        marginal: {name: what each further unit of rank adds, largest first}. Ranks beyond are
            worth nothing more.
    """

    def __init__(self, marginal: Mapping[str, Sequence[float]]) -> None:
        self.marginal = {name: tuple(added) for name, added in marginal.items()}
        super().__init__({name: math.fsum(added) for name, added in self.marginal.items()})

    def upto(self, name: str, rank: int) -> float:
        """What `rank` is worth on a candidate."""
        return math.fsum(self.marginal[name][:rank])


def rank_gains(scores: Mapping[str, float], ranks: Sequence[int]) -> list[list[float]]:
    """What each rank is worth on each candidate, in a unit of which the largest score is 1: what
    `Gains` say, or for one score each `heterolora.search.budget.log_gains`.

    Raises:
        ScoreError, DegenerateScoreError: as `heterolora.search.budget.normalise`.
    """
    weights = normalise(scores)
    if not isinstance(scores, Gains):
        return log_gains(list(weights.values()), ranks)
    top = max(scores.values())
    return [[scores.upto(name, rank) / top for rank in ranks] for name in scores]


def numbers(scores: Mapping[str, float]) -> list[float]:
    """All numbers of the scores, in the order of the sorted names."""
    if isinstance(scores, Gains):
        return [value for name in sorted(scores) for value in scores.marginal[name]]
    return [scores[name] for name in sorted(scores)]


def renumbered(scores: Mapping[str, float], values: Sequence[float]) -> dict[str, float]:
    """The scores with other `numbers`."""
    rest = iter(values)
    if isinstance(scores, Gains):
        marginal = {name: [next(rest) for _ in scores.marginal[name]] for name in sorted(scores)}
        return Gains({name: marginal[name] for name in scores})
    found = {name: next(rest) for name in sorted(scores)}
    return {name: found[name] for name in scores}


def divided(scores: Mapping[str, float], divisors: Mapping[str, float]) -> dict[str, float]:
    """The scores of the candidates in `divisors`, each divided by its number."""
    if isinstance(scores, Gains):
        return Gains({n: [v / by for v in scores.marginal[n]] for n, by in divisors.items()})
    return {name: scores[name] / by for name, by in divisors.items()}


def averaged(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of scores of the same candidates by the same proxy."""
    means = np.mean([numbers(scores) for scores in measured], axis=0)
    return renumbered(measured[0], means.tolist())


def by_layer(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores whose total is 1 in every layer, so that candidates of one layer compete by score, and
    layers by their number of candidates.

    A layer is the part of a name up to its first number, as in "encoder.layer.3.". Candidates
    outside the layers keep their share of the total. A layer that scores nothing stays at zero.
    """
    layers: dict[str | None, list[str]] = defaultdict(list)
    for name in scores:
        match = _LAYER.search(name)
        layers[name[: match.end()] if match else None].append(name)
    outside = layers.pop(None, [])
    totals = {layer: math.fsum(scores[n] for n in names) for layer, names in layers.items()}
    divisors = {n: totals[layer] or 1.0 for layer, names in layers.items() for n in names}
    found = [total for total in totals.values() if total]
    divisors.update(dict.fromkeys(outside, math.fsum(found) / len(found) if found else 1.0))
    return divided(scores, {name: divisors[name] for name in scores})


def shuffled(
    scores: Mapping[str, float], candidates: Sequence[Priced], seed: int
) -> dict[str, float]:
    """The scores dealt out anew, by `seed`, among candidates of equal size: the control that has
    the distribution of a proxy's scores and none of its knowledge.
    """
    alike: dict[Hashable, list[str]] = defaultdict(list)
    for candidate in candidates:
        alike[candidate.unit_cost, candidate.max_rank].append(candidate.name)
    draw = np.random.default_rng(seed)
    origin = {
        name: names[other]
        for names in alike.values()
        for name, other in zip(names, draw.permutation(len(names)), strict=True)
    }
    if isinstance(scores, Gains):
        return Gains({name: scores.marginal[origin[name]] for name in scores})
    return {name: scores[origin[name]] for name in scores}
