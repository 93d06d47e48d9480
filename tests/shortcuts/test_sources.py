"""Where a shortcut's source comes from and how long it lives: checkpoints, nesting, errors."""

import gc
import weakref

import pytest
import torch
from helpers import batch_for, error, step
from shortcut_models import (
    FEW,
    RANKS,
    decoder_targets,
    plain,
    with_shortcuts,
)
from torch.utils.checkpoint import checkpoint

import heterolora
from heterolora.errors import ShortcutError
from heterolora.shortcuts.model import KINDS, Shortcuts


def _frames(model):
    return model.low_rank_shortcuts._sources._frames


@pytest.mark.parametrize("targets", [True, False], ids=["q,v", "all-linear"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", FEW)
def test_gradient_checkpointing_is_bit_equal(name, reentrant, targets):
    base = plain(name, layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base, targets=decoder_targets(name) if targets else None)
    model.enable_input_require_grads()
    logits, grads = step(model, batch)
    calls = []
    layers = [m for m in base.modules() if hasattr(m, "_gradient_checkpointing_func")]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    projection = base.get_submodule(next(iter(model.low_rank_shortcuts)).candidate.projection)
    projection.register_forward_hook(lambda *_: calls.append(1))
    again, checkpointed = step(model, batch)
    assert len(calls) == 2, "the layers must have been recomputed"
    assert torch.equal(again, logits)
    assert checkpointed.keys() == grads.keys()
    for key, grad in grads.items():
        assert torch.equal(checkpointed[key], grad), key
    assert not _frames(model)
    heterolora.remove_shortcuts(model)
    model(**batch).loss.backward()
    assert all(type(m._gradient_checkpointing_func).__name__ != "_Carrier" for m in layers)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_forward_passes_may_interleave(reentrant):
    base = plain("llama", layers=3)
    one, two = batch_for(base, seed=1), batch_for(base, seed=2)
    model = with_shortcuts(base)
    model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = [step(model, batch)[1] for batch in (one, two)]
    model.zero_grad()
    losses = [model(**batch).loss for batch in (one, two)]
    for loss, grads in zip(losses, expected, strict=True):
        model.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in grads:
                assert torch.equal(parameter.grad, grads[name]), name


def test_a_pass_within_a_pass():
    base = plain("bert", layers=3)
    one, two = batch_for(base, seed=1), batch_for(base, seed=2, rows=2)
    model = with_shortcuts(base)
    expected = [model(**batch).logits for batch in (one, two)]
    inner = []

    def nested(module, args):
        if not inner:
            inner.append(None)
            inner[0] = model(**two).logits

    base.bert.encoder.layer[1].attention.self.query.register_forward_pre_hook(nested)
    assert torch.equal(model(**one).logits, expected[0])
    assert torch.equal(inner[0], expected[1])
    assert not _frames(model)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_an_exception_leaves_nothing_behind(reentrant):
    base = plain("opt-350m", layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base)
    if reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, _ = step(model, batch)
    sources = []

    def fail(module, args):
        sources.append(weakref.ref(args[0]))
        raise KeyError("fc1")

    handle = base.model.decoder.layers[1].fc1.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="fc1"):
        model(**batch)
    assert not _frames(model)
    gc.collect()
    assert sources[0]() is None
    handle.remove()
    assert torch.equal(model(**batch).logits, expected)


def test_sources_are_let_go_of_layer_by_layer():
    base = plain("llama", layers=4)
    model = with_shortcuts(base).eval()
    held = []

    def count(module, args, output):
        held.append(len(_frames(model)[-1].tensors))

    for layer in base.model.layers:
        layer.mlp.register_forward_hook(count)
    with torch.no_grad():
        model(**batch_for(base))
    assert held == [2, 3, 3, 3]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_generation_with_a_cache_equals_generation_without(name):
    model = with_shortcuts(plain(name, layers=3)).eval()
    model.get_base_model().config.use_cache = True
    ids = torch.randint(3, 97, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(input_ids=ids, use_cache=True, **options)
    whole = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, whole.sequences)
    for ours, theirs in zip(cached.logits, whole.logits, strict=True):
        assert error(ours, theirs) < 1e-5
    heterolora.remove_shortcuts(model)
    without = model.generate(input_ids=ids, use_cache=True, **options)
    assert error(without.logits[0], cached.logits[0]) > 1e-4


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_a_layer_that_runs_twice(reentrant):
    """A model that calls its two layers in turn, twice: each call reads its own sources."""

    def twice(base):
        layers = base.bert.encoder.layer
        base.bert.encoder.layer = torch.nn.ModuleList([*layers, *layers])
        return base

    batch = batch_for(plain("bert"))
    shared = with_shortcuts(twice(plain("bert")))
    assert len(list(shared.low_rank_shortcuts)) == 7
    assert all(".layer.0." in s.name or ".layer.1." in s.name for s in shared.low_rank_shortcuts)
    # The first layer has no cross-ffn, so neither has its second run.
    none = {"bert.encoder.layer.2.attention.output.dense:cross-ffn": 0}
    apart = with_shortcuts(plain("bert", layers=4), ranks={**RANKS, **none})
    layers = apart.get_base_model().bert.encoder.layer
    source = shared.get_base_model()
    for index in range(4):
        layers[index].load_state_dict(source.bert.encoder.layer[index].state_dict())
    rest = {k: v for k, v in source.state_dict().items() if ".layer." not in k}
    apart.get_base_model().load_state_dict(rest, strict=False)
    own = list(shared.low_rank_shortcuts)
    for index, shortcut in enumerate(apart.low_rank_shortcuts):
        shortcut.load_state_dict(own[index % 7].state_dict())
    if reentrant is not None:
        shared.enable_input_require_grads()
        shared.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found, _ = step(shared, batch)
    expected, _ = step(apart, batch)
    assert torch.equal(found, expected)
    copies = list(apart.low_rank_shortcuts)
    for index, shortcut in enumerate(own):
        total = copies[index].b.grad + copies[index + 7].b.grad
        assert error(shortcut.b.grad, total) < 1e-6


def test_compiled_whole():
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    expected, grads = step(model, batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.zero_grad()
    output = compiled(**batch)
    output.loss.backward()
    assert error(output.logits, expected) < 1e-5
    for name, parameter in model.named_parameters():
        if name in grads:
            assert error(parameter.grad, grads[name]) < 1e-5, name


def test_compiled_with_checkpoints_is_declined_or_left_to_python():
    base = plain("llama", layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(Exception, match="compile, or checkpoint, but not both"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(**batch)
    expected, grads = step(model, batch)
    torch._dynamo.reset()
    model.zero_grad()
    output = torch.compile(model, backend="aot_eager")(**batch)
    output.loss.backward()
    assert torch.equal(output.logits, expected)
    for name, parameter in model.named_parameters():
        if name in grads:
            assert error(parameter.grad, grads[name]) < 1e-5, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_inside_of_a_layers_call_by_other_code_are_refused(reentrant):
    def around(layer):
        plain_call = layer.forward
        layer.forward = lambda *a, **k: checkpoint(
            lambda *inner: plain_call(*inner, **k), *a, use_reentrant=reentrant
        )

    batch = batch_for(plain("bert"))
    for kind in KINDS:
        model = with_shortcuts(plain("bert", layers=3), (kind,))
        model.enable_input_require_grads()
        for layer in model.get_base_model().bert.encoder.layer:
            around(layer)
        # Recomputed outside of a pass and of the layer's own call.
        with pytest.raises(ShortcutError, match=r"is not known in this call.*gradient_checkpoint"):
            step(model, batch)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_around_a_layers_call_by_other_code(reentrant):
    """The layer's own sources are captured again; that of the layer before is not to be had."""
    batch = batch_for(plain("bert"))
    for kind in KINDS:
        model = with_shortcuts(plain("bert", layers=3), (kind,))
        model.enable_input_require_grads()
        logits, grads = step(model, batch)
        encoder = model.get_base_model().bert.encoder
        encoder.layer = torch.nn.ModuleList(_Around(layer, reentrant) for layer in encoder.layer)
        if kind == "cross-ffn":
            with pytest.raises(ShortcutError, match="the FFN input of layer 1 is not known"):
                step(model, batch)
            continue
        again, checkpointed = step(model, batch)
        assert torch.equal(again, logits)
        assert all(
            torch.equal(checkpointed[name.replace("layer.layer", "layer")], grad)
            for name, grad in grads.items()
            if name in checkpointed
        )
        shortcuts = [name for name in grads if "low_rank_shortcuts" in name]
        assert all(torch.equal(checkpointed[name], grads[name]) for name in shortcuts)


class _Around(torch.nn.Module):
    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, *args, **kwargs):
        return checkpoint(
            lambda *inner: self.layer(*inner, **kwargs), *args, use_reentrant=self.reentrant
        )


def test_a_layer_called_alone():
    """Its own sources are there; that of the layer before is not, which is an error, not a zero."""
    x = torch.randn(2, 5, 48)
    for kinds in (("in-attn", "in-ffn", "cross-layer"), KINDS):
        model = with_shortcuts(plain("bert"), kinds)
        layer = model.get_base_model().bert.encoder.layer[1]
        if "cross-ffn" in kinds:
            with pytest.raises(ShortcutError, match="the FFN input of layer 0 is not known"):
                layer(x)
        else:
            on = layer(x)
            heterolora.remove_shortcuts(model)
            assert error(layer(x), on) > 1e-4
        if Shortcuts.of(model) is not None:
            assert not _frames(model)
