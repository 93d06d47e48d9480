"""What changes a layer's call, or runs it: `heterolora.fusion.interface`, without its users."""

import copy

import pytest
import torch
from helpers import CountOps
from peft import LoraConfig, get_peft_model
from torch import nn

import heterolora
from heterolora.fusion.fuse import fusion_of
from heterolora.fusion.interface import Changes, changes_of, end_at, rank_in_use, use_rank
from heterolora.kernels import Branch, group_linear, low_rank_add


class Pair(nn.Module):
    """Two layers that read one input, and one without LoRA."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.plain = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        return self.left(x) + self.plain(x) + self.right(x)


def adapted():
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoraConfig(r=4, target_modules=["left", "right"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


class Squares:
    """A branch of x² at one layer, which knows no model."""

    def __init__(self, layer):
        self.bound, self.backend = False, None
        self.a, self.b = torch.randn(2, 8), torch.randn(8, 2)
        self.hook = layer.register_forward_hook(self.after)
        self.source = None
        layer.register_forward_pre_hook(lambda module, args: setattr(self, "source", args[0] ** 2))
        end_at(layer, self)

    def names(self):
        return ["squares"]

    def branches(self, site, x):
        return [Branch(site, self.a, self.b, 0.5, self.source)]

    def shapes(self, site, x):
        return [Branch(site, self.a, self.b, 0.5, x.new_empty(()).expand(*x.shape[:-1], 8))]

    def add(self, y, *, in_place):
        return low_rank_add([y.clone()], self.source, self.branches(0, y))[0]

    def after(self, module, args, y):
        return None if self.bound else self.add(y, in_place=False)


class Recorder:
    """Runs what it is given, and keeps the names."""

    def __init__(self):
        self.calls, self.runs = [], []

    def called(self, name):
        self.calls.append(name)

    def run(self, names, x, sites, branches, **options):
        self.runs.append(tuple(names))
        return group_linear(x, sites, branches, **options)


def test_nothing_is_left_on_a_layer_that_is_as_it_was():
    layer = adapted().get_base_model().left
    before = dict(layer.__dict__)
    assert changes_of(layer) is changes_of(layer) and changes_of(layer) == Changes()
    use_rank(layer, 2)
    assert rank_in_use(layer) == 2
    use_rank(layer, None)
    assert layer.__dict__ == before


def test_a_change_is_seen_by_identity():
    layer = adapted().get_base_model().left
    seen = [changes_of(layer)]
    for rank in (2, 3, 3, None):
        use_rank(layer, rank)
        seen.append(changes_of(layer))
    assert len({id(changes) for changes in seen}) >= 3 and seen[1] is not seen[2]
    with pytest.raises(AttributeError):
        changes_of(layer).rank = 1


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_rank_holds_whatever_is_fused(order):
    model, x = adapted(), torch.randn(5, 8)
    layer = model.get_base_model().left
    with torch.no_grad():
        layer.lora_A["default"].weight[2:] = 0
        layer.lora_B["default"].weight[:, 2:] = 0
    expected = model(x)
    if order == "before":
        use_rank(layer, 2)
    heterolora.fuse(model, backend="aten", example={"x": x})
    if order == "after":
        use_rank(layer, 2)
    fusion_of(model).runner = recorder = Recorder()
    ranks = []
    recorder.run = lambda names, x, sites, branches, **options: (
        ranks.extend(branch.a.shape[0] for branch in branches)
        or group_linear(x, sites, branches, **options)
    )
    torch.testing.assert_close(model(x), expected)
    assert ranks == [2, 4]
    heterolora.unfuse(model)
    assert rank_in_use(layer) == 2
    twin = copy.deepcopy(model)
    use_rank(layer, None)
    assert rank_in_use(twin.get_base_model().left) == 2


@pytest.mark.parametrize("name", ["left", "plain"])
def test_branches_of_any_origin_end_at_a_layer(name):
    model, x = adapted(), torch.randn(5, 8)
    without = model(x)
    squares = Squares(model.get_base_model().get_submodule(name))
    expected = model(x)
    torch.testing.assert_close(expected - without, 0.5 * x**2 @ squares.a.T @ squares.b.T)
    heterolora.fuse(model, backend="aten", example={"x": x})
    assert (squares.bound, squares.backend) == (name == "left", "aten")
    # A layer whose branches have sources of their own waits for its own call.
    assert len(fusion_of(model).groups) == (name == "plain")
    with CountOps() as ops:
        torch.testing.assert_close(model(x), expected)
    assert ops.counts["heterolora::group_linear"] == (2 if name == "left" else 1)
    with model.disable_adapter():
        off = model(x)
    heterolora.unfuse(model)
    assert (squares.bound, squares.backend) == (False, None)
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), off)


def test_a_runner_hears_every_call_and_runs_every_operation():
    model, x = adapted(), torch.randn(5, 8)
    Squares(model.get_base_model().left)
    heterolora.fuse(model, backend="aten", example={"x": x})
    expected = model(x)
    fusion = fusion_of(model)
    fusion.runner = recorder = Recorder()
    assert torch.equal(model(x), expected)
    assert recorder.calls == ["left", "right"]
    assert recorder.runs == [("left", "squares"), ("right",)]
    model.get_base_model().right.lora_A["default"].register_forward_hook(lambda *_: None)
    model(x)
    assert recorder.calls[2:] == ["left", "right"] and recorder.runs[2:] == [("left", "squares")]
    fusion.runner = None
    model(x)
    assert len(recorder.calls) == 4


def test_an_adapter_put_on_a_projection_later_leaves_its_branches():
    model, x = adapted(), torch.randn(5, 8)
    Squares(model.get_base_model().plain)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["left", "plain"]))
    model.set_adapter("other")
    expected = model(x)
    heterolora.fuse(model, backend="aten", example={"x": x})
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
