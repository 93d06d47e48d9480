"""Find the frozen linear layers of a model that an adapter may sit on."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from heterolora.errors import ModelError, SearchSpaceError

__all__ = [
    "Site",
    "find_sites",
    "head_modules",
    "head_names",
    "heads_to_save",
    "linear_sites",
    "lookalikes",
    "task_type",
]

# What PEFT's task-specific model classes train in full by themselves, and so never adapt.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_HEADS = ("classifier", "score", "qa_outputs")
# Classes whose head transformers makes anew for the task, so that no pretrained weight is in it.
_NEW_HEAD = ("Classification", "QuestionAnswering", "MultipleChoice")


@dataclass(frozen=True)
class Site:
    """A frozen linear layer y = x W^T + b with x of `in_features` and y of `out_features` columns.

    `conv1d` marks transformers' Conv1D, which stores W transposed ([in_features, out_features]).
    """

    name: str
    in_features: int
    out_features: int
    conv1d: bool = False

    @property
    def unit_cost(self) -> int:
        """LoRA parameters per unit of rank: a row of A [r, in] and a column of B [out, r]."""
        return self.in_features + self.out_features

    @property
    def max_rank(self) -> int:
        """The rank of W at most, and so of any update of it."""
        return min(self.in_features, self.out_features)


def task_type(model: nn.Module) -> str | None:
    """PEFT's task type of `model`, read from its class name, or None for a plain `PeftModel`.

    PEFT's task classes hand `input_ids` to the model by name, so a model with another main input
    (audio, pixels) gets None: with a task type its forward pass would fail inside PEFT.
    """
    if getattr(model, "main_input_name", None) != "input_ids":
        return None
    config = getattr(model, "config", None)
    for name in (cls.__name__ for cls in type(model).__mro__):
        if name.endswith("ForSequenceClassification"):
            return "SEQ_CLS"
        if name.endswith("ForTokenClassification"):
            return "TOKEN_CLS"
        if name.endswith("ForQuestionAnswering"):
            return "QUESTION_ANS"
        if name.endswith("ForConditionalGeneration"):
            seq2seq = getattr(config, "is_encoder_decoder", False)
            return "SEQ_2_SEQ_LM" if seq2seq else "CAUSAL_LM"
        if name.endswith(("ForCausalLM", "LMHeadModel")):
            # PEFT's class for these keeps the method, which a model that cannot generate lacks.
            return "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None
    return None


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the task heads of `model` that are trained in full and so are never candidates.

    For the task types whose PEFT class trains the head by itself these are the names it uses; for
    any other model, the direct children that carry one of those names. A task class of transformers
    with none of them (BART's and T5's `classification_head`, XLNet's `logits_proj`) has its head
    in what lies beside the base model. Of a class of somebody else's nobody knows what is new.
    """
    kind = task_type(model)
    children = dict(model.named_children())
    names = _TASK_HEADS.get(kind, ()) if kind else tuple(n for n in _HEADS if n in children)
    if any(name.endswith(names) for name, _ in model.named_modules() if names):
        return names
    return _beside_base(model) or names


def heads_to_save(model: nn.Module) -> tuple[str, ...]:
    """Those of `head_names` that PEFT has to be told to train in full (`modules_to_save`): its
    class for the task type adds its own by itself."""
    own = _TASK_HEADS.get(task_type(model) or "", ())
    return tuple(name for name in head_names(model) if name not in own)


def head_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that PEFT trains in full for `head_names`: all whose name ends in one of them, as
    DistilBERT's `pre_classifier` does. None where the model has no head that is trained in full.
    """
    names = head_names(model)
    return [m for name, m in model.named_modules() if names and name.endswith(names)]


def _beside_base(model: nn.Module) -> tuple[str, ...]:
    children = dict(model.named_children())
    base = getattr(model, "base_model_prefix", "")
    task = next((cls for cls in type(model).__mro__ if cls.__name__.endswith(_NEW_HEAD)), None)
    made_anew = task is not None and task.__module__.startswith("transformers.")
    # Without the base model as one child, pretrained parts may be among the others.
    if not made_anew or base not in children:
        return ()
    # PEFT goes by the ending, so a head named as a part of the base would take that along.
    inner = [name for name, _ in children[base].named_modules()]
    return tuple(
        name
        for name, child in children.items()
        if name != base
        and list(child.parameters())
        and not any(other.endswith(name) for other in inner)
    )


def linear_sites(model: nn.Module) -> list[Site]:
    """Every `nn.Linear` (subclasses too, such as quantised ones) and Conv1D, in model order."""
    from transformers.pytorch_utils import Conv1D

    sites = []
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            sites.append(Site(name, module.weight.shape[0], module.nf, conv1d=True))
        elif isinstance(module, nn.Linear):
            sites.append(Site(name, module.in_features, module.out_features))
    return sites


def find_sites(model: nn.Module, target_modules: str | Sequence[str] | None = None) -> list[Site]:
    """The linear layers that PEFT would adapt for `target_modules`, in model order.

    `target_modules` means what it means to `peft.LoraConfig`: "all-linear" (also the meaning of
    None here), a list of names or name suffixes, or a regular expression for full names. PEFT's own
    matching decides, so output embeddings are left out exactly where PEFT does so; what is in
    `head_modules` is left out always.

    Raises:
        ModelError: not a module, already adapted by PEFT, on the meta device, or without linears.
        SearchSpaceError: `target_modules` is malformed, matches nothing (the message names the
            closest layers), or matches a layer that is not linear.
    """
    _check_plain(model)
    linears = {site.name: site for site in linear_sites(model)}
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no linear layer (nn.Linear or Conv1D), so there is "
            "nothing to put a LoRA adapter on"
        )
    wanted = "all-linear" if target_modules is None else target_modules
    matched = _matched_names(model, wanted)
    if not matched:
        raise SearchSpaceError(_no_match(wanted, linears, head_names(model)))
    modules = dict(model.named_modules())
    for name in matched:
        if name not in linears:
            raise SearchSpaceError(
                f"target_modules={wanted!r} matches {name!r}, a {type(modules[name]).__name__}: "
                "only nn.Linear and Conv1D layers can be candidates; narrow the list or pattern"
            )
    return [linears[name] for name in matched]


def _check_plain(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a model (torch.nn.Module), got {type(model).__name__}")
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if isinstance(model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} already carries PEFT adapters; pass the base model "
            "(`peft_model.unload()` returns it)"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ModelError("the model's weights are on the meta device; load them first")


def _matched_names(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import (
        _maybe_include_all_linear_layers,
        check_target_module_exists,
    )

    config = LoraConfig(
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        task_type=task_type(model),
        modules_to_save=list(head_names(model)) or None,
    )
    _maybe_include_all_linear_layers(config, model)
    names = [name for name, _ in model.named_modules() if name]
    # PEFT does not leave out all of them, and then cannot make the model.
    full = {part for head in head_modules(model) for part in head.modules()}
    try:
        matched = [
            name
            for name, module in model.named_modules()
            if name and module not in full and check_target_module_exists(config, name)
        ]
    except re.error as error:
        raise SearchSpaceError(
            f"target_modules={wanted!r} is not a valid regular expression: {error}"
        ) from None
    if matched and not isinstance(wanted, str):
        for entry in wanted:
            if not any(name == entry or name.endswith(f".{entry}") for name in names):
                warnings.warn(
                    f"target_modules entry {entry!r} matches no module of {type(model).__name__}",
                    stacklevel=4,
                )
    return matched


def _no_match(wanted: str | Sequence[str], linears: dict[str, Site], heads: tuple[str, ...]) -> str:
    entries = [wanted] if isinstance(wanted, str) else list(wanted)
    known = list(linears) + sorted({name.rsplit(".", 1)[-1] for name in linears})
    close: list[str] = []
    for entry in entries:
        close += [
            name for name in difflib.get_close_matches(entry, known, n=3) if name not in close
        ]
    hint = f"closest: {', '.join(close)}" if close else f"linear layers: {', '.join(known[-8:])}"
    note = f"; {', '.join(heads)} is trained in full and never adapted" if heads else ""
    return f"target_modules={wanted!r} matches no linear layer of the model ({hint}){note}"


def lookalikes(model: nn.Module, sites: Sequence[Site]) -> tuple[str, ...]:
    """Modules that are no sites but whose name ends in a site's name: PEFT would adapt them too."""
    names = {site.name for site in sites}
    return tuple(
        name for name, _ in model.named_modules() if name not in names and _endings(name) & names
    )


def _endings(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
