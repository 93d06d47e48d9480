"""Use LoRA layers and shortcuts at less than their rank, and change that while the model trains.

One of rank R is used at rank r by the first r rows of A [R, in] and the first r columns of B
[out, R]; at rank 0 it is switched off. Everything else is *parked*: kept to the bit outside of the
parameters, which hold zeros in its place. So the parameters always say what the model computes now:
PEFT's own forward, `merge`, `save_pretrained` and `state_dict` need to know nothing of this.

The scale stays alpha/R at every rank, as if the layer had rank r and alpha r * (alpha/R).

"Layer" stands for both below, as their factors are alike: A [R, in], B [out, R].
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from heterolora.errors import ModelError, TrainingError
from heterolora.fusion.interface import rank_in_use, use_rank
from heterolora.fusion.own_base import adds_low_rank
from heterolora.shortcuts.model import Shortcuts

__all__ = ["RankMasks", "parked_count"]


def parked_count(model: nn.Module) -> int:
    """How many layers of `model` are used at less than their full rank."""
    return sum(rank_in_use(module) is not None for module in model.modules())


@dataclass
class _Parked:
    """What is not in use of one layer; the keys of `state` are as in the optimizer's own."""

    a: Tensor
    b: Tensor
    state_a: dict[str, Tensor] = field(default_factory=dict)
    state_b: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        yield from (("a", self.a), ("b", self.b))
        yield from ((f"a.{key}", value) for key, value in self.state_a.items())
        yield from ((f"b.{key}", value) for key, value in self.state_b.items())


class RankMasks:
    """The ranks at which the LoRA layers and shortcuts of one model are used.

    What is parked does not move: its gradient is zero (at rank 0 there is none), and the optimizer
    meets zeros in its place, which weight decay and a moment of zero leave as they are. At rank 0
    the optimizer's state of the layer stays where it is, untouched, step count included. At a rank
    between, the parked rows and columns of every state tensor are parked too; the step count is the
    parameter's and goes on, so that rows that never trained start with Adam's correction of a later
    step.

    LoRA layers at rank 0 have no active adapter in PEFT's sense: they run their base layer alone.
    Shortcuts at rank 0 are no branch of the operation, and their source is not asked for.

    Args:
        model: a `PeftModel` with one LoRA adapter of one rank, and no shortcut of another.

    Attributes:
        adapter: the adapter's name.
        full_rank: R.
        layers: the LoRA layers by their names in the base model.
        shortcuts: the shortcuts by name, "<projection>:<kind>".
        ranks: {name of a LoRA layer or shortcut: rank in use}.

    Raises:
        ModelError: not such a model, or a layer is not plain LoRA on a linear layer.
    """

    def __init__(self, model: Any) -> None:
        self.layers, self.adapter = _plain_layers(model)
        self.shortcuts: dict[str, Any] = {s.name: s for s in Shortcuts.of(model) or ()}
        found = {name: self._factors(name)[0].shape[0] for name in self.layers}
        if len(set(found.values())) > 1:
            raise ModelError(
                f"the LoRA layers have ranks {sorted(set(found.values()))}: a dynamic search needs "
                "one rank, the largest a module may get; adapt with heterolora.search.uniform"
            )
        self.full_rank = next(iter(found.values()))
        computed = next((s for s in self.shortcuts.values() if is_parametrized(s)), None)
        if computed is not None:
            raise ModelError(
                f"shortcut {computed.name} is parametrised, and a dynamic search switches plain "
                "ones; add it without the parametrization"
            )
        other = next((s for s in self.shortcuts.values() if s.rank != self.full_rank), None)
        if other is not None:
            raise ModelError(
                f"shortcut {other.name} has rank {other.rank}, and the LoRA layers have rank "
                f"{self.full_rank}: a dynamic search needs one rank, the largest a module may get; "
                f"add_shortcuts(model, rank={self.full_rank})"
            )
        self.ranks = dict.fromkeys([*self.layers, *self.shortcuts], self.full_rank)
        self._parked: dict[str, _Parked] = {}
        for name in self.ranks:
            # Of masks whose parked values are lost or, after a resume, out of date.
            self._unmark(name)

    def shape(self, name: str) -> tuple[int, int]:
        """(in, out) of a layer."""
        a, b = self._factors(name)
        return a.shape[1], b.shape[0]

    def scale(self, name: str) -> float:
        """alpha/R of a layer."""
        if name in self.shortcuts:
            return float(self.shortcuts[name].scale)
        return float(self.layers[name].scaling[self.adapter])

    def apply(self, ranks: Mapping[str, int], optimizer: Any = None) -> None:
        """Use every layer at its rank in `ranks`.

        Raises:
            ModelError: a layer is missing, or a rank is not in 0..R.
            TrainingError: a rank is between 0 and R, and the optimizer keeps a state that has no
                rows and columns of its parameter.
        """
        for name in self.ranks.keys() | ranks.keys():
            rank = ranks.get(name)
            if name not in self.ranks or rank is None or not 0 <= rank <= self.full_rank:
                raise ModelError(f"{name!r} at rank {rank}: there is no such layer or rank")
        self.lift(optimizer)
        for name in self.ranks:
            if 0 < ranks[name] < self.full_rank:
                self._check_state(name, optimizer)
        for name in self.ranks:
            if ranks[name] < self.full_rank:
                self._parked[name] = self._taken(name, ranks[name], optimizer)
                self._mark(name, ranks[name])

    def lift(self, optimizer: Any = None) -> None:
        """Use every layer at its full rank, with what was parked back in its place."""
        for name, parked in self._parked.items():
            with torch.no_grad():
                for part, value in parked.named():
                    if (target := self._target(name, part, optimizer)) is not None:
                        target.copy_(value)
            self._unmark(name)
        self._parked.clear()

    def drop_gradients(self) -> None:
        """Take the gradients of switched-off layers away.

        Where another copy of the model or DDP has filled them with zeros, the optimizer would count
        a step and apply its moments.
        """
        for name, rank in self.ranks.items():
            if rank == 0:
                for factor in self._factors(name):
                    factor.grad = None

    def check_optimizer(self, optimizer: Any) -> None:
        """Look whether the optimizer leaves alone what is parked.

        Raises:
            TrainingError: it does not, or keeps a state that cannot be parked.
        """
        for name in self._parked:
            if self.ranks[name]:
                self._check_state(name, optimizer)
        if not self.parked_is_zero():
            raise TrainingError(
                f"{_kind(optimizer)} moves parameters that are zero and get no gradient, so parts "
                "of a layer cannot be switched off; use AdamW, or ranks of 0 and the full rank"
            )

    def parked_is_zero(self) -> bool:
        """Whether the parameters hold zeros where values are parked; False after a wrong load."""
        targets = [self._target(name, part, None) for name in self._parked for part in ("a", "b")]
        return not any(bool(target.any()) for target in targets if target is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Everything parked, by "module name|part"; copies of nothing."""
        return {
            f"{name}|{part}": value
            for name, parked in self._parked.items()
            for part, value in parked.named()
        }

    def load(self, ranks: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Take `ranks` and what :meth:`tensors` gave, for parameters that hold zeros there already.

        Raises:
            ModelError: they do not belong to this model; the message names the entry.
        """
        if ranks.keys() != self.ranks.keys():
            other = min(ranks.keys() ^ self.ranks.keys())
            raise ModelError(
                f"{other!r} is a LoRA layer or shortcut of only one of the model and the masks"
            )
        self._parked.clear()
        for name, rank in ranks.items():
            if not 0 <= rank <= self.full_rank:
                raise ModelError(f"{name!r} has rank {rank}, and the model {self.full_rank}")
            if rank == self.full_rank:
                continue
            views = {"a": self._cut(name, "a", rank), "b": self._cut(name, "b", rank)}
            a, b = (_checked(tensors, name, part, views[part]) for part in ("a", "b"))
            found = _Parked(a, b)
            for key in tensors:
                owner, _, part = key.rpartition("|")
                side, _, entry = part.partition(".")
                if owner == name and entry and side in views:
                    state = found.state_a if side == "a" else found.state_b
                    state[entry] = _checked(tensors, name, part, views[side], same_dtype=False)
            self._parked[name] = found
            self._mark(name, rank)

    def _factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        if name in self.shortcuts:
            return self.shortcuts[name].a, self.shortcuts[name].b
        layer = self.layers[name]
        return layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight

    def _cut(self, name: str, side: str, rank: int, of: Tensor | None = None) -> Tensor:
        """What of A or B, or of a tensor of its shape, is not in use at `rank`; a view."""
        a, b = self._factors(name)
        if side == "a":
            return (a if of is None else of).detach()[rank:]
        return (b if of is None else of).detach()[:, rank:]

    def _target(self, name: str, part: str, optimizer: Any) -> Tensor | None:
        """Where a parked value belongs; None for a state that the optimizer does not hold (yet)."""
        side, _, key = part.partition(".")
        rank = self.ranks[name]
        if not key:
            return self._cut(name, side, rank)
        factor = self._factors(name)["ab".index(side)]
        value = _state(optimizer, factor).get(key)
        return None if value is None else self._cut(name, side, rank, value)

    def _taken(self, name: str, rank: int, optimizer: Any) -> _Parked:
        a, b = self._cut(name, "a", rank), self._cut(name, "b", rank)
        parked = _Parked(a.clone(), b.clone())
        with torch.no_grad():
            a.zero_()
            b.zero_()
            sides = zip("ab", self._factors(name), (parked.state_a, parked.state_b), strict=True)
            for side, factor, state in sides if rank else ():
                for key, value in _state(optimizer, factor).items():
                    if isinstance(value, Tensor) and value.shape == factor.shape:
                        part = self._cut(name, side, rank, value)
                        state[key] = part.clone()
                        part.zero_()
        return parked

    def _mark(self, name: str, rank: int) -> None:
        layer = self.shortcuts.get(name) or self.layers[name]
        use_rank(layer, rank)
        self.ranks[name] = rank
        if rank == 0 and name in self.layers:
            _set_active(layer, [])

    def _unmark(self, name: str) -> None:
        layer = self.shortcuts.get(name) or self.layers[name]
        if rank_in_use(layer) == 0 and name in self.layers:
            _set_active(layer, [self.adapter])
        use_rank(layer, None)
        self.ranks[name] = self.full_rank

    def _check_state(self, name: str, optimizer: Any) -> None:
        for factor in self._factors(name):
            for key, value in _state(optimizer, factor).items():
                if not isinstance(value, Tensor):
                    continue
                elementwise = value.shape == factor.shape and value.is_floating_point()
                if not elementwise and value.numel() != 1:
                    raise TrainingError(
                        f"{_kind(optimizer)} keeps {key!r} of shape {tuple(value.shape)} "
                        f"({value.dtype}) for a parameter of shape {tuple(factor.shape)}, so a "
                        "part of a layer cannot be switched off; use AdamW, or ranks of 0 and the "
                        "full rank"
                    )


def _plain_layers(model: Any) -> tuple[dict[str, Any], str]:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(model, PeftModel):
        raise ModelError(f"a PeftModel is needed, not {type(model).__name__}: adapt it first")
    if len(model.peft_config) != 1:
        raise ModelError(
            f"the model has {len(model.peft_config)} adapters ({', '.join(model.peft_config)}), "
            "and a dynamic search needs exactly one; delete_adapter the others"
        )
    (adapter,) = model.peft_config
    layers: dict[str, Any] = {}
    owners: dict[int, str] = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        what = None
        if adapter not in layer.lora_A or not adds_low_rank(layer):
            what = f"a lora.{type(layer).__name__} layer"
        elif adapter in layer.lora_variant:
            what = f"a {type(layer.lora_variant[adapter]).__name__}"
        elif layer.lora_bias[adapter]:
            what = "LoRA with a bias on B"
        elif layer.merged:
            what = "merged into its base weight"
        elif is_parametrized(layer.lora_A[adapter]) or is_parametrized(layer.lora_B[adapter]):
            # Their values are computed anew at every call, so none can be parked.
            what = "LoRA with a parametrised factor"
        if what is not None:
            raise ModelError(
                f"{name!r} is {what}, and a dynamic search switches plain LoRA on linear layers; "
                "leave the module out of target_modules"
            )
        for factor in (layer.lora_A[adapter].weight, layer.lora_B[adapter].weight):
            if owners.setdefault(id(factor), name) != name:
                raise ModelError(
                    f"{name!r} and {owners[id(factor)]!r} share a LoRA factor, so one cannot be "
                    "switched off without the other; leave one out of target_modules"
                )
        layers[name] = layer
    if not layers:
        raise ModelError(f"{type(model).__name__} carries no LoRA layer")
    return layers, adapter


def _set_active(layer: Any, adapters: list[str]) -> None:
    # PEFT also sets requires_grad by it. That stays: a parameter that is switched off belongs to
    # the optimizer and to DDP all the same.
    before = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(adapters)
    for parameter, requires_grad in before:
        parameter.requires_grad_(requires_grad)


def _state(optimizer: Any, parameter: Tensor) -> Mapping[str, Any]:
    state: Mapping[str, Any] = {} if optimizer is None else optimizer.state.get(parameter, {})
    return state


def _kind(optimizer: Any) -> str:
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _checked(
    tensors: Mapping[str, Tensor], name: str, part: str, like: Tensor, same_dtype: bool = True
) -> Tensor:
    key = f"{name}|{part}"
    if key not in tensors:
        raise ModelError(f"{key!r} is missing")
    value = tensors[key]
    if value.shape != like.shape or (same_dtype and value.dtype != like.dtype):
        raise ModelError(
            f"{key!r} is {tuple(value.shape)} {value.dtype}, and {tuple(like.shape)} {like.dtype} "
            "is expected"
        )
    return value.to(like.device).clone()
