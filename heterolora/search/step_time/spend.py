"""Spend a budget of time: from scores and a model of the step's time to ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

from heterolora.errors import BudgetError
from heterolora.kernels.cost import Problem
from heterolora.search.budget import Budget, jittered, rank_options
from heterolora.search.pools import gains_of
from heterolora.search.sites import Site
from heterolora.search.step_time.model import StepTime
from heterolora.search.step_time.solver import Item, solve_with_cut

__all__ = ["TimeBudget"]

logger = logging.getLogger("heterolora")

# Combinations of ranks that are looked at together: a larger group is cut into several parts.
_MAX_OPTIONS = 4096


@dataclass(frozen=True)
class _Part:
    """Members of a group, their combinations of ranks, and what each costs.

    Attributes:
        names: of the members.
        options: ranks of each combination, the smallest first.
        costs, costs_at_cut: [options, limits], where a lower group is adapted too or none is.
        base: [limits] of the frozen model if the group is the lowest adapted one.
    """

    names: tuple[str, ...]
    options: list[tuple[int, ...]]
    costs: np.ndarray
    costs_at_cut: np.ndarray
    base: np.ndarray

    @property
    def empty(self) -> bool:
        return not any(self.options[0])


class TimeBudget:
    """What a budget of time buys, as far as it can be known before anything is scored.

    Args:
        budget: with `step_time`.
        step: of the model and batch.
        sites: the candidates.
        ranks: to choose from, increasing.

    Attributes:
        reference: rank of the uniform LoRA that times are relative to.

    Raises:
        BudgetError: a limit is below what any allocation costs.
    """

    def __init__(
        self, budget: Budget, step: StepTime, sites: Sequence[Site], ranks: Sequence[int]
    ) -> None:
        if budget.step_time is None:
            raise BudgetError(f"{budget!r} has no step_time")
        self.step = step
        self.reference = budget.reference_rank(sites)
        self._ranks = tuple(ranks)
        self._sites = {site.name: site for site in sites}
        self._known: dict[tuple[Problem, tuple[int, ...], bool], np.ndarray] = {}
        self._parts = list(self._split())
        called = {name for part in self._parts for name in part.names}
        # A module that the pass does not call costs parameters at most.
        self._others = {
            site.name: rank_options(site, ranks)[0] for site in sites if site.name not in called
        }
        others = sum(rank * self._sites[name].unit_cost for name, rank in self._others.items())
        parameters = budget.parameters(sites) - others
        whole = step.seconds(step.uniform(self.reference))
        times = [budget.step_time * whole] * (len(self._parts[0].base) - 1)
        self._limits = np.array([parameters, *times])
        self._check(budget, whole)

    def choose(
        self, scores: Mapping[str, float], *, seed: int = 0, equal_layers: bool = False
    ) -> tuple[dict[str, int], dict[str, float | None]]:
        """The ranks of the largest total gain within both limits, as gains are counted by
        `heterolora.search.pools.gains_of`; a candidate of score 0 is not adapted for it.

        Args:
            scores: of every candidate, all at one scale.
            seed: breaks ties only.
            equal_layers: as of `heterolora.search.pools.choose_ranks`.

        Returns:
            {name: rank}, and the fields `step_time` and `step_time_error` of an `Allocation`.

        Raises:
            ScoreError, DegenerateScoreError: as `heterolora.search.budget.normalise`.
            BudgetError: what fits gains nothing.
        """
        names = list(self._sites)
        gains = np.array(gains_of(names, scores, None, self._ranks, equal_layers=equal_layers))
        gains = np.where(gains > 0, jittered(gains, self._ranks, seed), 0.0)
        worth = dict(zip(names, gains, strict=True))
        position = {rank: i for i, rank in enumerate(self._ranks)}
        items = [
            Item(
                np.array(
                    [
                        sum(worth[n][position[r]] for n, r in zip(part.names, ranks, strict=True))
                        for ranks in part.options
                    ]
                ),
                part.costs,
                part.costs_at_cut,
                part.base,
                part.empty,
            )
            for part in self._parts
        ]
        found = solve_with_cut(items, self._limits)
        if found is None:
            raise BudgetError(
                "no module of a score above 0 can be adapted within both limits, parameters and "
                "step_time; raise one of them"
            )
        if not found.exact:
            logger.info(
                "time budget: the gain is %.3f of the most there could be", found.gain / found.bound
            )
        chosen = dict(self._others)
        for part, choice in zip(self._parts, found.choices, strict=True):
            chosen.update(zip(part.names, part.options[choice], strict=True))
        fitted = self.step.calibration
        timing = {
            "step_time": self.step.relative(chosen, self.reference),
            "step_time_error": None if fitted is None else fitted.error,
        }
        return {name: chosen[name] for name in self._sites}, timing

    def _split(self) -> Iterator[_Part]:
        """The groups, each as one part if its combinations are not too many."""
        for index, group in enumerate(self.step.groups):
            names: list[str] = []
            choices: list[list[int]] = []
            for name in group.names:
                offered = rank_options(self._sites[name], self._ranks)
                if names and prod(map(len, choices)) * len(offered) > _MAX_OPTIONS:
                    yield self._part(index, names, choices)
                    names, choices = [], []
                names.append(name)
                choices.append(offered)
            yield self._part(index, names, choices)

    def _part(self, index: int, names: list[str], choices: list[list[int]]) -> _Part:
        group = self.step.groups[index].names
        options = list(product(*choices))
        ranks = [dict(zip(names, option, strict=True)) for option in options]
        counts = [[sum(r * self._sites[n].unit_cost for n, r in found.items())] for found in ranks]
        whole = [tuple(found.get(name, 0) for name in group) for found in ranks]
        costs, costs_at_cut = (
            np.array([self._extra(index, of_group, at_cut) for of_group in whole])
            for at_cut in (False, True)
        )
        return _Part(
            tuple(names),
            options,
            np.hstack([counts, costs]),
            np.hstack([counts, costs_at_cut]),
            np.array([0.0, *self.step.base(index)]),
        )

    def _extra(self, index: int, ranks: tuple[int, ...], at_cut: bool) -> np.ndarray:
        # Layers repeat.
        needed = self.step.input_grad(index, at_cut=at_cut)
        key = self.step.groups[index].problem, ranks, needed
        if key not in self._known:
            self._known[key] = self.step.extra(index, ranks, at_cut=at_cut)
        return self._known[key]

    def _check(self, budget: Budget, whole: float) -> None:
        least = np.full(len(self._limits), np.inf)
        above = np.zeros(len(self._limits))
        for index in reversed(range(len(self._parts))):
            part = self._parts[index]
            if all(lower.empty for lower in self._parts[:index]):
                adapted = part.costs_at_cut[1 if part.empty else 0 :]
                least = np.minimum(least, (above + part.base + adapted).min(axis=0))
            above = above + part.costs.min(axis=0)
        if least[0] > self._limits[0]:
            raise BudgetError(
                f"a budget of {budget.parameters(list(self._sites.values()))} parameters does not "
                f"pay for the smallest adapter ({least[0]:.0f} parameters); raise it"
            )
        share = least[1:].max() / whole
        if share > float(budget.step_time or 0):
            raise BudgetError(
                f"step_time={budget.step_time} cannot be met: a step with the least there is to "
                f"adapt takes {share:.2f} of one of uniform rank {self.reference}; raise step_time"
                + ("" if self._ranks[0] == 0 else " or add rank 0 to the search space")
            )
