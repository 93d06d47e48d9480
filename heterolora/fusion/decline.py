"""Why a PEFT LoRA layer cannot take the fused path right now.

A declined layer runs PEFT's own forward, so its result is PEFT's to the bit. `why` is asked once at
every call, because most of what it looks at (merging, adapters, training mode) changes between
calls; each check is a few attribute reads. Only a base layer that runs by itself is looked at once
more, after it has run (`why_output`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from heterolora.fusion.interface import rank_in_use
from heterolora.fusion.own_base import adds_low_rank
from heterolora.kernels.dispatch import triton_reason

__all__ = [
    "SWITCHED_OFF",
    "active_adapter",
    "dense_weight",
    "dropout_probability",
    "is_dense",
    "why",
    "why_layer",
    "why_nested",
    "why_output",
]

# Not a shortcoming: a search wants it so, and PEFT's forward is then the base layer's.
SWITCHED_OFF = "switched off by a search"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (nn.Parameter, Tensor)
_EMPTY: Mapping[str, Any] = {}
# By value: code that replaces one of them for the whole class later is noticed.
_DENSE_FORWARDS = (nn.Linear.forward, Conv1D.forward)


def why(
    layer: Any, backend: str, x: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] = _EMPTY
) -> str | None:
    """Reason to decline this call of a LoRA layer, or None.

    Args:
        layer: any PEFT LoRA layer.
        backend: that of `fuse`.
        x: what the layer is called with.
        args, kwargs: what it is called with besides.
    """
    if "adapter_names" in kwargs:
        return "mixed-batch adapter_names"
    if args or kwargs:
        return f"extra arguments ({len(args)} positional, {sorted(kwargs)})"
    dense = is_dense(layer)
    return _layer_reason(layer, backend, dense) or _input_reason(layer, x, dense)


def why_layer(layer: Any, backend: str = "auto") -> str | None:
    """Reason to decline a LoRA layer now, whatever it is called with, or None.

    Args:
        layer: any PEFT LoRA layer.
        backend: that of `fuse`; "aten" cannot drop out.
    """
    return _layer_reason(layer, backend, is_dense(layer))


def why_nested(layer: Any) -> str | None:
    """Reason to decline a layer whose base holds adapted layers itself, or None.

    They would be called from inside the call that they are to be grouped with.
    """
    nested = any(isinstance(module, BaseTunerLayer) for module in layer.base_layer.modules())
    return "adapter layers inside the base layer" if nested else None


def active_adapter(layer: Any) -> str:
    """The one active adapter of a layer that nothing speaks against."""
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def dropout_probability(layer: Any, name: str) -> float:
    """The probability with which an adapter drops out right now; 0 in evaluation mode."""
    dropout = layer.lora_dropout[name]
    return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0


def is_dense(layer: Any) -> bool:
    """Whether the group op can do the base layer's work: a plain matrix, frozen, nothing attached.

    A layer of which this is not so runs by its own call (:mod:`heterolora.fusion.own_base`).
    """
    base = layer.base_layer
    # By forward, not by class: a subclass that computes something else must not pass.
    if type(layer) is not Linear or type(base).forward not in _DENSE_FORWARDS:
        return False
    weight, bias = base.weight, base.bias
    return (
        "forward" not in base.__dict__
        and not _hooked(base)
        and type(weight) in _PLAIN
        and not hasattr(weight, "ds_id")
        and weight.dtype in _DTYPES
        and (bias is None or bias.dtype == weight.dtype)
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def dense_weight(layer: Any) -> Tensor:
    """The weight [n, k] of a dense base layer."""
    base = layer.base_layer
    # Conv1D keeps its weight as [k, n].
    weight: Tensor = base.weight if isinstance(base, nn.Linear) else base.weight.t()
    return weight


def why_output(layer: Any, x: Tensor, y: Any) -> str | None:
    """Reason why nothing can be added to what the base layer returned for x, or None."""
    if type(y) not in _PLAIN:
        return f"base output is a {type(y).__name__}"
    if y.dtype not in _DTYPES:
        return f"base output is {y.dtype}"
    if y.device != x.device:
        return f"base output on {y.device}, input on {x.device}"
    if y.shape != (*x.shape[:-1], layer.out_features):
        return f"base output of shape {tuple(y.shape)}"
    return None


def _layer_reason(layer: Any, backend: str, dense: bool) -> str | None:
    if not adds_low_rank(layer):
        return _kind_reason(layer)
    if layer.disable_adapters:
        return "adapters disabled"
    if layer.merged:
        return "adapter merged into the base weight"
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if not active:
        return SWITCHED_OFF if rank_in_use(layer) == 0 else "no active adapter"
    if len(active) > 1:
        return f"several active adapters ({', '.join(active)})"
    name = active[0]
    if name in layer.lora_variant:
        return f"LoRA variant {type(layer.lora_variant[name]).__name__}"
    if layer.lora_bias[name]:
        return "lora_bias: B has a bias"
    factor_a, factor_b = layer.lora_A[name], layer.lora_B[name]
    device = layer.base_layer.weight.device if dense else factor_a.weight.device
    return (
        _dropout_reason(layer, name, backend, dense)
        or (None if dense else _own_base_reason(layer))
        or _factor_reason("lora_A", factor_a, device)
        or _factor_reason("lora_B", factor_b, device)
    )


def _input_reason(layer: Any, x: Any, dense: bool) -> str | None:
    if type(x) not in _PLAIN:
        return f"input is a {type(x).__name__}"
    if x.dim() == 0 or x.shape[-1] != layer.in_features:
        return f"input of shape {tuple(x.shape)}"
    if not dense:
        factor = layer.lora_A[active_adapter(layer)].weight
        if x.device != factor.device:
            return f"input on {x.device}, lora_A on {factor.device}"
        return None if x.dtype in _DTYPES else f"input is {x.dtype}"
    weight = layer.base_layer.weight
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


def _kind_reason(layer: nn.Module) -> str:
    if type(layer).__module__.rpartition(".")[2] == "tp_layer":
        return "tensor-parallel base"
    return f"a lora.{type(layer).__name__} layer: more than base(x) + low-rank part"


def _dropout_reason(layer: Any, name: str, backend: str, dense: bool) -> str | None:
    dropout = layer.lora_dropout[name]
    if _hooked(dropout):
        return "forward hooks on lora_dropout"
    if type(dropout) is nn.Identity or not dropout.training:
        return None
    p = float(getattr(dropout, "p", 0.0))
    if type(dropout) is not nn.Dropout:
        return f"active dropout (p={p})" if p else f"active {type(dropout).__name__}"
    if not p:
        return None
    factor = layer.lora_A[name].weight
    # On a CPU "auto" is "aten", and Philox in the kernel is what makes dropout cheap.
    if backend == "aten" or (backend == "auto" and factor.device.type == "cpu"):
        return f"active dropout (p={p})"
    if round(p * 65536) == 65536:
        return f"active dropout (p={p}) that keeps nothing"
    if backend == "triton":
        return None
    compute = layer.base_layer.weight if dense else factor
    reason = triton_reason(compute, [factor, layer.lora_B[name].weight])
    return None if reason is None else f"active dropout (p={p}), but {reason}"


def _own_base_reason(layer: Any) -> str | None:
    base = layer.base_layer
    if getattr(layer, "quant_linear_module", base) is not base:
        return "quant_linear_module is not the base layer"
    weight = getattr(base, "weight", None)
    if hasattr(weight, "ds_id"):
        return "DeepSpeed ZeRO-3 partitioned weight"
    return "DTensor weight" if type(weight).__name__ == "DTensor" else None


def _factor_reason(label: str, factor: nn.Module, device: torch.device) -> str | None:
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
    if weight.device != device:
        return f"{label} on {weight.device}, not on {device}"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
