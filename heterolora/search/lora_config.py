"""Ranks as a `peft.LoraConfig`, so that PEFT and those who serve its files understand them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from heterolora.search.sites import Site

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lora_config"]


def lora_config(
    sites: Mapping[str, Site],
    ranks: Mapping[str, int],
    scaling: float,
    *,
    lookalikes: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    task_type: str | None = None,
) -> LoraConfig:
    """The configuration that gives each of these modules its rank, and every other module none.

    `r` is the largest rank and alpha_i/r_i = alpha/r for every module, because vLLM and SGLang
    ignore `alpha_pattern` and take the global scale. Pattern keys are anchored full names.
    `target_modules` lists full names; if one of them is the ending of another module's name, which
    PEFT would then adapt too, it is a regular expression of exactly these names instead.

    Args:
        sites, lookalikes, modules_to_save, task_type: as of `Allocation`.
        ranks: {module name: rank}, not all 0.
        scaling: alpha/r.
    """
    from peft import LoraConfig

    chosen = {name: rank for name, rank in ranks.items() if rank > 0}
    top = max(chosen.values())
    others = {f"^{re.escape(name)}": rank for name, rank in chosen.items() if rank != top}
    rest = [*(name for name in ranks if name not in chosen), *lookalikes]
    leaks = any(other.endswith(f".{name}") for name in chosen for other in rest)
    return LoraConfig(
        r=top,
        lora_alpha=_alpha(scaling, top),
        target_modules="|".join(map(re.escape, chosen)) if leaks else list(chosen),
        rank_pattern=others,
        alpha_pattern={key: _alpha(scaling, rank) for key, rank in others.items()},
        modules_to_save=list(modules_to_save) or None,
        task_type=task_type,
        fan_in_fan_out=all(sites[name].conv1d for name in chosen),
    )


def _alpha(scaling: float, rank: int) -> int | float:
    alpha = scaling * rank
    return int(alpha) if alpha == int(alpha) else alpha
