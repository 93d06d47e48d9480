"""Tell regular expressions that may take for ever, before `re` runs them."""

import math
import re
import sys
from importlib import import_module
from typing import Any

__all__ = ["expression_problem"]


def expression_problem(text: str, limits: tuple[int, int, int]) -> str | None:
    """What is wrong with a regular expression that is to match names, or None.

    Args:
        text: the expression, from a file that nobody vouches for.
        limits: most characters, open-ended repeats, and repeats plus choices.
    """
    length, most_repeats, most_ways = limits
    if len(text) > length:
        return f"has {len(text)} characters, and at most {length} are read."
    # `re` has no time limit, so the parsed form has to tell.
    parser = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    try:
        repeats, choices = _backtracking(parser.parse(text))
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as exc:
        return f"is not a valid regular expression ({exc}). Name the modules in full."
    if repeats > most_repeats or repeats + choices > most_ways:
        return (
            "is a regular expression that may take for ever, with nested or too many repeats or "
            f"alternatives: {text!r:.80}. Name the modules in full."
        )
    return None


def _backtracking(parsed: Any) -> tuple[float, float]:
    """Open-ended repeats and either-or choices along the costliest way through an expression.

    A repeat of something that itself repeats or chooses is exponential, so it counts as infinite.
    """
    repeats = choices = 0.0
    for op, value in parsed:
        kind = str(op)
        bodies: list[Any] = []
        if kind.endswith("_REPEAT"):
            low, high, body = value
            bodies = [body]
            repeats += high > 1 and low != high
            choices += high == 1 and low == 0
        elif kind == "BRANCH":
            bodies = value[1]
            choices += 1
        elif kind == "SUBPATTERN":
            bodies = [value[-1]]
        elif kind == "ATOMIC_GROUP":
            bodies = [value]
        elif kind in ("ASSERT", "ASSERT_NOT"):
            bodies = [value[1]]
        elif kind.startswith("GROUPREF"):
            return math.inf, math.inf
        costs = [_backtracking(body) for body in bodies]
        if kind.endswith("_REPEAT") and high > 1 and costs != [(0, 0)]:
            return math.inf, math.inf
        repeats += max((cost[0] for cost in costs), default=0.0)
        choices += max((cost[1] for cost in costs), default=0.0)
    return repeats, choices
