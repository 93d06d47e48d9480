"""The search while training, as an arm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from heterolora.bench.evidence.arms.setting import Adapted, Setting, onto
from heterolora.search import Budget, DynamicSearchCallback, uniform

__all__ = ["ON_OFF", "dynamic"]

# The paper's form: a module has four times the average rank or none, so a quarter of them is on.
ON_OFF = 4


def dynamic(proxy: str) -> Callable[[Setting], Adapted]:
    """Builds `ON_OFF` times the rank everywhere, of which a search while training keeps what the
    budget pays for.

    Args:
        proxy: as of `heterolora.DynamicSearchCallback`.
    """

    def build(setting: Setting) -> Adapted:
        whole = uniform(setting.model, ON_OFF * setting.rank, setting.space)
        # Half of a static search's batches: they are scored again and again.
        search = DynamicSearchCallback(
            Budget(rank=setting.rank),
            proxy=proxy,
            batches=setting.batches(max(1, setting.scoring_batches // 2)),
            seed=setting.seed,
        )
        adapted = onto(setting, whole)
        adapted.callbacks.append(search)

        def facts() -> dict[str, Any]:
            counts = search.counts
            return {
                "ranks": search.ranks,
                "rankings": len(search.rankings),
                "parameters": {
                    "enabled": counts.enabled,
                    "ever_trained": counts.ever_trained,
                    "stored": counts.stored,
                },
            }

        adapted.facts = facts
        return adapted

    return build
