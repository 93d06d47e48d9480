"""Turn an allocation into a trainable model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from heterolora.errors import ModelError
from heterolora.fusion.fuse import fuse
from heterolora.search.allocation import Allocation
from heterolora.search.sites import Site, find_sites, linear_sites
from heterolora.shortcuts.model import KINDS, add_shortcuts, shortcut_candidates

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapt"]


def adapt(model: nn.Module, allocation: Allocation) -> PeftModel:
    """`model` as a PeftModel with the ranks and shortcuts of `allocation`, its LoRA layers fused
    where possible.

    `model` is changed in place, as by `peft.get_peft_model`. Factors A are drawn from torch's
    global random state, those of the modules first.

    Raises:
        ModelError: the model is not plain, lacks a module or a shortcut of the allocation or has it
            in another size or kind, or holds further modules that the configuration would adapt.
        ShortcutError: the allocation has shortcuts, and the model's layers cannot be read.
    """
    from peft import get_peft_model

    find_sites(model)  # refuses what cannot take an adapter at all
    _check_sites(model, allocation)
    _check_shortcuts(model, allocation)
    config = allocation.lora_config
    chosen = {name: rank for name, rank in allocation.ranks.items() if rank > 0}
    if not isinstance(config.target_modules, str):
        for name, _ in model.named_modules():
            ending = next((c for c in chosen if name.endswith(f".{c}")), None)
            if ending is not None and name not in chosen:
                raise ModelError(
                    f"{name!r} is not in the allocation, but ends in the name of {ending!r}, so "
                    "PEFT would adapt it too; allocate on this model"
                )
    peft_model = get_peft_model(model, config)
    shortcuts = {name: rank for name, rank in allocation.shortcuts.items() if rank > 0}
    if shortcuts:
        alphas = {name: allocation.shortcut_scaling * rank for name, rank in shortcuts.items()}
        add_shortcuts(peft_model, KINDS, shortcuts, alphas, allocation.mapping)
    fuse(peft_model)
    return peft_model


def _check_sites(model: nn.Module, allocation: Allocation) -> None:
    present = {site.name: site for site in linear_sites(model)}
    for name, site in allocation.sites.items():
        found = present.get(name)
        if found is None:
            raise ModelError(
                f"{type(model).__name__} has no linear layer {name!r}, which the allocation names; "
                "use the model it was made for, or allocate again"
            )
        if found != site:
            raise ModelError(
                f"{name!r} is {_described(found)} in this model and {_described(site)} in the "
                "allocation; use the model it was made for, or allocate again"
            )


def _check_shortcuts(model: nn.Module, allocation: Allocation) -> None:
    if not allocation.shortcuts:
        return
    present = {found.name: found for found in shortcut_candidates(model, KINDS, allocation.mapping)}
    for name, candidate in allocation.shortcut_candidates.items():
        if present.get(name) != candidate:
            raise ModelError(
                f"{type(model).__name__} has no shortcut {name!r} of width {candidate.width} in "
                f"layer {candidate.layer}, which the allocation names; use the model it was made "
                "for, or allocate again"
            )


def _described(site: Site) -> str:
    kind = "Conv1D" if site.conv1d else "Linear"
    return f"{kind}({site.in_features}, {site.out_features})"
