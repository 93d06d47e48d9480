"""The arms: how each gets from a fresh model and a budget to a model that trains.

An arm is a line in `ARMS`: a name, the family it shares a learning rate with, what it is, and a
function from a `Setting` to an `Adapted` model. One that scores with `heterolora.allocate` needs no
function of its own: ``Arm("name", "uniform", "...", allocated("proxy", ranks=...))``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from heterolora.bench.evidence import outside
from heterolora.bench.evidence.setting import Adapted, Setting, onto
from heterolora.search import (
    Allocation,
    Budget,
    DynamicSearchCallback,
    allocate,
    uniform,
)

__all__ = ["ARMS", "Arm", "allocated", "families", "shuffled"]

# The paper's form: a module has four times the average rank or none, so a quarter of them is on.
ON_OFF = 4


@dataclass(frozen=True)
class Arm:
    """One way to spend a budget.

    Attributes:
        family: arms of one family train at the learning rate that `families` chose for it.
        about: a line for the list of arms.
        build: adapts the fresh model of a setting.
    """

    name: str
    family: str
    about: str
    build: Callable[[Setting], Adapted]


def allocated(
    proxy: str, *, on_off: bool = False, ranks: Sequence[int] | None = None, **options: Any
) -> Callable[[Setting], Adapted]:
    """Builds a model with the ranks of `heterolora.allocate`.

    Args:
        proxy: as of `allocate`.
        on_off: a module has `ON_OFF` times the average rank or none.
        ranks: what a module may have; by default that of `SearchSpace`.
        options: further arguments of `allocate`.
    """

    def build(setting: Setting) -> Adapted:
        chosen = (0, ON_OFF * setting.rank) if on_off else ranks
        return onto(setting, _search(setting, proxy, chosen, **options))

    return build


def _search(
    setting: Setting,
    proxy: str,
    ranks: Sequence[int] | None = None,
    budget: Budget | None = None,
    **options: Any,
) -> Allocation:
    space = setting.space if ranks is None else replace(setting.space, ranks=tuple(ranks))
    return allocate(
        setting.model,
        setting.batches(),
        budget=budget or Budget(rank=setting.rank),
        proxy=proxy,
        space=space,
        seed=setting.seed,
        **options,
    )


def _uniform(setting: Setting) -> Adapted:
    return onto(setting, uniform(setting.model, setting.rank, setting.space))


def shuffled(proxy: str, **options: Any) -> Callable[[Setting], Adapted]:
    """Builds a model with the ranks of `allocated`, dealt anew among modules of equal cost.

    So the parameters, the ranks and the share of each kind of module stay, and what is lost is only
    which of them the proxy preferred.
    """

    def build(setting: Setting) -> Adapted:
        found = _search(setting, proxy, **options)
        draw = random.Random(setting.seed)
        ranks = dict(found.ranks)
        for cost in {site.unit_cost for site in found.sites.values()}:
            names = [name for name, site in found.sites.items() if site.unit_cost == cost]
            dealt = draw.sample(names, len(names))
            ranks.update(
                {name: found.ranks[other] for name, other in zip(names, dealt, strict=True)}
            )
        return onto(setting, replace(found, ranks=ranks))

    return build


def _dynamic(proxy: str) -> Callable[[Setting], Adapted]:
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


def _shortcuts(setting: Setting) -> Adapted:
    """LoRA of the given rank everywhere, and every shortcut at that rank and scale too."""
    from heterolora.shortcuts import add_shortcuts

    adapted = _uniform(setting)
    names = add_shortcuts(adapted.model, rank=setting.rank, alpha=2 * setting.rank)
    adapted.notes["shortcuts"] = len(names)
    return adapted


def _higher(setting: Setting) -> Adapted:
    """LoRA at the parameters of `shortcuts-all`: two neighbouring ranks, the modules at random."""
    from heterolora.shortcuts import shortcut_candidates

    plain = uniform(setting.model, setting.rank, setting.space)
    more = sum(candidate.unit_cost for candidate in shortcut_candidates(setting.model))
    budget = plain.parameters + setting.rank * more
    low = budget // sum(site.unit_cost for site in plain.sites.values())
    found = _search(setting, "constant", (low, low + 1), Budget(params=budget))
    return onto(setting, found)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("uniform", "uniform", "the same rank everywhere", _uniform),
        Arm("random", "uniform", "all scores 1: sizes and seed decide", allocated("constant")),
        Arm(
            "random-onoff",
            "on-off",
            "a random quarter of the modules at four times the rank",
            allocated("constant", on_off=True),
        ),
        Arm("shuffled", "uniform", "grad-norm's ranks, dealt anew", shuffled("grad-norm")),
        Arm("grad-norm", "uniform", "ranks by gradient norm", allocated("grad-norm")),
        Arm(
            "grad-norm-onoff",
            "on-off",
            "HeteroLoRA's form: the top quarter by gradient norm",
            allocated("grad-norm", on_off=True),
        ),
        Arm("snip", "uniform", "ranks by SNIP", allocated("snip")),
        Arm("synflow", "uniform", "ranks by SynFlow", allocated("synflow")),
        Arm("eva", "eva", "PEFT's EVA, rho 2", outside.eva),
        Arm("adalora", "adalora", "PEFT's AdaLoRA, from twice the rank", outside.adalora),
        Arm(
            "dynamic-grad-norm",
            "dynamic",
            "HeteroLoRA's dynamic form, by gradient norm",
            _dynamic("grad-norm"),
        ),
        Arm("shortcuts-all", "shortcuts", "uniform, and all four kinds of shortcut", _shortcuts),
        Arm("lora-higher", "uniform", "LoRA at the parameters of shortcuts-all", _higher),
    )
}

# The arm that chooses the learning rate of a family, where it is not the family's namesake.
_REPRESENTATIVES = {
    "on-off": "random-onoff",
    "dynamic": "dynamic-grad-norm",
    "shortcuts": "shortcuts-all",
}


def families(arms: Sequence[str]) -> dict[str, str]:
    """{family: the arm that chooses its learning rate} of these arms, in their order."""
    names = dict.fromkeys(ARMS[arm].family for arm in arms)
    return {family: _REPRESENTATIVES.get(family, family) for family in names}
