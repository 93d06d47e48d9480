"""Shortcuts in a fused model: branches of the op of their projection, whatever path that takes."""

import copy

import pytest
import torch
from ddp import train_twice
from helpers import CountOps, batch_for, error, step
from shortcut_models import FAMILIES, FEW, decoder_targets, plain, with_shortcuts

import heterolora
from heterolora.fusion import call as fused_call
from heterolora.kernels.dispatch import Choice
from heterolora.search.scores.proxies import PROXIES


def _added(ops):
    return ops.counts["heterolora::low_rank_add_"]


def _branches(monkeypatch):
    """How many branches every call of the group op had, beside one a layer."""
    counts = []
    original = fused_call.group_linear

    def counted(x, sites, branches, **options):
        counts.append(len(branches) - len(sites))
        return original(x, sites, branches, **options)

    monkeypatch.setattr(fused_call, "group_linear", counted)
    return counts


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FAMILIES)
def test_fused_equals_unfused(name, monkeypatch):
    base = plain(name)
    batch = batch_for(base)
    model = with_shortcuts(base)
    logits, grads = step(model, batch)
    report = heterolora.fuse(model, example=batch, backend="aten", strict=True)
    assert not report.declined
    further = _branches(monkeypatch)
    with CountOps() as ops:
        fused, ours = step(model, batch)
    assert sum(further) == 7 and ops.forward == ops.backward > 0 and not _added(ops)
    assert error(fused, logits) < 1e-5
    assert ours.keys() == grads.keys()
    for key, grad in grads.items():
        assert error(ours[key], grad) < 1e-5, key
    heterolora.unfuse(model)
    again, _ = step(model, batch)
    assert torch.equal(again, logits)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", FEW)
def test_a_projection_without_lora_takes_the_op_that_adds(name):
    """LoRA on Q and V alone, as in the original runs."""
    base = plain(name, layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base, targets=decoder_targets(name))
    logits, grads = step(model, batch)
    heterolora.fuse(model, example=batch, backend="aten")
    with CountOps() as ops:
        fused, ours = step(model, batch)
    assert _added(ops) == 6 and ops.forward == 3
    assert error(fused, logits) < 1e-5
    for key, grad in grads.items():
        assert error(ours[key], grad) < 1e-5, key
    seen = []
    projection = base.get_submodule(next(iter(model.low_rank_shortcuts)).candidate.projection)
    projection.register_forward_hook(lambda module, args, y: seen.append((y, y.clone())))
    with CountOps() as ops:
        step(model, batch)
    assert _added(ops) == 5, "what another hook may hold is not written into"
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("targets", [True, False], ids=["q,v", "all-linear"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_is_bit_equal(name, reentrant, targets):
    base = plain(name, layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base, targets=decoder_targets(name) if targets else None)
    model.enable_input_require_grads()
    heterolora.fuse(model, example=batch, backend="aten")
    logits, grads = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with CountOps() as ops:
        again, checkpointed = step(model, batch)
    assert ops.forward + _added(ops) > ops.backward > 0, "the layers must have been recomputed"
    assert torch.equal(again, logits)
    assert checkpointed.keys() == grads.keys()
    for key, grad in grads.items():
        assert torch.equal(checkpointed[key], grad), key


def test_a_fresh_fused_model_is_as_without_shortcuts():
    base = plain("llama")
    batch = batch_for(base)
    model = with_shortcuts(base, weighty=False)
    heterolora.fuse(model, example=batch, backend="aten")
    logits, _ = step(model, batch)
    heterolora.remove_shortcuts(model)
    assert "_heterolora" in model.__dict__, "it stays fused"
    with CountOps() as ops:
        without, _ = step(model, batch)
    assert ops.forward > 0
    assert torch.equal(logits, without)


def test_added_to_a_fused_model(monkeypatch):
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    logits, _ = step(model, batch)
    state = model.low_rank_shortcuts.state_dict()
    ranks = {shortcut.name: shortcut.rank for shortcut in model.low_rank_shortcuts}
    heterolora.remove_shortcuts(model)
    heterolora.fuse(model, example=batch, backend="aten")
    groups = model._heterolora.groups
    heterolora.add_shortcuts(model, rank=ranks)
    model.low_rank_shortcuts.load_state_dict(state)
    assert len(model._heterolora.groups) == len(groups) == 2
    further = _branches(monkeypatch)
    assert error(step(model, batch)[0], logits) < 1e-5
    assert sum(further) == 7


@pytest.mark.parametrize("path", ["peft", "aten"])
def test_dispatch_counts_them_and_no_path_drops_them(path, monkeypatch):
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    logits, grads = step(model, batch)
    asked = []

    def quickest(x, sites, branches, *, captured):
        asked.append((len(sites), len(branches)))
        return Choice(path, "told")

    monkeypatch.setattr(fused_call, "quickest", quickest)
    report = heterolora.fuse(model)
    out = "bert.encoder.layer.1.attention.output.dense"
    assert (out in report.left) is (path == "peft")
    # One branch of LoRA, in-attn and cross-ffn.
    assert (1, 3) in asked
    asked.clear()
    for _ in range(2):
        with CountOps() as ops:
            ours, our_grads = step(model, batch)
        assert (ops.forward == 0) is (path == "peft")
        assert error(ours, logits) < 1e-5
        for key, grad in grads.items():
            assert error(our_grads[key], grad) < 1e-5, key
    assert (1, 3) in asked


def test_a_layer_that_falls_back_keeps_them():
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    logits, _ = step(model, batch)
    heterolora.fuse(model, backend="aten")
    model.merge_adapter()
    with CountOps() as ops:
        merged, _ = step(model, batch)
    assert ops.forward == 0
    assert error(merged, logits) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        bare = model(**batch).logits
    assert error(bare, plain("bert")(**batch).logits) < 1e-6


def test_a_sibling_with_shortcuts_waits_for_its_own_call():
    """By an explicit mapping onto V, whose source arises when V itself is called."""
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    heterolora.remove_shortcuts(model)
    mapping = [
        {
            "attention_out": f"bert.encoder.layer.{i}.attention.self.value",
            "ffn_out": f"bert.encoder.layer.{i}.output.dense",
            "layer_input": f"bert.encoder.layer.{i}.attention.self.value",
            "ffn_input": f"bert.encoder.layer.{i}.intermediate",
        }
        for i in range(2)
    ]
    heterolora.fuse(model, example=batch, backend="aten")
    assert len(model._heterolora.groups) == 2
    heterolora.add_shortcuts(model, mapping=mapping)
    for shortcut in model.low_rank_shortcuts:
        torch.nn.init.normal_(shortcut.b, std=0.02)
    assert not model._heterolora.groups
    heterolora.unfuse(model)
    heterolora.fuse(model, example=batch, backend="aten")
    with CountOps() as ops:
        fused, ours = step(model, batch)
    assert ops.forward > 0 and not model._heterolora.groups
    heterolora.unfuse(model)
    logits, grads = step(model, batch)
    assert error(fused, logits) < 1e-5
    for key, grad in grads.items():
        assert error(ours[key], grad) < 1e-5, key


@pytest.mark.parametrize("targets", [True, False], ids=["q,v", "all-linear"])
def test_mixed_precision(targets):
    """The error against float64 is at most twice that of the unfused model."""
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base, targets=["query", "value"] if targets else None)
    truth, true_grads = step(copy.deepcopy(model).double(), batch)
    results = []
    for fused in (False, True):
        if fused:
            heterolora.fuse(model, example=batch, backend="aten")
        with torch.autocast("cpu", torch.bfloat16), CountOps() as ops:
            results.append(step(model, batch))
        assert (ops.forward > 0) is fused
    (eager, eager_grads), (logits, grads) = results
    assert logits.dtype == eager.dtype and error(logits, truth) <= 2 * error(eager, truth)
    ours, theirs = (
        sum(error(of[key], true_grads[key]) for key in true_grads) for of in (grads, eager_grads)
    )
    assert ours <= 2 * theirs


def test_own_base_layers_take_them_too():
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    logits, grads = step(model, batch)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.base_layer.register_forward_hook(lambda *_: None)
    heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        ours, our_grads = step(model, batch)
    # One operation a layer, shortcuts included.
    assert ops.forward == 0 and _added(ops) == len(model._heterolora.layers)
    assert error(ours, logits) < 1e-5
    for key, grad in grads.items():
        assert error(our_grads[key], grad) < 1e-5, key


def test_generation_with_a_cache():
    base = plain("llama", layers=3)
    base.config.use_cache = True
    model = with_shortcuts(base).eval()
    ids = torch.randint(3, 97, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(input_ids=ids, **options)
    heterolora.fuse(model, backend="aten")
    with CountOps() as ops:
        found = model.generate(input_ids=ids, **options)
    assert ops.forward > 0
    assert torch.equal(found.sequences, expected.sequences)
    assert error(found.logits[-1], expected.logits[-1]) < 1e-5


def test_copies_do_not_share_sources():
    base = plain("bert", layers=3)
    one, two = batch_for(base, seed=1), batch_for(base, seed=2)
    model = with_shortcuts(base)
    heterolora.fuse(model, example=one, backend="aten")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for shortcut in twin.low_rank_shortcuts:
            shortcut.b.mul_(2)
    expected = [step(m, one)[0] for m in (model, twin)]
    assert error(*expected) > 1e-4
    inner = []
    hook = lambda *_: inner.append(twin(**one).logits) if not inner else None  # noqa: E731
    base.bert.encoder.layer[1].register_forward_pre_hook(hook)
    assert torch.equal(model(**one).logits, expected[0])
    assert torch.equal(inner[0], expected[1])
    assert error(model(**two).logits, expected[0]) > 1e-4


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """DDP on gloo, with checkpoints, each process with half of the batch."""
    one, two = train_twice(tmp_path, "shortcuts")
    assert one.keys() == two.keys()
    factors = [name for name in one if "low_rank_shortcuts" in name]
    assert len(factors) == 14 and all((one[name] != 0).any() for name in factors)
    for name, value in one.items():
        # DDP averages two halves where one process sums over the whole.
        assert error(two[name], value) < 1e-4, name


def test_scores_are_those_of_plain_gradients():
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    _, grads = step(model, batch)
    shortcuts = {s.name: (s.a.grad.norm(), s.b.grad.norm()) for s in model.low_rank_shortcuts}
    model.zero_grad()
    heterolora.fuse(model, example=batch, backend="aten")
    scores = PROXIES["grad-norm"](model, [batch])
    shortcuts = {s.name: (s.a, s.b) for s in model.low_rank_shortcuts}
    assert "bert.encoder.layer.1.output.dense" in scores and shortcuts.keys() < scores.keys()
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    for name, score in scores.items():
        factors = [f"base_model.model.{name}.lora_{factor}.default.weight" for factor in "AB"]
        if name in shortcuts:
            factors = [keys[id(factor)] for factor in shortcuts[name]]
        norm = sum(float(grads[factor].norm()) for factor in factors)
        assert score == pytest.approx(norm, rel=1e-5), name


def test_compiled_whole():
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base, targets=["query", "value", "attention.output.dense"])
    expected, grads = step(model, batch)
    heterolora.fuse(model, example=batch, backend="aten")
    nodes = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    model.zero_grad()
    output = torch.compile(model, backend=backend, fullgraph=True)(**batch)
    output.loss.backward()
    # Of Q and V as a group, and of the attention's output; the FFN's has no LoRA.
    assert sum("heterolora.group_linear" in node for node in nodes) == 4
    assert sum("heterolora.low_rank_add" in node for node in nodes) == 2
    assert error(output.logits, expected) < 1e-5
    for name, parameter in model.named_parameters():
        if name in grads:
            assert error(parameter.grad, grads[name]) < 1e-5, name
