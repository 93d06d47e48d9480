"""Scoring through the op: equal to plain accumulated gradients, whatever the model does."""

import copy

import pytest
import torch
import transformers
from helpers import CountOps
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from heterolora.errors import ScoreError
from heterolora.fusion.fuse import fuse
from heterolora.search.scores.backward import with_last
from heterolora.search.scores.gradients import branch_factors
from heterolora.search.scores.probe import draw_b
from heterolora.search.scores.proxies import PROXIES

GRADIENT_PROXIES = ["grad-norm", "snip"]


class ScoredBranches(TorchDispatchMode):
    """How many branches the score op measured."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "heterolora::group_score":
            names = [argument.name for argument in func._schema.arguments]
            self.count += len(args[names.index("a")])
        return func(*args, **(kwargs or {}))


def plain(model, batches, proxy):
    """PEFT's own forward on a copy, `.grad` summed by autograd, statistics in Python floats."""
    twin = copy.deepcopy(model).train()
    torch.manual_seed(1)
    for batch in batches:
        twin(**batch)["loss"].backward()
    scores = {}
    for name, pair in branch_factors(twin).items():
        scores[name] = 0.0
        for factor in pair:
            if factor.grad is None:
                continue
            gradient = factor.grad.flatten().tolist()
            if proxy == "grad-norm":
                scores[name] += sum(g * g for g in gradient) ** 0.5
            else:
                values = factor.flatten().tolist()
                scores[name] += sum(abs(v * g) for v, g in zip(values, gradient, strict=True))
    return scores


def check(model, batches, proxy, scored=None):
    """Scores equal the plain ones to 1e-5, and the op measured this many layers (None: all)."""
    expected = plain(model, batches, proxy)
    torch.manual_seed(1)  # the same dropout
    with ScoredBranches() as mode:
        scores = PROXIES[proxy](model, batches)
    assert list(scores) == list(expected)
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-5), name
    assert any(expected.values())
    assert mode.count == (len(expected) if scored is None else scored)
    return scores


def adapted(subject, name, b_std=0.02, **options):
    made = subject(name)
    modules = "query|value|dense|k_proj|fc1|fc2|c_attn|c_fc|q|wi|wo"
    targets = rf".*\.({modules})"
    conv1d = name == "gpt2"
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out=conv1d, **options)
    model = get_peft_model(made.model, config)
    draw_b(model, 5, b_std)
    return model, made


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
def test_every_layer_is_measured_by_the_op(subject, name, proxy, count):
    model, made = adapted(subject, name)
    check(model, made.batches(count), proxy)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["opt", "gpt2", "t5"])
def test_a_fresh_adapter_whose_b_is_zero(subject, name, count):
    model, made = adapted(subject, name, b_std=0.0)
    check(model, made.batches(count), "grad-norm")


def test_one_transfer_for_all_scores(subject):
    """Numbers that are read one at a time: the model's own, the losses, is a group's B zero."""
    model, made = adapted(subject, "opt", b_std=0.0)
    batches = made.batches(2)
    groups = fuse(model, example=batches[0], backend="aten").groups
    count = len(branch_factors(model)) - sum(len(names) - 1 for names in groups)
    with CountOps() as own:
        for batch in batches:
            model(**batch)
    with CountOps() as ops:
        PROXIES["grad-norm"](model, batches)
    assert ops.counts["heterolora::group_score"] == count
    assert ops.counts["heterolora::group_linear_backward"] == count
    read = ops.counts["aten::_local_scalar_dense"] - own.counts["aten::_local_scalar_dense"]
    assert read == len(batches) + count


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_under_gradient_checkpointing(subject, reentrant, count):
    model, made = adapted(subject, "opt")
    expected = plain(model, made.batches(count), "snip")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    assert check(model, made.batches(count), "snip") == pytest.approx(expected, rel=1e-5)


def test_layers_that_a_pass_calls_repeatedly_are_not_measured_one_call_at_a_time():
    """ALBERT calls the layers of its one block three times."""
    config = transformers.AlbertConfig(
        vocab_size=61,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        classifier_dropout_prob=0.0,
    )
    model = transformers.AlbertForSequenceClassification(config)
    once = "embedding_hidden_mapping_in"
    targets = [once, "query", "value", "ffn"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    draw_b(model, 0, 0.02)
    ids = torch.arange(3, 17).view(2, 7)
    batches = [{"input_ids": ids + i, "labels": torch.tensor([0, 1])} for i in range(2)]
    for count in (1, 2):
        check(model, batches[:count], "snip", scored=1)


class Toy(nn.Module):
    """Two siblings, of which a batch may skip one, and a layer that a batch may call twice."""

    def __init__(self, checkpointing=None):
        super().__init__()
        self.checkpointing = checkpointing
        self.left, self.right, self.top = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 6)

    def forward(self, x, labels, skip=False, twice=False):
        h = self.left(x) + (0 if skip else self.right(x))
        for _ in range(1 + twice):
            if self.checkpointing is None:
                h = self._block(h)
            else:
                h = checkpoint(self._block, h, use_reentrant=self.checkpointing == "reentrant")
        return {"loss": (h - labels).square().mean()}

    def _block(self, h):
        return self.top(torch.tanh(h))


def toy(checkpointing=None):
    model = get_peft_model(
        Toy(checkpointing), LoraConfig(r=2, target_modules=["left", "right", "top"])
    )
    draw_b(model, 0, 0.1)
    return model


def toy_batches(*flags):
    return [
        {"x": torch.randn(4, 5), "labels": torch.randn(4, 6), **dict.fromkeys(names, True)}
        for names in flags
    ]


@pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
@pytest.mark.parametrize(
    ("flags", "scored"),
    [
        ([()], 3),
        ([(), (), ()], 3),
        ([(), (), ("skip",)], 3),  # the group still runs, and its score of nothing is not taken
        ([("skip",)], 2),
        ([(), (), ("twice",)], 2),
        ([("twice",), ("twice",), ()], 3),
        ([("twice",)], 2),
        ([(), ("skip", "twice")], 2),
    ],
)
def test_batches_that_use_the_model_differently(proxy, flags, scored, checkpointing):
    model = toy(checkpointing)
    check(model, toy_batches(*flags), proxy, scored)


@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
def test_declined_layers_are_scored_from_their_gradients(proxy):
    model = toy()
    # A hook on the base layer is one of the reasons to decline.
    model.base_model.model.left.base_layer.register_forward_hook(lambda *_: None)
    check(model, toy_batches((), (), ()), proxy, scored=2)


@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
def test_frozen_factors_score_nothing(proxy):
    model = toy()
    model.base_model.model.left.lora_A["default"].weight.requires_grad_(False)
    check(model, toy_batches(()), proxy, scored=2)


@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
def test_factors_of_two_layers_get_the_gradients_of_both(proxy):
    model = toy()
    layers = model.base_model.model
    layers.right.lora_A["default"].weight = layers.left.lora_A["default"].weight
    check(model, toy_batches(()), proxy, scored=1)


@pytest.mark.parametrize("proxy", GRADIENT_PROXIES)
def test_gradient_hooks_have_their_say(proxy):
    model = toy()
    batches = toy_batches((), ())
    expected = plain(model, batches, proxy)
    model.base_model.model.top.lora_B["default"].weight.register_hook(lambda g: 0 * g)
    with ScoredBranches() as mode:
        scores = PROXIES[proxy](model, batches)
    assert mode.count == 2
    assert scores["top"] < expected["top"]
    assert scores["left"] == pytest.approx(expected["left"], rel=1e-5)


def test_gradients_already_there_count_for_nothing_and_stay():
    model = toy()
    batches = toy_batches((), ())
    expected = PROXIES["grad-norm"](model, batches)
    factors = [factor for pair in branch_factors(model).values() for factor in pair]
    for factor in factors:
        factor.grad = torch.full_like(factor, 7.0)
    kept = [factor.grad for factor in factors]
    assert PROXIES["grad-norm"](model, batches) == expected
    assert all(factor.grad is gradient for factor, gradient in zip(factors, kept, strict=True))
    assert all(bool((gradient == 7).all()) for gradient in kept)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unfused_again(fails):
    model = toy()
    before = [dict(module.__dict__) for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    batches = toy_batches((), ())
    if fails:
        batches[1]["x"][0] = float("nan")
        with pytest.raises(ScoreError, match="loss of batch 1"):
            PROXIES["grad-norm"](model, batches)
    else:
        PROXIES["grad-norm"](model, batches)
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks


@pytest.mark.parametrize("fails", [False, True])
def test_a_fusion_of_the_user_is_kept(fails):
    model = toy()
    batches = toy_batches((), ())
    expected = plain(model, batches, "grad-norm")
    fuse(model, example=batches[0], backend="aten")
    fusion = model.__dict__["_heterolora"]
    groups, layers = list(fusion.groups), dict(fusion.layers)
    if fails:
        spoilt = [batches[0], {**batches[1], "x": batches[1]["x"] / 0}]
        with pytest.raises(ScoreError, match="loss of batch 1"):
            PROXIES["grad-norm"](model, spoilt)
    else:
        with ScoredBranches() as mode:
            scores = PROXIES["grad-norm"](model, batches)
        assert mode.count == 3
        assert scores == pytest.approx(expected, rel=1e-5)
    assert model.__dict__["_heterolora"] is fusion
    assert fusion.runner is None
    assert (fusion.groups, fusion.layers) == (groups, layers)
    with ScoredBranches() as mode:
        model(**batches[0])["loss"].backward()
    assert mode.count == 0
    assert all(f.grad is not None for pair in branch_factors(model).values() for f in pair)


def test_with_last():
    assert [list(with_last(range(n))) for n in range(3)] == [
        [],
        [(0, True)],
        [(0, False), (1, True)],
    ]
