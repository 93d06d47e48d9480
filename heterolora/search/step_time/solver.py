"""The best ranks under several limits at once: parameters, and the seconds of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

__all__ = ["Item", "Solution", "solve_with_cut"]

# Partial allocations kept at a time: while there are fewer, the solution is exact.
STATES = 2048
# Prices of a limit that the bound is looked for with: how many, the ratio of neighbours, and how
# often the ratio is halved around the best.
_PRICES, _PRICE_STEP, _REFINED = 12, 2.5, 8


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
    every cut. Of more than `states` partial allocations those go on that are worth most at the
    prices of a Lagrangian relaxation, and of each cell of a grid over the costs the one of the
    largest gain; then the result is within the limits still, but perhaps not the best, and `bound`,
    from the same relaxation, says by how much at most.

    Args:
        items: in order of execution, so that the first is the lowest.
        limits: [limits], positive.

    Returns:
        None if nothing fits.
    """
    width = len(limits)
    kept = [_undominated(item) for item in items]
    items = [_picked(item, keep) for item, keep in zip(items, kept, strict=True)]
    # Grouping can save more than an adapter costs.
    saved = np.array([np.minimum(item.costs, 0).min(axis=0) for item in items]).cumsum(axis=0)
    # Whether an item may be the cut: everything below it has to go without.
    may_cut = np.cumprod([1] + [item.empty for item in items[:-1]]).astype(bool)
    may_cut &= [len(item.gains) > item.empty for item in items]
    current = _States(np.zeros(1), np.zeros((1, width)), np.zeros(1, int), np.zeros(1, int))
    levels: list[_States] = []
    best: tuple[float, int, int, int] | None = None  # gain, item, state above it, choice
    dual: tuple[float, np.ndarray] | None = None
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
            dual = dual or _dual(items, limits, may_cut)
            following = _thinned(following, limits, dual[1], states)
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
    choices = [int(keep[choice]) for keep, choice in zip(kept, choices, strict=True)]
    bound = gain if dual is None else max(gain, dual[0])
    return Solution(tuple(choices), gain, bound, dual is None)


def _undominated(item: Item) -> np.ndarray:
    """Indices of the choices that no other equals or beats in everything; a first empty one too."""
    table = np.column_stack([-item.gains, item.costs, item.costs_at_cut])
    kept = []
    for index, row in enumerate(table):
        no_worse = (table <= row).all(axis=1)
        no_worse[index:] &= (table[index:] < row).any(axis=1)
        if not no_worse.any() or (index == 0 and item.empty):
            kept.append(index)
    return np.array(kept)


def _picked(item: Item, kept: np.ndarray) -> Item:
    gains, costs, at_cut = item.gains[kept], item.costs[kept], item.costs_at_cut[kept]
    return Item(gains, costs, at_cut, item.base, item.empty)


def _combined(states: _States, gains: np.ndarray, costs: np.ndarray) -> _States:
    """Every state with every choice."""
    n, m = len(states.gain), len(gains)
    return _States(
        (states.gain[:, None] + gains).ravel(),
        (states.cost[:, None] + costs).reshape(n * m, -1),
        np.repeat(np.arange(n), m),
        np.tile(np.arange(m), n),
    )


def _thinned(found: _States, limits: np.ndarray, prices: np.ndarray, states: int) -> _States:
    """At most about `states` of them: half by worth at these prices, half by cells of a grid."""
    worth = found.gain - found.cost / limits @ prices
    worthy = np.argpartition(-worth, states // 2)[: states // 2]
    side = max(2, int((states // 2) ** (1 / len(limits))))
    cells = np.clip((found.cost / limits * side).astype(int), 0, side - 1)
    flat = np.ravel_multi_index(tuple(cells.T), (side,) * len(limits))
    order = np.lexsort((found.gain, flat))
    last = np.append(flat[order][1:] != flat[order][:-1], True)
    return found.where(np.union1d(worthy, order[last]))


def _dual(
    items: Sequence[Item], limits: np.ndarray, may_cut: np.ndarray
) -> tuple[float, np.ndarray]:
    """The Lagrangian bound, and the prices [limits] of whole limits that give it.

    For every cut the least over the prices that are tried, and of the cuts the largest.
    """
    most = sum(max(0.0, float(item.gains.max())) for item in items)
    ladder = most * np.append(0.0, _PRICE_STEP ** (3 - np.arange(_PRICES, dtype=float)))
    tried = np.array(list(product(ladder, repeat=len(limits))))
    least, prices = np.full(len(items), np.inf), np.zeros((len(items), len(limits)))
    ratio = _PRICE_STEP
    for _ in range(_REFINED + 1):
        bounds = _bounds(items, limits, may_cut, tried)
        place = bounds.argmin(axis=1)
        lower = bounds.min(axis=1) < least
        least = np.where(lower, bounds.min(axis=1), least)
        prices[lower] = tried[place[lower]]
        cut = int(np.where(may_cut, least, -np.inf).argmax())
        ratio = ratio**0.5
        around = ratio ** np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
        tried = prices[cut] * np.array(list(product(around, repeat=len(limits))))
    return float(least[cut]), prices[cut]


def _bounds(
    items: Sequence[Item], limits: np.ndarray, may_cut: np.ndarray, prices: np.ndarray
) -> np.ndarray:
    """[items, prices]: with each item as the cut, no gain within the limits is larger."""
    found = np.full((len(items), len(prices)), np.inf)
    above = prices.sum(axis=1)
    for index in reversed(range(len(items))):
        item = items[index]
        if may_cut[index]:
            adapted = slice(1 if item.empty else 0, None)
            here = item.gains[adapted, None] - item.costs_at_cut[adapted] / limits @ prices.T
            found[index] = above + here.max(axis=0) - prices @ (item.base / limits)
        above = above + (item.gains[:, None] - item.costs / limits @ prices.T).max(axis=0)
    return found
