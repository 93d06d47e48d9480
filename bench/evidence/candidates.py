"""Arms over the candidates of `heterolora search`, where BERT's pooler is one more linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from heterolora.bench.evidence.dynamic import ON_OFF
from heterolora.bench.evidence.setting import Adapted, Setting, onto
from heterolora.bench.harness import BenchError
from heterolora.search import Budget, uniform
from heterolora.search.pools import choose_ranks, make_pools

__all__ = ["all_linear", "pooler_by_hand"]


def all_linear(build: Callable[[Setting], Adapted]) -> Callable[[Setting], Adapted]:
    """What `build` does with the candidates of `heterolora search`, BERT's pooler among them, where
    only the head that PEFT trains by itself is trained in full, as by `heterolora train`."""

    def built(setting: Setting) -> Adapted:
        space = replace(setting.space, target_modules=None)
        return replace(build(replace(setting, space=space)), head_only=True)

    return built


def pooler_by_hand(setting: Setting) -> Adapted:
    """`ON_OFF` times the average rank for the pooler; what that leaves of uniform's parameters goes
    to the other modules by equal scores, rank 1 at least.

    Raises:
        BenchError: the pooler is no candidate.
    """
    plain = uniform(setting.model, setting.rank, setting.space)
    pooler = next((site for name, site in plain.sites.items() if "pooler" in name), None)
    if pooler is None:
        raise BenchError("the candidates hold no pooler to give its rank by hand")
    others = [site for site in plain.sites.values() if site is not pooler]
    rank = ON_OFF * setting.rank
    left = Budget(params=plain.parameters - rank * pooler.unit_cost)
    offered = [rank for rank in setting.space.ranks if rank > 0]
    pools = make_pools(others, [], offered, left)
    equal = {site.name: 1.0 for site in others}
    found = choose_ranks(pools, equal, None, offered, seed=setting.seed)
    return onto(setting, replace(plain, ranks={**found, pooler.name: rank}))
