"""Means, spreads and paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = [
    "FEWEST",
    "RESAMPLES",
    "Correlation",
    "Difference",
    "paired_difference",
    "rank_correlation",
    "spread",
]

RESAMPLES = 10_000
# Of four differences or fewer, all have one sign by chance in an eighth of the cases or more.
FEWEST = 5


@dataclass(frozen=True)
class Difference:
    """How an arm differs from another over the seeds that both have.

    Attributes:
        pairs: number of seeds.
        mean: of arm minus other.
        low, high: 95 % interval of the mean; None with fewer than `FEWEST` pairs.
    """

    pairs: int
    mean: float
    low: float | None
    high: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and self.low * self.high > 0


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, with the 95 % interval of a bootstrap over the pairs.

    Attributes:
        count: number of pairs.
    """

    value: float
    low: float
    high: float
    count: int


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, standard deviation with n - 1; None for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def paired_difference(
    arm: Mapping[int, float], other: Mapping[int, float], *, seed: int = 0
) -> Difference | None:
    """The mean of arm minus other, and its expanded percentile bootstrap interval (Hesterberg, What
    Teachers Should Know About the Bootstrap, The American Statistician 69, 2015), resampling the
    seeds with replacement.

    A bootstrap of n seeds spreads by sqrt((n-1)/n) too little, and by a normal tail where Student's
    is due; the percentiles taken are as far out as makes up for both. Of 20,000 sets of five normal
    differences, plain percentiles covered the mean in 84 % and these in 92 %; of 4,000 of ten, in
    90 and 95 %. The interval leaves out zero whenever all n differences have one sign, which
    happens by chance with probability 2^(1-n): 1 in 16 for five seeds.

    Args:
        arm, other: {seed: value}.
        seed: of the resampling.

    Returns:
        None where no seed is common.
    """
    seeds = sorted(arm.keys() & other.keys())
    if not seeds:
        return None
    found = np.asarray([arm[s] - other[s] for s in seeds], dtype=np.float64)
    if len(found) < FEWEST:
        return Difference(len(found), float(found.mean()), None, None)
    rows = np.random.default_rng(seed).integers(0, len(found), (RESAMPLES, len(found)))
    tail = _expanded_tail(len(found))
    low, high = np.quantile(found[rows].mean(axis=1), (tail, 1 - tail))
    return Difference(len(found), float(found.mean()), float(low), float(high))


def _expanded_tail(count: int) -> float:
    """The part of the resamples to leave out on either side, for 95 %."""
    from scipy.stats import norm, t

    return float(norm.cdf(math.sqrt(count / (count - 1)) * t.ppf(0.025, count - 1)))


def rank_correlation(
    first: Sequence[float], second: Sequence[float], *, seed: int = 0
) -> Correlation:
    """Spearman's rank correlation of pairs; 0 where one side is constant.

    Raises:
        ValueError: fewer than three pairs, or sides of unlike length.
    """
    pairs = np.array([first, second], dtype=np.float64)
    count = pairs.shape[1]
    if count < 3:
        raise ValueError(f"{count} pairs have no rank correlation; at least 3 are needed")
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(_correlation(pairs[:, drawn]), (2.5, 97.5))
    return Correlation(float(_correlation(pairs)), float(low), float(high), count)


def _correlation(pairs: np.ndarray) -> np.ndarray:
    """Of pairs [2, ..., count]: [...]."""
    from scipy.stats import rankdata

    ranks = rankdata(pairs, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    norms = np.sqrt((ranks**2).sum(axis=-1)).prod(axis=0)
    products = ranks.prod(axis=0).sum(axis=-1)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
