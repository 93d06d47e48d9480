"""Groups are found at run time, and stay right whatever happens between the siblings' calls."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import CountOps, batch_for, build, error, step, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn

import heterolora


class Block(nn.Module):
    """Two siblings, then a third layer; `between` runs after the first sibling's call."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 6)
        self.right = nn.Linear(8, 6)
        self.out = nn.Linear(6, 8)
        self.between = lambda block, x: x

    def forward(self, x):
        left = self.left(x)
        x = self.between(self, x)
        right = 0 if x is None else self.right(x)
        return self.out(left + right)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Block()

    def forward(self, x):
        return self.inner(x)


@pytest.fixture
def net():
    config = LoraConfig(r=4, target_modules=["left", "right", "out"])
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def _block(model):
    return model.get_base_model().inner


def _ops(model, x):
    with CountOps() as ops:
        y = model(x)
    return y, ops.forward


def test_found_in_the_first_pass_and_used_from_the_second(net):
    x = torch.randn(5, 8)
    assert heterolora.fuse(net, backend="aten").groups == ()
    assert _ops(net, x)[1] == 3
    assert _ops(net, x)[1] == 2
    assert heterolora.fuse(net, backend="aten").groups == (("inner.left", "inner.right"),)


def test_an_example_finds_them_before_the_first_pass(net):
    x = torch.randn(5, 8)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    net.train()
    net.get_base_model().inner.between = lambda block, x: x if torch.rand(1) > -1 else x
    report = heterolora.fuse(net, example={"x": x}, backend="aten")
    assert report.groups == (("inner.left", "inner.right"),)
    assert torch.equal(torch.rand(1), expected), "the random state must be put back"
    assert net.training and _block(net).left.training
    assert _ops(net, x)[1] == 2


def _fused(net, x):
    heterolora.fuse(net, example={"x": x}, backend="aten")
    return net


def _reference(net, x):
    heterolora.unfuse(net)
    return net(x)


def test_input_changed_in_place_between_siblings(net):
    x = torch.randn(5, 8)
    _fused(net, x)

    def change(block, x):
        x.mul_(2)
        return x

    _block(net).between = change
    y, calls = _ops(net, x.clone())
    assert calls == 3
    torch.testing.assert_close(y, _reference(net, x.clone()))


def test_sibling_called_with_another_tensor(net):
    x = torch.randn(5, 8)
    _fused(net, x)
    _block(net).between = lambda block, x: x.clone() + 1
    y, calls = _ops(net, x)
    assert calls == 3, "the one that had its turn must not run again"
    torch.testing.assert_close(y, _reference(net, x))


def test_sibling_never_called_leaves_nothing_behind(net):
    x = torch.randn(5, 8, requires_grad=True)
    _fused(net, x)
    _block(net).between = lambda block, x: None
    y = net(x)
    y.sum().backward()
    found = x.grad.clone()
    group = net._heterolora.groups[0]
    assert group.x is None and not group.waiting
    heterolora.unfuse(net)
    x.grad = None
    net(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_exception_between_siblings_leaves_nothing_behind(net):
    x = torch.randn(5, 8)
    _fused(net, x)

    def fail(block, x):
        raise KeyError("between")

    plain, _block(net).between = _block(net).between, fail
    value = x.clone()
    alive = weakref.ref(value)
    with pytest.raises(KeyError, match="between"):
        net(value)
    group = net._heterolora.groups[0]
    assert group.x is None and not group.waiting and not group.window_open
    del value
    gc.collect()
    assert alive() is None
    _block(net).between = plain
    y, calls = _ops(net, x)
    assert calls == 2
    torch.testing.assert_close(y, _reference(net, x))


def test_gradient_mode_changed_between_siblings(net):
    x = torch.randn(5, 8)
    _fused(net, x)
    seen = []

    def switch(block, x):
        torch.set_grad_enabled(True)
        return x

    _block(net).between = switch
    _block(net).right.register_forward_hook(lambda m, a, y: seen.append(y.requires_grad))
    with torch.no_grad():
        net(x)
    assert seen == [True], "an output made without gradients must not be picked up"


def test_siblings_called_by_hand_run_alone(net):
    x = torch.randn(5, 8)
    _fused(net, x)
    with CountOps() as ops:
        left = _block(net).left(x)
    assert ops.forward == 1
    assert not net._heterolora.groups[0].waiting
    heterolora.unfuse(net)
    torch.testing.assert_close(left, _block(net).left(x))


def test_inference_mode(net):
    x = torch.randn(5, 8)
    _fused(net, x)
    with torch.inference_mode():
        y, calls = _ops(net, torch.randn(5, 8).copy_(x))
    assert calls == 3
    torch.testing.assert_close(y.clone(), _reference(net, x).detach())


def test_a_declined_sibling_does_not_hold_the_others_back(net):
    x = torch.randn(5, 8)
    _fused(net, x)
    _block(net).right.lora_A.register_forward_hook(lambda *a: None)
    _block(net).right.lora_A["default"].register_forward_hook(lambda *a: None)
    y, calls = _ops(net, x)
    assert calls == 2
    torch.testing.assert_close(y, _reference(net, x))


def test_layer_that_runs_twice(net):
    x = torch.randn(5, 8)

    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(self.inner(x))

    twice = Twice(_block(net))
    expected = twice(x)
    report = heterolora.fuse(twice, example={"x": x}, backend="aten")
    assert report.groups == (("inner.left", "inner.right"),)
    y, calls = _ops(twice, x)
    assert calls == 4
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("bert", {("query", "key", "value")}),
        ("llama", {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}),
        ("t5", {("q", "k", "v"), ("k", "v"), ("wi_0", "wi_1")}),
        ("gpt2", set()),
    ],
)
def test_groups_of_real_models(name, groups):
    base = build(name)
    model = with_lora(base, 2)
    report = heterolora.fuse(model, example=batch_for(base), backend="aten")
    found = {tuple(n.rpartition(".")[2] for n in names) for names in report.groups}
    assert found == groups
    per_layer = {"bert": 1, "llama": 2, "t5": 5, "gpt2": 0}[name]
    assert len(report.groups) == 2 * per_layer


# T5 is left out: its gradients change in the last bit under checkpointing without us, too.
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "opt", "gpt2"])
def test_gradient_checkpointing_is_bit_equal(name, reentrant):
    base = build(name)
    base.config.use_cache = False
    batch = batch_for(base)
    model = with_lora(base)
    model.enable_input_require_grads()
    heterolora.fuse(model, example=batch, backend="aten")
    logits, grads = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with CountOps() as ops:
        again, checkpointed = step(model, batch)
    assert ops.forward > ops.backward > 0, "the layers must have been recomputed"
    assert torch.equal(again, logits)
    assert checkpointed.keys() == grads.keys()
    for key, grad in grads.items():
        assert torch.equal(checkpointed[key], grad), key
    for group in model._heterolora.groups:
        assert group.x is None and not group.waiting


def test_generation_with_a_cache():
    model = with_lora(build("llama")).eval()
    ids = torch.randint(3, 97, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(input_ids=ids, **options)
    heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        found = model.generate(input_ids=ids, **options)
    assert ops.forward > 0
    assert torch.equal(found, expected)


def test_copies_and_the_original_do_not_share_state():
    base = build("bert")
    batch = batch_for(base)
    model = with_lora(base)
    heterolora.fuse(model, example=batch, backend="aten")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.01)
    with CountOps() as ops:
        changed, _ = step(twin, batch)
    assert ops.forward > 0
    logits, _ = step(model, batch)
    assert error(changed, logits) > 1e-3
    heterolora.unfuse(twin)
    plain, _ = step(twin, batch)
    assert error(changed, plain) < 1e-5
