"""LoRA over base layers that run by themselves: the low-rank part goes onto their own output."""

import copy
import logging

import pytest
import torch
from helpers import CountOps, batch_for, build, error, step, with_lora
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft.tuners.lora.aqlm import AqlmLoraLinear
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.te import TeLinear
from quantised import Int8Linear, added, quantise_bases
from torch import nn

import heterolora

OWN = "aten, own base matmul"


def _quantised(name, only="", **options):
    base = build(name)
    base.config.use_cache = False
    batch = batch_for(base)
    return quantise_bases(with_lora(base, **options), only), batch


@pytest.mark.parametrize("name", ["bert", "llama", "opt", "t5"])
def test_equals_peft_with_mixed_ranks(name):
    model, batch = _quantised(name)
    logits, grads = step(model, batch)
    report = heterolora.fuse(model, example=batch, backend="aten")
    assert not report.declined and set(report.fused.values()) == {OWN}
    with CountOps() as ops:
        fused, found = step(model, batch)
    calls = len(report.fused) - sum(map(len, report.groups)) + len(report.groups)
    assert added(ops) == (calls, calls) and ops.forward == 0
    assert len(report.groups) > 0, "siblings must share one op"
    assert error(fused, logits) < 1e-5
    assert found.keys() == grads.keys()
    for key, grad in grads.items():
        assert error(found[key], grad) < 1e-5, key


def test_low_precision_within_twice_peft():
    model, batch = _quantised("llama")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    peft, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    heterolora.fuse(model, example=batch, backend="aten")
    expected, exact = step(peft, batch), step(truth, batch)
    found = step(model, batch)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    assert error(found[0], exact[0]) <= 2 * error(expected[0], exact[0])
    pooled = [
        sum(float((grads[key].double() - exact[1][key]).square().sum()) for key in exact[1])
        for grads in (found[1], expected[1])
    ]
    assert pooled[0] ** 0.5 <= 2 * pooled[1] ** 0.5
    assert all(grad.dtype == expected[1][key].dtype for key, grad in found[1].items())


def test_autocast_gives_the_dtype_of_the_base():
    model, batch = _quantised("bert")
    truth, _ = step(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        peft, _ = step(model, batch)
        heterolora.fuse(model, example=batch, backend="aten")
        with CountOps() as ops:
            fused, grads = step(model, batch)
    assert added(ops)[0] > 0
    assert fused.dtype == peft.dtype
    assert error(fused, truth) <= 2 * error(peft, truth)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


def test_groups_of_both_kinds_run_as_two_operations():
    model, batch = _quantised("bert", only="query")
    quantise_bases(model, only="key")
    logits, grads = step(model, batch)
    report = heterolora.fuse(model, example=batch, backend="aten")
    assert set(report.fused.values()) == {"aten", OWN}
    with CountOps() as ops:
        fused, found = step(model, batch)
    assert added(ops)[0] == 2, "query and key of both layers"
    assert error(fused, logits) < 1e-5
    assert all(error(found[key], grad) < 1e-5 for key, grad in grads.items())
    assert f"fused, {OWN}: " in str(report) and "fused, aten: " in str(report)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_is_bit_equal(name, reentrant):
    model, batch = _quantised(name)
    model.enable_input_require_grads()
    heterolora.fuse(model, example=batch, backend="aten")
    logits, grads = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with CountOps() as ops:
        again, checkpointed = step(model, batch)
    assert added(ops)[0] > added(ops)[1] > 0, "the layers must have been recomputed"
    assert torch.equal(again, logits)
    assert all(torch.equal(checkpointed[key], grad) for key, grad in grads.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    model, batch = _quantised("llama")
    model.eval()
    with mode():
        expected = model(**batch).logits.clone()
        heterolora.fuse(model, example=batch, backend="aten")
        with CountOps() as ops:
            found = model(**batch).logits
    assert added(ops)[0] > 0
    assert error(found, expected) < 1e-6


def test_compiles_without_a_break():
    model, batch = _quantised("llama")
    model.get_base_model().loss_type = "ForCausalLM"
    logits, grads = step(model, batch)
    heterolora.fuse(model, example=batch, backend="aten")
    found, compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), batch)
    assert error(found, logits) < 1e-5
    assert all(error(compiled["_orig_mod." + key], grad) < 1e-5 for key, grad in grads.items())


class Net(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def _model(linear=nn.Linear):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False)
    return get_peft_model(Net(linear(8, 6)), config)


def _layer(model):
    return model.get_base_model().linear


def _compare(model, twin, x=None):
    """Results and all gradients of a fused model and of its unfused twin."""
    x = torch.randn(2, 3, 8) if x is None else x
    values = []
    for one in (model, twin):
        t = x.clone().requires_grad_()
        y = one(t)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        values.append((y, t.grad, grads))
    (y, dx, grads), (expected, dx_expected, wanted) = values
    assert (y.dtype, y.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(dx, dx_expected)
    assert grads.keys() == wanted.keys() and wanted
    for name, grad in wanted.items():
        torch.testing.assert_close(grads[name], grad)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Gate(nn.Linear):
    """Its backward pass needs what it returned."""

    def forward(self, x):
        return super().forward(x).sigmoid()


def _hook(base):
    base.register_forward_hook(lambda module, args, y: y * 2)


def _backward_hook(base):
    base.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 3,))


def _replace(base):
    forward = type(base).forward
    base.forward = lambda x: forward(base, x) + 1


BASES = {
    "forward of its own": Scaled,
    "saves its output": Gate,
    "no bias": lambda k, n: Int8Linear.of(nn.Linear(k, n, bias=False)),
}
CHANGES = {
    "forward hook": _hook,
    "backward hook": _backward_hook,
    "replaced forward": _replace,
    "weight that needs a gradient": lambda base: base.weight.requires_grad_(True),
}


@pytest.mark.parametrize("name", [*BASES, *CHANGES])
def test_bases_that_the_group_op_cannot_read(name):
    models = [_model(BASES.get(name, nn.Linear)) for _ in range(2)]
    if name in CHANGES:
        for model in models:
            CHANGES[name](_layer(model).base_layer)
    assert heterolora.fuse(models[0], strict=True, backend="aten").fused == {"linear": OWN}
    with CountOps() as ops:
        _compare(*models)
    assert added(ops) == (1, 1)


def test_hooks_see_the_calls_and_the_values_that_peft_shows_them():
    base = build("bert")
    batch = batch_for(base)
    model = with_lora(base, 2)
    seen = []
    for layer in model.modules():
        if isinstance(layer, lora.Linear):
            layer.base_layer.register_forward_hook(lambda m, args, y: seen.append(y))
    logits, _ = step(model, batch)
    expected, seen[:] = list(seen), []
    assert len(expected) > 6
    heterolora.fuse(model, backend="aten")
    step(model, batch)
    seen.clear()
    with CountOps() as ops:
        fused, _ = step(model, batch)
    assert added(ops)[0] == len(expected)
    assert error(fused, logits) < 1e-5
    for found, value in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, value)


class Odd(nn.Linear):
    """Returns what nothing can be added to in place, `kind` says what."""

    kind = "tensor"

    def forward(self, x):
        y = super().forward(x)
        return {"wide": lambda: y[..., :1], "tensor": lambda: y, "complex": lambda: y + 0j}[
            self.kind
        ]()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wide", "base output of shape (3, 1)"),
        ("complex", "base output is torch.complex64"),
    ],
)
def test_outputs_that_do_not_fit_go_to_peft(kind, reason, caplog):
    model, twin = _model(Odd), _model(Odd)
    for one in (model, twin):
        _layer(one).base_layer.kind = kind
    heterolora.fuse(model, backend="aten")
    x = torch.randn(3, 8)
    with CountOps() as ops, caplog.at_level(logging.WARNING, "heterolora"):
        for _ in range(2):
            assert torch.equal(model(x), twin(x))
    assert added(ops)[0] == 0
    assert caplog.text.count(reason) == 1


class Subclassed(torch.Tensor):
    """A weight that makes outputs of its own type."""


def test_output_of_a_tensor_subclass_goes_to_peft(caplog):
    model, twin = _model(), _model()
    for one in (model, twin):
        base = _layer(one).base_layer
        base.weight = nn.Parameter(base.weight.detach().as_subclass(Subclassed), False)
    heterolora.fuse(model, backend="aten")
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, "heterolora"):
        found = model(x)
    assert torch.equal(found, twin(x)) and type(found) is Subclassed
    assert "base output is a Subclassed" in caplog.text


def test_an_error_of_the_base_comes_through():
    model = _model()
    _layer(model).base_layer.bias = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    heterolora.fuse(model, backend="aten")
    with pytest.raises(RuntimeError, match="dtype"):
        model(torch.randn(3, 8))


def test_adapters_inside_the_base_layer():
    models = [_model(), _model()]
    for model in models:
        layer = _layer(model)
        config = LoraConfig(r=2, init_lora_weights=False)
        torch.manual_seed(1)
        layer.base_layer = lora.Linear(layer.base_layer, "default", config=config, r=2)
    report = heterolora.fuse(models[0], backend="aten")
    assert report.declined == {"linear": "adapter layers inside the base layer"}
    assert report.fused == {"linear.base_layer": "aten"}
    with CountOps() as ops:
        _compare(*models)
        _compare(*models)
    assert ops.forward == 2


@pytest.mark.parametrize("kind", [AqlmLoraLinear, AwqLoraLinear, GPTQLoraLinear, TeLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_quantised_layers_of_peft(kind, dtype):
    """PEFT's own classes, over a stand-in for the base of a package that is not here."""
    nets, config = [], LoraConfig(r=3, lora_alpha=6, init_lora_weights=False)
    for _ in range(2):
        torch.manual_seed(0)
        base = Int8Linear.of(nn.Linear(8, 6))
        nets.append(Net(kind(base, "default", config=config, r=3, lora_alpha=6)))
    x = torch.randn(4, 8, dtype=dtype)
    assert heterolora.fuse(nets[0], backend="aten").fused == {"linear": OWN}
    with CountOps() as ops:
        if dtype == torch.float32:
            _compare(*nets, x)
        else:
            found, expected = (net(x) for net in nets)
            exact = copy.deepcopy(nets[1]).double()(x.double())
            assert found.dtype == expected.dtype
            assert error(found, exact) <= 2 * error(expected, exact)
    assert added(ops)[0] == 1
    nets[0].linear.quant_linear_module = nn.Linear(8, 6)
    if kind in (AwqLoraLinear, GPTQLoraLinear):
        declined = heterolora.fuse(nets[0], backend="aten").declined
        assert declined == {"linear": "quant_linear_module is not the base layer"}
