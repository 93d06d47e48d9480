"""Ranks by what modules were found to be worth: no proxy of single modules can know more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from heterolora.bench.evidence.arms.ablation import gains, part_of
from heterolora.bench.evidence.arms.setting import Adapted, Setting, onto
from heterolora.bench.evidence.store import Store
from heterolora.bench.harness.timing import BenchError
from heterolora.search import Budget, uniform
from heterolora.search.pools import choose_ranks, make_pools

__all__ = ["ABLATED", "oracle"]

ABLATED = Path(__file__).resolve().parents[1] / "results" / "ablation"


def oracle(task: str, folder: Path = ABLATED) -> Callable[[Setting], Adapted]:
    """Builds a model with ranks by the gain in test loss of each module adapted alone.

    It has seen the test rows, so it is no method, only a bound.

    Args:
        task: whose ablation.
        folder: results of `bench evidence ablation`.
    """

    def build(setting: Setting) -> Adapted:
        worth = gains(Store(folder).tests()).get((task, "alone"), {})
        plain = uniform(setting.model, setting.rank, setting.space)
        parts = {name: part_of(name) for name in plain.ranks}
        missing = next((name for name, part in parts.items() if part not in worth), None)
        if missing is not None:
            raise BenchError(f"{folder} has no run on {task} with {missing} alone")
        scores = {name: worth[part] for name, part in parts.items() if part is not None}
        ranks = setting.space.ranks
        pools = make_pools(list(plain.sites.values()), [], ranks, Budget(rank=setting.rank))
        found = choose_ranks(pools, scores, None, ranks, seed=setting.seed)
        return onto(setting, replace(plain, scores=scores, ranks=found))

    return build
