"""PEFT's LoRA on layers of bitsandbytes and torchao, where those are installed, against fused."""

from functools import partial

import pytest
import torch
from helpers import CountOps, error
from peft import LoraConfig, get_peft_model
from quantised import added
from torch import Tensor, nn

import heterolora

PACKAGES = {
    "bitsandbytes 4-bit": "bnb.Linear4bit",
    "bitsandbytes 8-bit": "bnb.Linear8bitLt",
    "torchao int8": "torchao.TorchaoLoraLinear",
}


class Siblings(nn.Module):
    """Two layers that read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(64, 128), nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


def check(package: str, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients at most twice as far as PEFT's own from the exact sum of what the
    quantised layers themselves return and the low-rank part in float64.

    Skips the test where the package is not installed.
    """
    model = _adapted(package, dtype, device)
    layers = [model.get_base_model().left, model.get_base_model().right]
    kinds = {type(layer).__module__ + "." + type(layer).__name__ for layer in layers}
    assert kinds == {"peft.tuners.lora." + PACKAGES[package]}
    torch.manual_seed(2)
    x = torch.randn(2, 5, 64, device=device, dtype=dtype)
    grads = [torch.randn(2, 5, 128, device=device, dtype=dtype) for _ in layers]
    expected, truth = _step(model, x, grads), _truth(layers, x, grads)
    # Without an example: evaluating packs bitsandbytes' 4-bit weights on some CPUs for good, and
    # packed weights cannot train.
    report = heterolora.fuse(model, strict=True)
    assert {path.partition(", ")[2] for path in report.fused.values()} == {"own base matmul"}
    _step(model, x, grads)
    with CountOps() as ops:
        found = _step(model, x, grads)
    assert added(ops) == (1, 1), "the siblings share one op"
    for value, other, exact in zip(found, expected, truth, strict=True):
        assert value.dtype == other.dtype
        # One rounding of the result is allowed even where PEFT happens to be exact.
        assert error(value, exact) <= max(2 * error(other, exact), torch.finfo(dtype).eps)


def _factors(layers: list[nn.Module]) -> list[Tensor]:
    names = ("lora_A", "lora_B")
    return [getattr(layer, name)["default"].weight for layer in layers for name in names]


def _step(model: nn.Module, x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Both outputs, dX, and dA and dB of each layer."""
    base = model.get_base_model()
    x = x.clone().requires_grad_()
    outputs = model(x)
    inputs = [x, *_factors([base.left, base.right])]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, grads)]


def _truth(layers: list[nn.Module], x: Tensor, grads: list[Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    exact = x.detach().double().requires_grad_()
    factors = [factor.detach().double().requires_grad_() for factor in _factors(layers)]
    outputs = []
    dx = torch.zeros_like(exact)
    for layer, a, b, grad in zip(layers, factors[::2], factors[1::2], grads, strict=True):
        y = layer.base_layer(x)
        dx += torch.autograd.grad(y, x, grad)[0].double()
        outputs.append(y.detach().double() + layer.scaling["default"] * (exact @ a.T) @ b.T)
    doubles = [grad.double() for grad in grads]
    d_exact, *rest = torch.autograd.grad(outputs, [exact, *factors], doubles)
    return [*(y.detach() for y in outputs), dx + d_exact, *rest]


def _adapted(package: str, dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    model = Siblings().to(dtype)
    if package == "torchao int8":
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
        model.to(device)
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
        bits = package[-5]
        make = {
            "4": partial(bitsandbytes.nn.Linear4bit, compute_dtype=dtype, quant_type="nf4"),
            "8": partial(bitsandbytes.nn.Linear8bitLt, has_fp16_weights=False),
        }[bits]
        for name, dense in list(model.named_children()):
            layer = make(dense.in_features, dense.out_features, bias=dense.bias is not None)
            layer.load_state_dict(dense.state_dict())
            setattr(model, name, layer)
        model.to(device)
        # By which PEFT knows.
        setattr(model, f"is_loaded_in_{bits}bit", True)
    config = LoraConfig(r=4, rank_pattern={"left": 3}, target_modules=["left", "right"])
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model
