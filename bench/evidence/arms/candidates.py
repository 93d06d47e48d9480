"""Arms over the candidates of `heterolora search`, where BERT's pooler is one more linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heterolora.bench.evidence.arms.dynamic import ON_OFF
from heterolora.bench.evidence.arms.setting import Adapted, Setting, onto, searched
from heterolora.bench.harness.timing import BenchError
from heterolora.search import Allocation, Budget, Variant, uniform
from heterolora.search.gains import shuffled
from heterolora.search.pools import choose_ranks, make_pools
from heterolora.search.sites import Site

__all__ = ["all_linear", "encoder_shuffled", "pooler_by_hand"]


def all_linear(build: Callable[[Setting], Adapted]) -> Callable[[Setting], Adapted]:
    """What `build` does with the candidates of `heterolora search`, BERT's pooler among them, where
    only the head that PEFT trains by itself is trained in full, as by `heterolora train`."""

    def built(setting: Setting) -> Adapted:
        space = replace(setting.space, target_modules=None)
        return replace(build(replace(setting, space=space)), head_only=True)

    return built


def encoder_shuffled(proxy: str, **variant: Any) -> Callable[[Setting], Adapted]:
    """Builds the ranks of a search, dealt out anew among modules of one size, but for the pooler's:
    what is left of a search is how many modules of a size get which rank, and the pooler.

    Args:
        proxy: as of `heterolora.allocate`.
        variant: fields of `heterolora.Variant`.
    """

    def build(setting: Setting) -> Adapted:
        budget = Budget(rank=setting.rank)
        found = searched(setting, proxy, None, budget, variant=Variant(**variant))
        pooler = _pooler(found)
        others = [site for site in found.sites.values() if site is not pooler]
        own = {site.name: float(found.ranks[site.name]) for site in others}
        dealt = {name: int(rank) for name, rank in shuffled(own, others, setting.seed).items()}
        return onto(setting, replace(found, ranks={**found.ranks, **dealt}))

    return build


def pooler_by_hand(setting: Setting) -> Adapted:
    """`ON_OFF` times the average rank for the pooler; what that leaves of uniform's parameters goes
    to the other modules by equal scores, rank 1 at least.

    Raises:
        BenchError: the pooler is no candidate.
    """
    plain = uniform(setting.model, setting.rank, setting.space)
    pooler = _pooler(plain)
    others = [site for site in plain.sites.values() if site is not pooler]
    rank = ON_OFF * setting.rank
    left = Budget(params=plain.parameters - rank * pooler.unit_cost)
    offered = [rank for rank in setting.space.ranks if rank > 0]
    pools = make_pools(others, [], offered, left)
    equal = {site.name: 1.0 for site in others}
    found = choose_ranks(pools, equal, None, offered, seed=setting.seed)
    return onto(setting, replace(plain, ranks={**found, pooler.name: rank}))


def _pooler(allocation: Allocation) -> Site:
    """Raises:
    BenchError: it is no candidate.
    """
    for name, site in allocation.sites.items():
        if "pooler" in name:
            return site
    raise BenchError("the candidates hold no pooler; this arm is for models that have one")
