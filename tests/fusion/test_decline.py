"""Every reason to decline: detected, named, and bit-equal to PEFT."""

import logging

import pytest
import torch
from helpers import CountOps, batch_for, build, with_lora
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from torch import nn

import heterolora
from heterolora.errors import FuseError

NAME = "inner.linear"
MORE = "more than base(x) + low-rank part"


class Subclassed(torch.Tensor):
    pass


class DTensor(torch.Tensor):
    """Has the name by which a distributed tensor is known."""


class Inner(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear
        self.embedding = nn.Embedding(10, 8)

    def forward(self, x, **kwargs):
        return self.linear(x, **kwargs)


class Net(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.inner = Inner(linear)

    def forward(self, x, **kwargs):
        return self.inner(x, **kwargs)


def _model(linear=nn.Linear, **options):
    torch.manual_seed(0)
    options.setdefault("target_modules", ["linear"])
    config = LoraConfig(r=4, init_lora_weights=False, **options)
    return get_peft_model(Net(linear(8, 6)), config)


def _layer(model):
    return model.get_base_model().inner.linear


def _merged():
    model = _model()
    model.merge_adapter()
    return model


def _disabled():
    model = _model()
    model.base_model.disable_adapter_layers()
    return model


def _several():
    model = _model()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def _inactive():
    model = _model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["embedding"]))
    model.set_adapter("other")
    return model


def _on_base(change):
    def make():
        model = _model()
        change(_layer(model).base_layer)
        return model

    return make


def _on_layer(change):
    def make():
        model = _model()
        change(_layer(model))
        return model

    return make


def _swap_weight(kind):
    def change(linear):
        weight = linear.weight.detach().as_subclass(kind)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        assert type(linear.weight) is kind

    return change


def _ds_id(linear):
    linear.weight.ds_id = 0


def _replace_forward(module):
    forward = type(module).forward
    module.forward = lambda *args, **kwargs: forward(module, *args, **kwargs)


class _WithOwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def _other_factor(layer):
    old = layer.lora_A["default"]
    layer.lora_A["default"] = _WithOwnForward(old.in_features, old.out_features, bias=False)


REASONS = {
    "adapter merged into the base weight": _merged,
    "adapters disabled": _disabled,
    "several active adapters (default, second)": _several,
    "no active adapter": _inactive,
    "LoRA variant DoraLinearVariant": lambda: _model(use_dora=True),
    "LoRA variant ALoraLinearVariant": lambda: _model(alora_invocation_tokens=[1]),
    "lora_bias: B has a bias": lambda: _model(lora_bias=True),
    "active dropout (p=0.1)": lambda: _model(lora_dropout=0.1),
    "forward hooks on lora_A": _on_layer(
        lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    "forward hooks on lora_B": _on_layer(
        lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda m, gi, go: None)
    ),
    "forward hooks on lora_dropout": _on_layer(
        lambda layer: layer.lora_dropout["default"].register_forward_hook(lambda m, a, y: y * 2)
    ),
    "forward replaced on the layer by other code": _on_layer(_replace_forward),
    "lora_A has a forward of its own (_WithOwnForward)": _on_layer(_other_factor),
    "DeepSpeed ZeRO-3 partitioned weight": _on_base(_ds_id),
    "DTensor weight": _on_base(_swap_weight(DTensor)),
}


@pytest.mark.parametrize("reason", REASONS)
def test_declined_and_bit_equal(reason):
    model, twin = REASONS[reason](), REASONS[reason]()
    x = torch.randn(3, 8)
    report = heterolora.fuse(model, backend="aten")
    assert report.declined == {**report.declined, NAME: reason}
    assert not report.fused
    torch.manual_seed(3)
    expected, wanted = _value_and_gradients(twin, x)
    torch.manual_seed(3)
    with CountOps() as ops:
        found, grads = _value_and_gradients(model, x)
    assert ops.forward == 0
    assert torch.equal(found, expected)
    assert grads.keys() == wanted.keys()
    assert all(torch.equal(grads[name], wanted[name]) for name in wanted)


def _value_and_gradients(model, x):
    y = model(x)
    if y.requires_grad:
        y.sum().backward()
    return y, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reason", REASONS)
def test_strict_raises_and_leaves_the_model_alone(reason):
    model = REASONS[reason]()
    before = _layer(model).__dict__.get("forward")
    with pytest.raises(FuseError) as caught:
        heterolora.fuse(model, strict=True, backend="aten")
    assert f"{NAME}: {reason}" in str(caught.value)
    assert _layer(model).__dict__.get("forward") is before
    assert not hasattr(model, "_heterolora")


def test_other_lora_layers_are_declined_by_kind():
    model = _model(target_modules=["linear", "embedding"])
    report = heterolora.fuse(model, backend="aten")
    assert report.fused == {NAME: "aten"}
    assert report.declined == {"inner.embedding": f"a lora.Embedding layer: {MORE}"}
    assert "1 LoRA layers fused, 1 declined" in str(report)
    assert "fused, aten: 1" in str(report)
    assert f"a lora.Embedding layer: {MORE}: inner.embedding" in str(report)


@pytest.mark.parametrize(
    ("change", "x", "reason"),
    [
        (lambda m: None, torch.randn(3, 8).as_subclass(Subclassed), "input is a Subclassed"),
        (lambda m: m.to(torch.bfloat16), torch.randn(3, 8), "input is torch.float32"),
        (lambda m: None, torch.randn(3, 8, dtype=torch.float64), "input is torch.float64"),
        (lambda m: None, torch.randn(3, 9), r"input of shape (3, 9)"),
        (lambda m: m.to("meta"), torch.randn(3, 8), "input on cpu, weight on meta"),
    ],
)
def test_inputs_declined_at_the_call(change, x, reason, caplog):
    """What PEFT makes of the input, be it an error, is what the caller sees."""
    model, twin = _model(), _model()
    change(model), change(twin)
    assert heterolora.fuse(model, backend="aten").fused
    with CountOps() as ops, caplog.at_level(logging.WARNING, "heterolora"):
        outcome = _outcome(model, x)
    assert ops.forward == 0
    assert reason in caplog.text
    expected = _outcome(twin, x)
    assert type(outcome) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(outcome, expected)
    else:
        assert str(outcome) == str(expected)


def _outcome(model, x):
    try:
        return model(x)
    except RuntimeError as failure:
        return failure


@pytest.mark.parametrize(
    ("module", "reason"),
    [("mine", f"a lora.Linear layer: {MORE}"), ("tp_layer", "tensor-parallel base")],
)
def test_layers_of_other_back_ends_are_named(module, reason):
    """Stand-ins: an unknown class, and one that PEFT defines for a package not here."""

    class Linear(lora.Linear):
        pass

    Linear.__module__ = f"peft.tuners.lora.{module}"
    model, x = _model(), torch.randn(3, 8)
    expected = model(x)
    _layer(model).__class__ = Linear
    report = heterolora.fuse(model, backend="aten")
    assert report.declined == {NAME: reason} and not report.fused
    with CountOps() as ops:
        assert torch.equal(model(x), expected)
    assert ops.forward == 0


def test_mixed_batches_go_to_peft():
    base = build("llama")
    model = with_lora(base).eval()
    batch = batch_for(base)
    ids = {"input_ids": batch["input_ids"]}
    names = ["default", "__base__", "default"]
    expected = model(**ids, adapter_names=names).logits
    heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        found = model(**ids, adapter_names=names).logits
    assert ops.forward == 0
    assert torch.equal(found, expected)


def test_reasons_that_pass_are_looked_at_again(caplog):
    model = _model(lora_dropout=0.1)
    x = torch.randn(3, 8)
    assert heterolora.fuse(model, backend="aten").declined == {NAME: "active dropout (p=0.1)"}
    with CountOps() as ops:
        model.eval()(x)
        assert ops.forward == 1
        with model.disable_adapter():
            model(x)
        assert ops.forward == 1
        model.merge_adapter()
        model(x)
        assert ops.forward == 1
        model.unmerge_adapter()
        model(x)
        assert ops.forward == 2
        with caplog.at_level(logging.WARNING, "heterolora"):
            model.train()
            model(x), model(x)
        assert ops.forward == 2
    assert caplog.text.count("active dropout") == 1, "said once, not at every call"


def test_scale_is_read_at_the_call():
    model, twin = _model(), _model()
    x = torch.randn(3, 8)
    heterolora.fuse(model, backend="aten")
    for scale in (3.0, torch.tensor(0.5)):
        _layer(model).scaling["default"] = scale
        _layer(twin).scaling["default"] = scale
        torch.testing.assert_close(model(x), twin(x))


def test_trainable_bias():
    model, twin = _model(bias="lora_only"), _model(bias="lora_only")
    x = torch.randn(3, 8)
    assert heterolora.fuse(model, backend="aten").fused
    _, grads = _value_and_gradients(model, x)
    _, wanted = _value_and_gradients(twin, x)
    assert any(name.endswith("base_layer.bias") for name in wanted)
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad)
