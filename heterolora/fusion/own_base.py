"""Base layers that run by themselves (8-bit, 4-bit, fp8, hooked, any forward of their own).

Their own call gives the output, whatever it does, and the low-rank part is added to that.
"""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["adds_low_rank", "observed", "run_base"]

# PEFT's layer classes whose forward is base(x) + scaling * B(A(dropout(x))), by module and name so
# that none of the packages has to be installed. Read in PEFT 0.21.2. True where the dtype of the
# result is that of the sum under CUDA autocast; elsewhere, and without it, that of the base.
_CLASSES = {
    "layer.Linear": False,
    "aqlm.AqlmLoraLinear": False,
    "awq.AwqLoraLinear": True,
    "bnb.Linear4bit": True,
    "bnb.Linear8bitLt": True,
    "eetq.EetqLoraLinear": True,
    "gptq.GPTQLoraLinear": False,
    "hqq.HqqLoraLinear": True,
    "inc.IncLoraLinear": False,
    "te.TeLinear": False,
    "torchao.TorchaoLoraLinear": False,
}
_PREFIX = "peft.tuners.lora."


def adds_low_rank(layer: nn.Module) -> bool:
    """Whether the layer's class computes the base's output plus the plain low-rank part."""
    return _name(layer) in _CLASSES


def observed(layer: Any) -> bool:
    """Whether code outside of a LoRA layer's base sees its calls: hooks, or a forward put on it."""
    base = layer.base_layer
    return bool(base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__)


def run_base(layer: Any, x: Tensor) -> Any:
    """What the base layer returns for x, in memory and in the dtype that the sum may be in."""
    y = layer.base_layer(x)
    if not isinstance(y, Tensor):
        return y
    if _CLASSES[_name(layer)] and x.device.type == "cuda" and torch.is_autocast_enabled():
        y = y.to(torch.promote_types(y.dtype, torch.get_autocast_dtype("cuda")))
    # A hook may have kept the output, which must not change under its hands.
    return y.clone() if observed(layer) else y


def _name(layer: nn.Module) -> str:
    kind = type(layer)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else ""
