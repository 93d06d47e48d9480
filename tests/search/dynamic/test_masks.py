"""Layers used at less than their rank: what is not in use adds nothing and does not move."""

import copy

import pytest
import torch
from helpers import CountOps, batch_for, build, error, step, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

import heterolora
from heterolora.errors import FuseError, ModelError, TrainingError
from heterolora.fusion.interface import rank_in_use
from heterolora.search import save_enabled
from heterolora.search.dynamic.masks import RankMasks, parked_count

FULL = 8


def masked(name="bert", *, pattern=(0, 3, FULL, 1), **options):
    """A model with an adapter of rank 8 everywhere, used at the ranks of a repeated pattern."""
    model = with_lora(build(name), FULL, **options)
    masks = RankMasks(model)
    return model, masks, {n: pattern[i % len(pattern)] for i, n in enumerate(masks.layers)}


def twin_of(model, ranks):
    """The same function made by PEFT alone: factors cut to their rank, alpha/r as it was."""
    cut = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("base_model.model.").split(".lora_")[0]
        if ".lora_" in key and ranks[name]:
            value = value[: ranks[name]] if "lora_A" in key else value[:, : ranks[name]]
            cut[key] = value.clone()
    base = copy.deepcopy(model).unload()
    twin = with_lora(base, ranks)
    missing = twin.load_state_dict(cut, strict=False)
    assert not missing.unexpected_keys
    return twin


def adamw(model, **options):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, **options)


def train(model, optimizer, masks=None, steps=2, seed=0):
    for i in range(steps):
        optimizer.zero_grad()
        model(**batch_for(model, seed=seed + i)).loss.backward()
        if masks is not None:
            masks.drop_gradients()
        optimizer.step()


def snapshot(model, optimizer):
    """Copies of every trained parameter and of its state, by name."""
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
            found[name] = {"value": p.detach().clone(), **state}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("fused", [False, True])
def test_lifting_gives_everything_back_to_the_bit(fused):
    model, masks, ranks = masked()
    if fused:
        heterolora.fuse(model, backend="aten")
    optimizer = adamw(model)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    assert masks.ranks == ranks and parked_count(model) == sum(r < FULL for r in ranks.values())
    masks.apply({name: (rank * 5) % (FULL + 1) for name, rank in ranks.items()}, optimizer)
    masks.lift(optimizer)
    after = snapshot(model, optimizer)
    assert all(same(before[name], after[name]) for name in before)
    assert parked_count(model) == 0 and set(masks.ranks.values()) == {FULL}
    assert all(layer.active_adapters == ["default"] for layer in masks.layers.values())
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_in_use_does_not_move(fused):
    model, masks, ranks = masked()
    if fused:
        heterolora.fuse(model, backend="aten")
    optimizer = adamw(model)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    train(model, optimizer, masks, steps=3)
    masks.check_optimizer(optimizer)
    masks.lift(optimizer)
    after = snapshot(model, optimizer)
    for name, layer_rank in ranks.items():
        for side, key in enumerate("AB"):
            full = f"base_model.model.{name}.lora_{key}.default.weight"
            if layer_rank == 0:
                assert same(before[full], after[full]), full
                continue
            for part in ("value", "exp_avg", "exp_avg_sq"):
                old, new = before[full][part], after[full][part]
                if side:
                    old, new = old.T, new.T
                assert torch.equal(old[layer_rank:], new[layer_rank:]), (full, part)
                assert not torch.equal(old[:layer_rank], new[:layer_rank]), (full, part)


def test_zeros_from_elsewhere_are_no_gradient():
    """DDP gives a layer that some process used, or that it believes so, zeros: AdamW would move."""
    model, masks, ranks = masked()
    optimizer = adamw(model)
    train(model, optimizer)
    before = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    name = next(name for name, rank in ranks.items() if rank == 0)
    factor = masks.layers[name].lora_B["default"].weight
    factor.grad = torch.zeros_like(factor)
    masks.drop_gradients()
    assert factor.grad is None
    optimizer.step()
    masks.lift(optimizer)
    key = f"base_model.model.{name}.lora_B.default.weight"
    assert same(before[key], snapshot(model, optimizer)[key])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_masked_model_trains_like_one_of_these_ranks(name, fused):
    """PEFT's alpha/r included: the twin has alpha = 2 r, the masked model alpha = 2 * 8."""
    model, masks, ranks = masked(name)
    twin = twin_of(model, ranks)
    masks.apply(ranks)
    batch = batch_for(model)
    expected, wanted = step(twin, batch)
    exact, truth = step(copy.deepcopy(twin).double(), batch)
    eager = max(error(expected, exact), 1e-7)
    if fused:
        heterolora.fuse(model, backend="aten", strict=True)
    with CountOps() as ops:
        logits, grads = step(model, batch)
    assert (ops.forward > 0) == fused
    assert error(logits, exact) <= 2 * eager
    for key, gradient in wanted.items():
        rank = ranks[key.removeprefix("base_model.model.").split(".lora_")[0]]
        found = grads[key][:rank] if "lora_A" in key else grads[key][:, :rank]
        rest = grads[key][rank:] if "lora_A" in key else grads[key][:, rank:]
        assert error(found, truth[key]) <= 2 * max(error(gradient, truth[key]), 1e-6), key
        assert not rest.any()
    # From equal states, with no gradient that differs in more than rounding.
    ours, theirs = adamw(model, eps=1e-3), adamw(twin, eps=1e-3)
    train(model, ours, masks, steps=3)
    train(twin, theirs, steps=3)
    logits, expected = (m(**batch).logits.detach() for m in (model, twin))
    assert error(logits, expected) < 1e-5


def test_a_layer_that_is_off_is_its_base_layer_alone(caplog):
    model, masks, ranks = masked()
    off = next(name for name, rank in ranks.items() if rank == 0)
    masks.layers[off].lora_A["default"].weight.requires_grad_(False)
    masks.apply(ranks)
    layer = masks.layers[off]
    # It belongs to the optimizer and to DDP all the same, and what is frozen stays so.
    trained = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    assert [p.requires_grad for p in trained] == [False, True]
    x = torch.randn(2, 3, layer.in_features)
    assert rank_in_use(layer) == 0
    assert torch.equal(layer(x), layer.base_layer(x))
    report = heterolora.fuse(model, backend="aten", strict=True)
    assert {n for n, rank in ranks.items() if rank == 0} == report.declined.keys()
    assert report.declined[off] == "switched off by a search"
    with CountOps() as ops:
        assert torch.equal(layer(x), layer.base_layer(x))
    assert ops.forward == 0 and not caplog.records
    masks.lift()
    assert [p.requires_grad for p in trained] == [False, True]
    with CountOps() as ops:
        layer(x)
    assert ops.forward == 1


def test_strict_still_refuses_other_reasons():
    model, masks, ranks = masked()
    masks.apply(ranks)
    on = next(name for name, rank in ranks.items() if rank)
    masks.layers[on].set_adapter([])
    with pytest.raises(FuseError, match=f"1 layers cannot be fused: {on}: no active adapter"):
        heterolora.fuse(model, backend="aten", strict=True)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_checkpointing(reentrant, fused):
    model, masks, ranks = masked("llama")
    masks.apply(ranks)
    if fused:
        heterolora.fuse(model, backend="aten", example=batch_for(model))
    batch = batch_for(model)
    _, expected = step(model, batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, grads = step(model, batch)
    assert same(expected, grads)


def test_saving_and_merging_give_what_is_in_use(tmp_path):
    model, masks, ranks = masked()
    masks.apply(ranks)
    model.eval()
    batch = batch_for(model)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path / "whole")
    assert save_enabled(model, tmp_path / "cut") == {n: r for n, r in ranks.items() if r}
    for folder in ("whole", "cut"):
        loaded = PeftModel.from_pretrained(build("bert"), str(tmp_path / folder)).eval()
        # The sums run over the same numbers, and zeros.
        assert error(loaded(**batch).logits, expected) < 1e-6, folder
    sizes = {
        folder: sum(v.numel() for v in load_file(tmp_path / folder / NAME).values())
        for folder in ("whole", "cut")
    }
    unit = {n: sum(masks.shape(n)) for n in ranks}
    assert sizes["cut"] == sum(rank * unit[n] for n, rank in ranks.items())
    assert sizes["whole"] == sum(FULL * unit[n] for n in ranks)
    merged = copy.deepcopy(model).merge_and_unload()
    assert error(merged(**batch).logits, expected) < 1e-6


NAME = "adapter_model.safetensors"


def test_disabling_and_enabling_by_peft_keeps_the_masks():
    model, masks, ranks = masked()
    masks.apply(ranks)
    model.eval()
    batch = batch_for(model)
    expected = model(**batch).logits
    with model.disable_adapter():
        assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, expected)


def test_state_in_a_file_and_back():
    model, masks, ranks = masked()
    optimizer = adamw(model)
    train(model, optimizer)
    whole = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    tensors = {key: value.clone() for key, value in masks.tensors().items()}
    fresh = RankMasks(model)  # as on resume: the old parked values are out of date
    assert parked_count(model) == 0
    fresh.load(ranks, tensors)
    assert fresh.ranks == ranks and fresh.parked_is_zero()
    fresh.lift(optimizer)
    after = snapshot(model, optimizer)
    assert all(same(whole[name], after[name]) for name in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t, r: r.pop(next(iter(r))),
            "LoRA layer or shortcut of only one of the model and the masks",
        ),
        (lambda t, r: t.pop(next(iter(t))), r"\|a' is missing"),
        (lambda t, r: t.update({next(iter(t)): torch.zeros(1)}), r"\|a' is \(1,\) torch.float32"),
        (lambda t, r: r.update({next(iter(r)): 99}), "has rank 99, and the model 8"),
    ],
)
def test_state_that_does_not_fit(change, message):
    model, masks, ranks = masked()
    masks.apply(ranks)
    tensors, ranks = masks.tensors(), dict(ranks)
    change(tensors, ranks)
    with pytest.raises(ModelError, match=message):
        RankMasks(model).load(ranks, tensors)


def test_optimizers_without_rows_and_columns():
    model, masks, ranks = masked()
    optimizer = torch.optim.Adafactor(p for p in model.parameters() if p.requires_grad)
    train(model, optimizer)
    with pytest.raises(TrainingError, match="Adafactor keeps 'row_var' of shape"):
        masks.apply(ranks, optimizer)
    assert parked_count(model) == 0
    before = snapshot(model, optimizer)
    masks.apply({n: 0 if rank < FULL else rank for n, rank in ranks.items()}, optimizer)
    train(model, optimizer, masks)
    masks.lift(optimizer)
    after = snapshot(model, optimizer)
    for name, rank in ranks.items():
        key = f"base_model.model.{name}.lora_A.default.weight"
        assert same(before[key], after[key]) == (rank < FULL)


def test_an_optimizer_that_moves_what_gets_no_gradient_is_found():
    class Noisy(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(1e-3)

    model, masks, ranks = masked()
    optimizer = Noisy([p for p in model.parameters() if p.requires_grad], lr=0.1)
    masks.apply(ranks, optimizer)
    train(model, optimizer, masks, steps=1)
    with pytest.raises(TrainingError, match="Noisy moves parameters that are zero"):
        masks.check_optimizer(optimizer)


def _second(model):
    model.add_adapter("second", LoraConfig(r=4, target_modules=["query"]))
    return model


def _tied(model):
    layers = list(RankMasks(model).layers.values())
    layers[1].lora_A["default"].weight = layers[0].lora_A["default"].weight
    return model


def _merged(model):
    model.merge_adapter()
    return model


def _computed(model):
    layers = list(RankMasks(model).layers.values())
    register_parametrization(layers[1].lora_B["default"], "weight", torch.nn.Identity())
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _computed(with_lora(build("bert"), 4)), "is LoRA with a parametrised factor"),
        (lambda: build("bert"), "a PeftModel is needed, not BertForSequenceClassification"),
        (lambda: with_lora(build("bert")), r"LoRA layers have ranks \[1, .*search.uniform"),
        (lambda: _second(with_lora(build("bert"), 4)), r"2 adapters \(default, second\)"),
        (lambda: with_lora(build("bert"), 4, use_dora=True), "is a DoraLinearVariant"),
        (lambda: with_lora(build("bert"), 4, lora_bias=True), "is LoRA with a bias on B"),
        (lambda: _tied(with_lora(build("bert"), 4)), "share a LoRA factor"),
        (lambda: _merged(with_lora(build("bert"), 4)), "is merged into its base weight"),
        (
            lambda: get_peft_model(
                build("bert"), LoraConfig(target_modules=["word_embeddings", "query"])
            ),
            "word_embeddings' is a lora.Embedding layer",
        ),
    ],
)
def test_models_that_cannot_be_masked(make, message):
    with pytest.raises(ModelError, match=message):
        RankMasks(make())


def test_ranks_out_of_range():
    model, masks, ranks = masked()
    name = next(iter(ranks))
    for wrong in ({**ranks, name: 9}, {**ranks, name: -1}, {**ranks, "other": 1}):
        with pytest.raises(ModelError, match="there is no such layer or rank"):
            masks.apply(wrong)
    with pytest.raises(ModelError, match=f"{name!r} at rank None"):
        masks.apply({n: r for n, r in ranks.items() if n != name})
    assert parked_count(model) == 0
    masks.apply(dict.fromkeys(ranks, 0))
    with pytest.raises(ModelError, match="no LoRA layer of the model is in use"):
        save_enabled(model, "nowhere")


class _Ranks(TorchDispatchMode):
    """Rows of every A that the fused operation gets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "heterolora::group_linear":
            names = [argument.name for argument in func._schema.arguments]
            self.seen += [a.shape[0] for a in args[names.index("a")]]
        return func(*args, **(kwargs or {}))


def test_the_fused_operation_works_at_the_rank_in_use():
    model, masks, ranks = masked()
    masks.apply(ranks)
    heterolora.fuse(model, backend="aten", strict=True)
    with _Ranks() as seen:
        model(**batch_for(model))
    assert sorted(seen.seen) == sorted(rank for rank in ranks.values() if rank)
