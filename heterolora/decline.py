"""Why a PEFT LoRA layer cannot take the fused path right now.

A declined layer runs PEFT's own forward, so its result is PEFT's to the bit. The checks run at
every call, because most of what they look at (merging, adapters, training mode) changes between
calls; each is a few attribute reads.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["call_reason", "input_reason", "layer_reason"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Parameter, Tensor)


def layer_reason(layer: Any) -> str | None:
    """Reason to decline whatever the input is, or None.

    Args:
        layer: any PEFT LoRA layer.
    """
    if type(layer) is not Linear:
        return _kind_reason(layer)
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "adapter merged into the base weight"
    factors_a = layer.lora_A
    active = [name for name in layer.active_adapters if name in factors_a]
    if not active:
        return "no active adapter"
    if len(active) > 1:
        return f"several active adapters ({', '.join(active)})"
    name = active[0]
    if name in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias[name]:
        return "lora_bias: B has a bias"
    dropout = layer.lora_dropout[name]
    if type(dropout) is not nn.Identity and dropout.training:
        p = getattr(dropout, "p", None)
        if type(dropout) is not nn.Dropout or p:
            return f"active dropout (p={p})" if p else f"active {type(dropout).__name__}"
    if _hooked(dropout):
        return "forward hooks on lora_dropout"
    base = layer.base_layer
    return (
        _base_reason(base)
        or _factor_reason("lora_A", factors_a[name], base.weight)
        or _factor_reason("lora_B", layer.lora_B[name], base.weight)
    )


def input_reason(layer: Any, x: Any) -> str | None:
    """Reason to decline this input for a layer that :func:`layer_reason` accepts, or None."""
    weight = layer.base_layer.weight
    if type(x) not in _PLAIN:
        return f"input is a {type(x).__name__}"
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return f"input of shape {tuple(x.shape)}"
    if x.device != weight.device:
        return f"input on {x.device}, weight on {weight.device}"
    if x.dtype == weight.dtype:
        return None
    if (
        not torch.is_autocast_enabled(x.device.type)
        or torch.float64 in (x.dtype, weight.dtype)
        or not x.is_floating_point()
    ):
        return f"input is {x.dtype}, weight is {weight.dtype}"
    return None


def call_reason(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Reason to decline the extra arguments of a call, or None."""
    if "adapter_names" in kwargs:
        return "mixed-batch adapter_names"
    if args or kwargs:
        return f"extra arguments ({len(args)} positional, {sorted(kwargs)})"
    return None


def _kind_reason(layer: nn.Module) -> str:
    module = type(layer).__module__.rpartition(".")[2]
    if module in ("aqlm", "awq", "bnb", "eetq", "gptq", "hqq", "inc", "te", "torchao"):
        return f"quantised base ({module})"
    if module == "tp_layer":
        return "tensor-parallel base"
    return f"a lora.{type(layer).__name__} layer, not lora.Linear"


def _base_reason(base: nn.Module) -> str | None:
    # By forward, not by class: a subclass that computes something else must not pass.
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward):
        quantised = hasattr(base, "quant_state") or hasattr(getattr(base, "weight", None), "SCB")
        kind = "quantised base" if quantised else "base is not nn.Linear or Conv1D"
        return f"{kind} ({type(base).__name__})"
    if "forward" in base.__dict__:
        return "forward replaced on the base layer by other code"
    if _hooked(base):
        return "forward hooks on the base layer"
    weight = base.weight
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 partitioned weight"
    if type(weight) not in _PLAIN:
        kind = type(weight).__name__
        return "DTensor weight" if kind == "DTensor" else f"weight is a {kind}"
    if weight.dtype not in _DTYPES:
        return f"unsupported weight dtype {weight.dtype}"
    if base.bias is not None and base.bias.dtype != weight.dtype:
        return f"bias is {base.bias.dtype}, weight is {weight.dtype}"
    if weight.requires_grad and torch.is_grad_enabled():
        return "base weight needs a gradient"
    return None


def _factor_reason(label: str, factor: nn.Module, base_weight: Tensor) -> str | None:
    if type(factor).forward is not nn.Linear.forward or "forward" in factor.__dict__:
        return f"{label} has a forward of its own ({type(factor).__name__})"
    if _hooked(factor):
        return f"forward hooks on {label}"
    weight = factor.weight
    if type(weight) not in _PLAIN:
        return f"{label} is a {type(weight).__name__}"
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 partitioned weight"
    if weight.dtype not in _DTYPES:
        return f"unsupported {label} dtype {weight.dtype}"
    if weight.device != base_weight.device:
        return f"{label} on {weight.device}, base weight on {base_weight.device}"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
