"""The best ranks under several limits at once: parameters, and the seconds of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = ["Item", "Solution", "solve_with_cut"]

# Partial allocations kept at a time: while there are fewer, the solution is exact.
STATES = 8192
# Ratio of neighbouring prices of a budget, and how many are tried, for the bound.
_PRICE_STEP, _PRICES = 1.5, 24


@dataclass(frozen=True)
class Item:
    """What one group may choose from.

    Attributes:
        gains: [options] of each choice. The first choice is rank 0 everywhere, if that is allowed.
        costs: [options, limits] where a lower group is adapted too.
        costs_at_cut: [options, limits] where this is the lowest adapted group.
        base: [limits] that the rest costs if this is the lowest adapted group.
        empty: whether the first choice adapts nothing.
    """

    gains: np.ndarray
    costs: np.ndarray
    costs_at_cut: np.ndarray
    base: np.ndarray
    empty: bool


@dataclass(frozen=True)
class Solution:
    """The best allocation found.

    Attributes:
        choices: index of the choice of every item.
        gain: their sum.
        bound: no allocation within the limits has a larger gain.
        exact: whether every allocation was looked at.
    """

    choices: tuple[int, ...]
    gain: float
    bound: float
    exact: bool


@dataclass(frozen=True)
class _States:
    """Partial allocations of the upper items; `parent` and `choice` say how each came about."""

    gain: np.ndarray
    cost: np.ndarray
    parent: np.ndarray
    choice: np.ndarray

    def where(self, kept: np.ndarray) -> _States:
        return _States(self.gain[kept], self.cost[kept], self.parent[kept], self.choice[kept])


def solve_with_cut(
    items: Sequence[Item], limits: np.ndarray, *, states: int = STATES
) -> Solution | None:
    """One choice for each item, of the largest total gain with every cost within its limit.

    The cut is the lowest item that adapts anything: it takes `costs_at_cut` and `base`, items above
    it take `costs`, those below nothing. Items are decided from the top down, so that one pass sees
    every cut. Beyond `states` partial allocations, of those in one cell of a grid over the costs
    only that of the largest gain goes on; then the result is within the limits still, but perhaps
    not the best, and `bound`, of a Lagrangian relaxation, says by how much at most.

    Args:
        items: in order of execution, so that the first is the lowest.
        limits: [limits], positive.

    Returns:
        None if nothing fits.
    """
    width = len(limits)
    # Grouping can save more than an adapter costs.
    saved = np.array([np.minimum(item.costs, 0).min(axis=0) for item in items]).cumsum(axis=0)
    # Whether an item may be the cut: everything below it has to go without.
    may_cut = np.cumprod([1] + [item.empty for item in items[:-1]]).astype(bool)
    current = _States(np.zeros(1), np.zeros((1, width)), np.zeros(1, int), np.zeros(1, int))
    levels: list[_States] = []
    best: tuple[float, int, int, int] | None = None  # gain, item, state above it, choice
    exact = True
    for index in reversed(range(len(items))):
        item = items[index]
        if may_cut[index]:
            adapted = slice(1 if item.empty else 0, None)
            closed = _combined(current, item.gains[adapted], item.costs_at_cut[adapted])
            fits = np.flatnonzero((closed.cost + item.base <= limits).all(axis=1))
            if len(fits):
                winner = fits[np.argmax(closed.gain[fits])]
                if best is None or closed.gain[winner] > best[0]:
                    choice = int(closed.choice[winner]) + adapted.start
                    best = float(closed.gain[winner]), index, int(closed.parent[winner]), choice
        # Whatever follows has its cut below, and costs at least as much as that of the next item.
        rest = items[index - 1].base + saved[index - 1] if index else np.full(width, np.inf)
        following = _combined(current, item.gains, item.costs)
        following = following.where((following.cost + rest <= limits).all(axis=1))
        if len(following.gain) > states:
            following, exact = _thinned(following, limits, states), False
        levels.append(following)
        current = following
        if not len(current.gain):
            break
    if best is None:
        return None
    gain, cut, state, choice = best
    choices = [0] * len(items)
    choices[cut] = choice
    for index, level in zip(
        range(cut + 1, len(items)), reversed(levels[: len(items) - 1 - cut]), strict=True
    ):
        choices[index], state = int(level.choice[state]), int(level.parent[state])
    bound = gain if exact else max(gain, _bound(items, limits, may_cut))
    return Solution(tuple(choices), gain, bound, exact)


def _combined(states: _States, gains: np.ndarray, costs: np.ndarray) -> _States:
    """Every state with every choice."""
    n, m = len(states.gain), len(gains)
    return _States(
        (states.gain[:, None] + gains).ravel(),
        (states.cost[:, None] + costs).reshape(n * m, -1),
        np.repeat(np.arange(n), m),
        np.tile(np.arange(m), n),
    )


def _thinned(found: _States, limits: np.ndarray, states: int) -> _States:
    """At most about `states` of them: the best of each cell that no cheaper cell beats."""
    side = max(2, int(states ** (1 / len(limits))))
    cells = np.clip((found.cost / limits * side).astype(int), 0, side - 1)
    flat = np.ravel_multi_index(tuple(cells.T), (side,) * len(limits))
    order = np.lexsort((found.gain, flat))
    last = np.append(flat[order][1:] != flat[order][:-1], True)
    winners = order[last]
    grid = np.full((side,) * len(limits), -np.inf)
    grid.ravel()[flat[winners]] = found.gain[winners]
    for axis in range(len(limits)):
        np.maximum.accumulate(grid, axis=axis, out=grid)
    return found.where(winners[found.gain[winners] >= grid.ravel()[flat[winners]]])


def _bound(items: Sequence[Item], limits: np.ndarray, may_cut: np.ndarray) -> float:
    """The least Lagrangian bound over a grid of prices, of the cut where it is largest."""
    most = sum(float(item.gains.max()) for item in items)
    ladder = most * np.append(0.0, _PRICE_STEP ** (2 - np.arange(_PRICES, dtype=float)))
    prices = np.array(list(product(ladder, repeat=len(limits))))  # [prices, limits]
    least = np.full(len(items), np.inf)
    above = prices.sum(axis=1)  # of the limits themselves, in units of which costs are priced
    for index in reversed(range(len(items))):
        item = items[index]
        if may_cut[index]:
            adapted = slice(1 if item.empty else 0, None)
            here = item.gains[adapted, None] - item.costs_at_cut[adapted] / limits @ prices.T
            total = above + here.max(axis=0) - prices @ (item.base / limits)
            least[index] = total.min()
        above = above + (item.gains[:, None] - item.costs / limits @ prices.T).max(axis=0)
    return float(least[may_cut].max())
