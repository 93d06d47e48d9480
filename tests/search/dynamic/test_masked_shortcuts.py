"""Shortcuts used at less than their rank, beside LoRA layers that are."""

import copy

import pytest
import torch
from helpers import CountOps, batch_for, error, step
from shortcut_models import plain, with_shortcuts
from torch.nn.utils.parametrize import register_parametrization

import heterolora
from heterolora.errors import ModelError
from heterolora.fusion.interface import rank_in_use
from heterolora.search.dynamic.masks import RankMasks, parked_count

FULL = 4  # of `with_shortcuts` for LoRA


def masked(name="bert", targets=None, pattern=(0, 3, FULL, 1, 2)):
    """Ranks of a repeated pattern, LoRA layers first; of five, so that neighbours differ."""
    model = with_shortcuts(plain(name, layers=3), targets=targets, ranks=FULL)
    masks = RankMasks(model)
    assert len(masks.shortcuts) == 11
    return model, masks, {n: pattern[i % len(pattern)] for i, n in enumerate(masks.ranks)}


def cut(model, ranks):
    """The same function without masks: smaller shortcuts and LoRA factors full of zeros."""
    twin = copy.deepcopy(model)
    heterolora.remove_shortcuts(twin)
    own = {s.name: s for s in model.low_rank_shortcuts}
    used = {name: ranks[name] for name in own if ranks[name]}
    alpha = {name: rank * own[name].scale for name, rank in used.items()}
    heterolora.add_shortcuts(twin, rank=used, alpha=alpha)
    with torch.no_grad():
        for shortcut in twin.low_rank_shortcuts:
            shortcut.a.copy_(own[shortcut.name].a[: shortcut.rank])
            shortcut.b.copy_(own[shortcut.name].b[:, : shortcut.rank])
        for name, layer in _lora(twin):
            layer.lora_A["default"].weight[ranks[name] :] = 0
            layer.lora_B["default"].weight[:, ranks[name] :] = 0
    return twin


def _lora(model):
    return [(n, m) for n, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")]


def adamw(model):
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)


def train(model, optimizer, masks, steps=2, seed=0):
    for i in range(steps):
        optimizer.zero_grad()
        model(**batch_for(model, seed=seed + i)).loss.backward()
        masks.drop_gradients()
        optimizer.step()


def snapshot(model, optimizer):
    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = {k: torch.as_tensor(v).clone() for k, v in optimizer.state[p].items()}
            found[name] = {"value": p.detach().clone(), **state}
    return found


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("targets", [None, ["query", "value"]], ids=["all-linear", "q,v"])
@pytest.mark.parametrize("fused", [False, True])
def test_logits_and_gradients_are_those_of_smaller_shortcuts(fused, targets):
    model, masks, ranks = masked(targets=targets)
    model.double()
    twin = cut(model, ranks)
    batch = batch_for(model)
    expected, wanted = step(twin, batch)
    masks.apply(ranks)
    if fused:
        heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        logits, grads = step(model, batch)
    assert (ops.forward + ops.counts["heterolora::low_rank_add_"] > 0) == fused
    # Rounding of float64 through three layers.
    assert error(logits, expected) < 1e-13
    smaller = {s.name: key for key, s in _named(twin)}
    for key, shortcut in _named(model):
        rank = ranks[shortcut.name]
        if rank == 0:
            assert f"{key}.a" not in grads and f"{key}.b" not in grads
            continue
        found, other = grads[f"{key}.a"], wanted[f"{smaller[shortcut.name]}.a"]
        assert error(found[:rank], other) < 1e-12 and not found[rank:].any()
        found, other = grads[f"{key}.b"], wanted[f"{smaller[shortcut.name]}.b"]
        assert error(found[:, :rank], other) < 1e-12 and not found[:, rank:].any()


def _named(model):
    return [(f"low_rank_shortcuts.branches.{i}", s) for i, s in enumerate(model.low_rank_shortcuts)]


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_in_use_does_not_move_and_comes_back_to_the_bit(fused):
    model, masks, ranks = masked()
    if fused:
        heterolora.fuse(model, backend="aten")
    optimizer = adamw(model)
    train(model, optimizer, masks)
    before = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    assert masks.ranks == ranks and parked_count(model) == sum(r < FULL for r in ranks.values())
    masks.lift(optimizer)
    after = snapshot(model, optimizer)
    assert all(same(before[name], after[name]) for name in before)
    masks.apply(ranks, optimizer)
    off = next(s for s in model.low_rank_shortcuts if ranks[s.name] == 0)
    assert rank_in_use(off) == 0 and off.a.requires_grad and off.b.requires_grad
    off.b.grad = torch.zeros_like(off.b)  # as DDP may
    masks.drop_gradients()
    assert off.b.grad is None
    train(model, optimizer, masks, steps=3)
    masks.check_optimizer(optimizer)
    masks.lift(optimizer)
    after = snapshot(model, optimizer)
    for key, shortcut in _named(model):
        rank = ranks[shortcut.name]
        assert rank_in_use(shortcut) is None
        for side in "ab":
            old, new = before[f"{key}.{side}"], after[f"{key}.{side}"]
            if rank == 0:
                assert same(old, new), shortcut.name
                continue
            for part in ("value", "exp_avg", "exp_avg_sq"):
                one, two = (x[part] if side == "a" else x[part].T for x in (old, new))
                assert torch.equal(one[rank:], two[rank:]), (shortcut.name, part)
                assert not torch.equal(one[:rank], two[:rank]), (shortcut.name, part)


@pytest.mark.parametrize("targets", [None, ["query", "value"]], ids=["all-linear", "q,v"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_shortcut_that_is_off_is_no_branch_and_asks_for_no_source(fused, targets, monkeypatch):
    model, masks, ranks = masked(targets=targets)
    off = [name for name in masks.shortcuts if name.endswith("cross-ffn")]
    masks.apply({name: FULL * (name not in off) for name in ranks})
    if fused:
        heterolora.fuse(model, backend="aten")
    sources, asked = model.low_rank_shortcuts._sources, []
    get = sources.get
    monkeypatch.setattr(sources, "get", lambda key, name: asked.append(name) or get(key, name))
    model(**batch_for(model))
    assert set(asked) == masks.shortcuts.keys() - set(off) and len(off) == 2
    # Every one off: what the model is without them, whose ops they leave alone.
    masks.apply({name: FULL * (name in masks.layers) for name in ranks})
    asked.clear()
    batch = batch_for(model)
    with CountOps() as ops:
        logits = model(**batch).logits
    assert not asked and (ops.forward > 0) == fused
    assert ops.counts["heterolora::low_rank_add_"] == 0
    heterolora.remove_shortcuts(model)
    assert torch.equal(logits, model(**batch).logits)


@pytest.mark.parametrize("watched", [False, True], ids=["alone", "watched"])
def test_shortcuts_run_as_one_op_where_the_projection_has_no_lora_now(watched):
    model, masks, ranks = masked()
    model.double()
    masks.apply({name: 0 if name in masks.layers else 3 for name in ranks})
    batch = batch_for(model)
    expected, wanted = step(model, batch)
    projections = {name.partition(":")[0] for name in masks.shortcuts}
    seen = []
    if watched:
        base = model.get_base_model()
        for name in projections:
            hook = lambda module, args, output: seen.append((output, output.clone()))  # noqa: E731
            base.get_submodule(name).base_layer.register_forward_hook(hook)
    heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        logits, grads = step(model, batch)
    assert ops.counts["heterolora::low_rank_add_"] == (0 if watched else len(projections))
    assert len(seen) == (len(projections) if watched else 0)
    assert all(torch.equal(output, copy) for output, copy in seen)
    assert error(logits, expected) < 1e-13
    assert grads.keys() == wanted.keys()
    assert all(error(grads[key], wanted[key]) < 1e-12 for key in wanted)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradient_checkpointing(reentrant, fused):
    model, masks, ranks = masked("llama")
    # Of the two cross-ffn, whose source goes through a checkpoint, one is off.
    first, second = (name for name in masks.shortcuts if name.endswith("cross-ffn"))
    masks.apply({**ranks, first: 0, second: 3})
    batch = batch_for(model)
    if fused:
        heterolora.fuse(model, backend="aten", example=batch)
    _, expected = step(model, batch)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, grads = step(model, batch)
    assert same(expected, grads)


def test_fused_shapes_are_those_of_the_branches():
    model, masks, ranks = masked()
    masks.apply(ranks)
    heterolora.fuse(model, backend="aten")
    seen = []

    def compare(attachment, x):
        real = [(b.a.shape, b.b.shape, b.scale) for b in attachment.branches(0, x)]
        asked = [(b.a.shape, b.b.shape, b.scale) for b in attachment.shapes(0, x)]
        names = [shortcut.name for shortcut in attachment]
        assert real == asked and [a[0] for a, _, _ in real] == [ranks[name] for name in names]
        assert all(scale == 16 / FULL for _, _, scale in real)
        seen.extend(names)

    for name, attachment in model.low_rank_shortcuts.attachments.items():
        layer = model.get_base_model().get_submodule(name)
        hook = lambda m, args, a=attachment: compare(a, args[0])  # noqa: E731
        layer.register_forward_pre_hook(hook)
    model(**batch_for(model))
    assert sorted(seen) == sorted(name for name in masks.shortcuts if ranks[name])


def test_state_in_a_file_and_back():
    model, masks, ranks = masked()
    optimizer = adamw(model)
    train(model, optimizer, masks)
    whole = snapshot(model, optimizer)
    masks.apply(ranks, optimizer)
    tensors = {key: value.clone() for key, value in masks.tensors().items()}
    assert any(":in-ffn|b.exp_avg" in key for key in tensors)
    fresh = RankMasks(model)
    assert parked_count(model) == 0
    fresh.load(ranks, tensors)
    assert fresh.ranks == ranks and fresh.parked_is_zero()
    with torch.no_grad():
        next(s for s in model.low_rank_shortcuts if ranks[s.name] == 0).a.fill_(1)
    assert not fresh.parked_is_zero()
    fresh.lift(optimizer)
    after = snapshot(model, optimizer)
    assert all(same(whole[name], after[name]) for name in whole)
    without = {name: rank for name, rank in ranks.items() if name in masks.layers}
    with pytest.raises(ModelError, match="dense:.*' is a LoRA layer or shortcut of only one"):
        fresh.load(without, tensors)


def test_scales_and_shapes():
    model, masks, _ = masked()
    name = next(iter(masks.shortcuts))
    assert masks.shape(name) == (48, 48) and masks.scale(name) == 16 / FULL
    assert masks.scale(next(iter(masks.layers))) == 8 / FULL


def test_one_rank_for_all():
    model = with_shortcuts(plain("bert"), ranks=5, kinds=("in-ffn",))
    with pytest.raises(ModelError, match=r"0\.output\.dense:in-ffn has rank 5, and .* rank 4: .*r"):
        RankMasks(model)


def test_none_that_is_computed():
    model = with_shortcuts(plain("bert"), ranks=FULL, kinds=("in-ffn",))
    shortcut = next(iter(model.low_rank_shortcuts))
    register_parametrization(shortcut, "a", torch.nn.Identity())
    with pytest.raises(ModelError, match=r"shortcut .*0\.output\.dense:in-ffn is parametrised"):
        RankMasks(model)
