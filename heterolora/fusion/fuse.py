"""`fuse` and `unfuse`: run a PEFT LoRA model's layers through the group op, and back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heterolora.errors import FuseError
from heterolora.fusion.modules import entries
from heterolora.fusion.own_base import adds_low_rank
from heterolora.fusion.report import FuseReport

if TYPE_CHECKING:
    from heterolora.fusion.fused_model import Fusion

__all__ = ["FuseReport", "fuse", "fusion_of", "unfuse"]

_KEY = "_heterolora"

_BACKENDS = ("auto", "aten", "triton")


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
            dropout), or "auto": for each group and number of rows the fastest of what was measured
            near them, PEFT's own layers included; where nothing was, PEFT's for few rows and "aten"
            for more.
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
    # Here, because these import peft and transformers, which importing heterolora does not.
    from heterolora.fusion.call import How, path_alone
    from heterolora.fusion.decline import SWITCHED_OFF, why_layer, why_nested
    from heterolora.fusion.fused_model import Fusion
    from heterolora.fusion.member import Member

    if backend not in _BACKENDS:
        raise FuseError(f"unknown backend {backend!r}; choose one of {', '.join(_BACKENDS)}")
    layers = _lora_layers(model)
    if not layers:
        raise FuseError(
            "this model has no LoRA layers; wrap it first: "
            "peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    earlier = fusion_of(model)
    bound = () if earlier is None else earlier.layers
    how = How(backend, captured)
    declined, paths = {}, {}
    for name, layer in layers.items():
        reason = why_layer(layer, backend) or why_nested(layer)
        if reason is None and "forward" in layer.__dict__ and name not in bound:
            reason = "forward replaced on the layer by other code"
        if reason is not None:
            declined[name] = reason
        else:
            paths[name] = path_alone(Member(name, layer), how)
    unwanted = {name: reason for name, reason in declined.items() if reason != SWITCHED_OFF}
    if strict and unwanted:
        names = "; ".join(f"{name}: {reason}" for name, reason in unwanted.items())
        raise FuseError(f"strict=True, but {len(unwanted)} layers cannot be fused: {names}")

    unfuse(model)
    # Those declined for now as well: the reason may pass, and is asked for again at every call.
    free = {
        name: layer
        for name, layer in layers.items()
        if adds_low_rank(layer) and "forward" not in layer.__dict__ and not why_nested(layer)
    }
    fusion = Fusion(model, free, how)
    model.__dict__[_KEY] = fusion
    if earlier is not None:
        fusion.adopt(earlier)
    if example is not None and fusion.finder.unseen:
        with _undisturbed(model):
            model(**example)
        fusion.finder.commit()
    return fusion.report(paths, declined)


def unfuse(model: nn.Module) -> None:
    """Give every layer PEFT's own forward back. A model that is not fused is left alone."""
    fusion = model.__dict__.pop(_KEY, None)
    if fusion is not None:
        fusion.remove()


def fusion_of(model: nn.Module) -> "Fusion | None":
    """What `fuse` did to a model, or None where it is not fused."""
    fusion: Fusion | None = model.__dict__.get(_KEY)
    return fusion


def _lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora.layer import LoraLayer

    root = entries(model)[-1]
    return {name: m for name, m in root.named_modules() if isinstance(m, LoraLayer)}


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
