"""A quantised linear layer for tests: int8 weights, one scale a row, dequantised in its forward."""

import torch
from helpers import CountOps
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear


class Int8Linear(nn.Linear):
    """Stands in for a quantised layer; PEFT takes it for an nn.Linear."""

    @classmethod
    def of(cls, dense: nn.Linear) -> "Int8Linear":
        layer = cls(dense.in_features, dense.out_features, bias=dense.bias is not None)
        scale = dense.weight.detach().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        codes = (dense.weight.detach() / scale).round().to(torch.int8)
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.register_buffer("scale", scale)
        layer.bias = dense.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def quantise_bases(model: nn.Module, only: str = "") -> nn.Module:
    """Every dense base layer of a PEFT model whose name holds `only`, quantised in place.

    After PEFT has wrapped it, so that the ranks are those of the dense model.
    """
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, lora.Linear) and only in name and type(layer.base_layer) is nn.Linear:
            layer.base_layer = Int8Linear.of(layer.base_layer)
    return model


def added(ops: CountOps) -> tuple[int, int]:
    """How often the op and the backward op ran."""
    return ops.counts["heterolora::low_rank_add_"], ops.backward
