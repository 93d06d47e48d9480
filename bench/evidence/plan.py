"""Which runs a configuration asks for, and which learning rate each of them gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from heterolora.bench.evidence.arms.registry import ARMS, families
from heterolora.bench.evidence.config import Config, Trial
from heterolora.bench.harness.timing import BenchError

__all__ = ["Choice", "choices", "final_runs"]

Results = Callable[[Trial], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Choice:
    """The question which learning rate a family of arms trains at, for one task and budget.

    Attributes:
        task, rank, family: what it is for.
        arm: the arm that answers for the family.
        candidates: {learning rate: its runs}, one for each seed.
    """

    task: str
    rank: int
    family: str
    arm: str
    candidates: dict[float, tuple[Trial, ...]]

    @property
    def name(self) -> str:
        return f"{self.task}/rank{self.rank}-{self.family}"

    @property
    def runs(self) -> list[Trial]:
        """Those that have to be done; none where there is nothing to choose."""
        if len(self.candidates) == 1:
            return []
        return [run for runs in self.candidates.values() for run in runs]

    def settle(self, results: Results) -> tuple[float, dict[str, Any]]:
        """(the learning rate with the lowest mean held-out loss, a record of the choice).

        Raises:
            BenchError: a run is missing, or every learning rate diverged.
        """
        if len(self.candidates) == 1:
            (only,) = self.candidates
            return only, {"family": self.family, "learning_rate": only, "losses": {}}
        means = {}
        for rate, runs in self.candidates.items():
            found = [results(run) for run in runs]
            if None in found:
                raise BenchError(f"the learning rate of {self.name} is not settled: runs failed")
            losses = [result["loss"] for result in found if result is not None]
            means[rate] = math.inf if None in losses else fmean(losses)
        best = min(means, key=means.__getitem__)
        if math.isinf(means[best]):
            raise BenchError(
                f"{self.name}: {self.arm} diverged at every learning rate; add smaller ones"
            )
        return best, {
            "task": self.task,
            "rank": self.rank,
            "family": self.family,
            "arm": self.arm,
            "learning_rate": best,
            "at_edge": best in (min(means), max(means)),
            "losses": {f"{r:g}": None if math.isinf(m) else m for r, m in means.items()},
        }


def choices(config: Config, arms: Sequence[str]) -> list[Choice]:
    """Those that these arms depend on."""
    return [
        Choice(
            task,
            rank,
            family,
            arm,
            {
                rate: tuple(
                    Trial("choice", task, arm, rank, seed, rate, epochs, config.recipe)
                    for seed in config.choice_seeds
                )
                for rate in config.learning_rates
            },
        )
        for task, epochs in config.epochs.items()
        for rank in config.ranks
        for family, arm in families(arms).items()
    ]


def final_runs(
    config: Config, arms: Sequence[str], rates: Mapping[tuple[str, int, str], float]
) -> list[Trial]:
    """The runs whose learning rate is settled. Seed by seed, so that what is done at any moment
    compares all arms.

    Args:
        rates: {(task, rank, family): learning rate}.
    """
    return [
        Trial("test", task, arm, rank, seed, rate, epochs, config.recipe)
        for rank in config.ranks
        for seed in config.seeds
        for task, epochs in config.epochs.items()
        for arm in arms
        if (rate := rates.get((task, rank, ARMS[arm].family))) is not None
    ]
