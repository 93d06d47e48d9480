"""`fuse` and `unfuse`: run a PEFT LoRA model's layers through the group op, and back."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from heterolora.errors import FuseError

__all__ = ["FuseReport", "fuse", "unfuse"]

_BACKENDS = ("auto", "aten", "triton")

# Rows for which the report says what "auto" takes: a training batch.
_ROWS = 8192


@dataclass(frozen=True)
class FuseReport:
    """What became of every LoRA layer; names as in the base model, as in `Allocation.ranks`.

    Attributes:
        fused: what each fused layer runs on: "aten" or "triton", followed by ", own base matmul"
            where the base layer runs by itself (quantised, hooked, any forward of its own) and the
            low-rank part is added to its output. Under "auto" every call chooses for its number of
            rows; named is the choice for the example's, without one for 8192.
        left: why each layer that could be fused runs PEFT's own forward, which is expected to be
            faster at the example's size. Only under "auto".
        declined: why each other layer keeps PEFT's own forward for now. Reasons that can pass
            (merged, disabled, active dropout, ...) are looked at again at every call.
        groups: layers known so far to share one input, which run as one operation.
        why: of each layer's path under "auto", with the times expected for its group, forward and
            backward, in milliseconds.
        advice: what would make "auto" surer on this device, or "".
    """

    fused: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    advice: str = ""

    def table(self) -> str:
        """One line a layer: its name, the path it runs on, and why."""
        rows = [
            *((name, path, self.why.get(name, "")) for name, path in self.fused.items()),
            *((name, "peft", why) for name, why in self.left.items()),
            *((name, "peft", f"declined: {why}") for name, why in self.declined.items()),
        ]
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {path}  {why}".rstrip() for name, path, why in rows)

    def __str__(self) -> str:
        lines = [
            f"{len(self.fused)} LoRA layers fused, {len(self.declined)} declined, "
            + (f"{len(self.left)} left to PEFT, " if self.left else "")
            + f"{len(self.groups)} groups"
        ]
        paths = [(f"fused, {path}", self.why.get(name, "")) for name, path in self.fused.items()]
        paths += [("left to PEFT", why) for why in self.left.values()]
        lines += [
            f"  {path}: {count}" + (f" ({why})" if why else "")
            for (path, why), count in sorted(Counter(paths).items())
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.declined.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  declined, {why}: {', '.join(names)}" for why, names in reasons.items()]
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])


def fuse(
    model: nn.Module,
    *,
    strict: bool = False,
    backend: str = "auto",
    example: Mapping[str, Any] | None = None,
    captured: bool = False,
) -> FuseReport:
    """Run the LoRA layers of a PEFT model on the fused path, in place and reversibly.

    Parameters, module names and what `save_pretrained` writes stay PEFT's; only the `forward` of
    each layer instance is bound. Layers that share an input are found while the model runs and then
    run as one operation: from the second forward pass on, or from the first if `example` is given.
    Calling it again picks up layers that came since.

    Args:
        model: a `PeftModel`, or any model with LoRA layers injected.
        strict: raise instead of declining any layer.
        backend: "aten" (matmuls), "triton" (the project's kernels; the only one with active
            dropout), or "auto": for each group and number of rows what was measured or else is
            expected to be the fastest, PEFT's own layers included.
        example: keyword arguments of one forward pass, on the model's device. Used once, without
            gradients, in evaluation mode and with the random state restored, to find the groups
            before the first step, so that a resumed run repeats the first one to the bit.
        captured: steps will be captured in CUDA graphs, so "auto" counts the host's time for
            nothing.

    Returns:
        The state of every LoRA layer.

    Raises:
        FuseError: no LoRA layer in the model, an unknown backend, `backend="triton"` where that
            cannot run, or a declined layer with `strict=True`; the model is left as it was.
    """
    # Here, so that importing heterolora does not import peft and transformers.
    from heterolora.fusion.binding import Fusion
    from heterolora.fusion.decline import SWITCHED_OFF, dense_weight, layer_reason, nesting_reason
    from heterolora.fusion.own_base import adds_low_rank
    from heterolora.kernels.dispatch import advice
    from heterolora.shortcuts.model import Shortcuts

    if backend not in _BACKENDS:
        raise FuseError(f"unknown backend {backend!r}; choose one of {', '.join(_BACKENDS)}")
    layers = _lora_layers(model)
    if not layers:
        raise FuseError(
            "this model has no LoRA layers; wrap it first: "
            "peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    earlier = model.__dict__.get("_heterolora")
    bound = () if earlier is None else earlier.members
    declined, fused = {}, {}
    for name, layer in layers.items():
        reason = layer_reason(layer, backend) or nesting_reason(layer)
        if reason is None and "forward" in layer.__dict__ and name not in bound:
            reason = "forward replaced on the layer by other code"
        if reason is not None:
            declined[name] = reason
        else:
            fused[name] = _path(name, layer, backend)
    unwanted = {name: reason for name, reason in declined.items() if reason != SWITCHED_OFF}
    if strict and unwanted:
        names = "; ".join(f"{name}: {reason}" for name, reason in unwanted.items())
        raise FuseError(f"strict=True, but {len(unwanted)} layers cannot be fused: {names}")

    unfuse(model)
    free = {
        name: layer
        for name, layer in layers.items()
        if adds_low_rank(layer) and "forward" not in layer.__dict__ and not nesting_reason(layer)
    }
    shortcuts = Shortcuts.of(model)
    attachments = {} if shortcuts is None else shortcuts.attachments
    fusion = Fusion(_entries(model), free, backend, attachments, captured=captured)
    model.__dict__["_heterolora"] = fusion
    if earlier is not None:
        fusion.adopt(earlier)
    if example is not None and fusion.unseen:
        with _undisturbed(model):
            model(**example)
        fusion.commit()
    choices = fusion.choices(fused, _ROWS) if backend == "auto" else {}
    fused |= {name: choice.path for name, choice in choices.items()}
    devices: set[torch.device] = {dense_weight(layers[name]).device for name in choices}
    return FuseReport(
        fused={name: path for name, path in fused.items() if path != "peft"},
        declined=declined,
        groups=tuple(tuple(m.name for m in group.members) for group in fusion.groups),
        left={name: choice.reason for name, choice in choices.items() if choice.path == "peft"},
        why={name: choice.reason for name, choice in choices.items()},
        advice=" ".join(filter(None, map(advice, devices))),
    )


def unfuse(model: nn.Module) -> None:
    """Give every layer PEFT's own forward back. A model that is not fused is left alone."""
    fusion = model.__dict__.pop("_heterolora", None)
    if fusion is not None:
        fusion.remove()


def _path(name: str, layer: Any, backend: str) -> str:
    """What a layer that nothing speaks against runs on, as `FuseReport.fused` has it."""
    from heterolora.fusion.decline import (
        active_adapter,
        dense_weight,
        dropout_probability,
        is_dense,
    )
    from heterolora.kernels import Branch, Site
    from heterolora.kernels.dispatch import choose

    adapter = active_adapter(layer)
    factors = [layer.lora_A[adapter].weight, layer.lora_B[adapter].weight]
    dense = is_dense(layer)
    sites = [Site(dense_weight(layer))] if dense else []
    x = (sites[0].weight if dense else factors[0]).new_empty(1).expand(_ROWS, layer.in_features)
    wanted = "triton" if dropout_probability(layer, adapter) else backend
    try:
        chosen = choose(wanted, x, factors, sites, [Branch(0, *factors)])
    except ValueError as error:
        raise FuseError(f"{name}: {error}") from error
    return chosen if dense else f"{chosen}, own base matmul"


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora.layer import LoraLayer

    root = _entries(model)[-1]
    return {name: m for name, m in root.named_modules() if isinstance(m, LoraLayer)}


def _entries(model: Any) -> list[nn.Module]:
    """The modules a forward pass can start at, outermost first; the last one is the base model."""
    if not hasattr(model, "get_base_model"):
        return [model]
    # A PeftModel's forward calls the tuner, its generate() calls the base model directly.
    return list(dict.fromkeys([model, model.base_model, model.get_base_model()]))


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, and the random state put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
