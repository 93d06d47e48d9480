"""Shortcuts without fused kernels: what they compute, on which models, and what is refused."""

import copy

import pytest
import torch
import transformers
from helpers import batch_for, build, error, step
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from shortcut_models import (
    FAMILIES,
    RANKS,
    plain,
    slow_logits,
    with_shortcuts,
)

import heterolora
from heterolora.errors import ShortcutError
from heterolora.shortcuts.model import KINDS, Shortcuts, shortcut_candidates


@pytest.mark.parametrize("name", FAMILIES)
def test_fresh_model_is_the_pretrained_one_to_the_bit(name):
    base = plain(name)
    batch = batch_for(base)
    expected = base(**batch).logits
    model = with_shortcuts(base, weighty=False)
    assert len(list(model.low_rank_shortcuts)) == 2 * 4 - 1
    assert torch.equal(model(**batch).logits, expected)
    _, grads = step(model, batch)
    for shortcut in model.low_rank_shortcuts:
        # B = 0: only B learns, and it does, so the branch ran.
        assert (shortcut.b.grad != 0).any(), shortcut.name
        assert not shortcut.a.grad.any()
    assert len(grads) >= 14


@pytest.mark.parametrize("kinds", [KINDS, *((kind,) for kind in KINDS)], ids="+".join)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_logits_and_gradients_follow_the_formula(name, kinds):
    base = plain(name, layers=3).double()
    batch = batch_for(base)
    model = with_shortcuts(base, kinds).double()
    assert all(shortcut.a.dtype == torch.float64 for shortcut in model.low_rank_shortcuts)
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.randn(model(**batch).logits.shape, dtype=torch.float64)
    # Rows of padding attend to nothing that counts, and are left out.
    if name == "llama":
        weights[batch["attention_mask"] == 0] = 0
    results = []
    for logits in (model(**batch).logits, slow_logits(model, batch)):
        results.append((logits, torch.autograd.grad((logits * weights).sum(), parameters)))
    (logits, grads), (slow, slow_grads) = results
    # 1e-12: float64 rounding through three layers; RMSNorm and rotary angles of transformers are
    # computed in float32 by design.
    limit = 1e-12 if name == "bert" else 1e-6
    rows = batch["attention_mask"] == 1 if name == "llama" else slice(None)
    assert error(logits[rows], slow[rows]) < limit
    for ours, theirs in zip(grads, slow_grads, strict=True):
        assert error(ours, theirs) < 10 * limit


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_sources_and_places_where_sub_layers_end_in_a_norm(name):
    """x and z are the residual stream, and a shortcut adds to what the norm is given."""
    base = plain(name, layers=3).double()
    model = with_shortcuts(base, targets=["q_proj", "v_proj"]).double()
    own = {shortcut.name: shortcut for shortcut in model.low_rank_shortcuts}
    called = {}
    for module_name, module in base.named_modules():

        def note(module, args, kwargs, output, key=module_name):
            x = args[0] if args else kwargs.get("hidden_states")
            called[key] = x, output[0] if isinstance(output, tuple) else output

        # Once hooked, in the order of the hooks: behind the shortcuts' own.
        module.register_forward_hook(note, with_kwargs=True)

    def added(projection, kind, u):
        shortcut = own[f"{projection}:{kind}"]
        return 16 / RANKS[kind] * u @ shortcut.a.T @ shortcut.b.T

    model(**batch_for(base))
    before = None
    for index, layer in enumerate(base.model.layers):
        prefix = f"model.layers.{index}"
        x, output = called[prefix]
        out = f"{prefix}.self_attn.o_proj"
        attention = layer.self_attn.o_proj.weight @ called[out][0].mT
        attention = attention.mT + added(out, "in-attn", x)
        if before is not None:
            attention = attention + added(out, "cross-ffn", before)
        assert error(called[f"{prefix}.post_attention_layernorm"][0], attention) < 1e-13
        z = x + called[f"{prefix}.post_attention_layernorm"][1]
        out = f"{prefix}.mlp.down_proj"
        ffn = (layer.mlp.down_proj.weight @ called[out][0].mT).mT
        ffn = ffn + added(out, "in-ffn", z) + added(out, "cross-layer", x)
        assert error(called[f"{prefix}.post_feedforward_layernorm"][0], ffn) < 1e-13
        assert torch.equal(output, z + called[f"{prefix}.post_feedforward_layernorm"][1])
        before = z


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_the_logits(kind):
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    before, _ = step(model, batch)
    with torch.no_grad():
        for shortcut in model.low_rank_shortcuts:
            if shortcut.candidate.kind == kind:
                assert shortcut.rank == RANKS[kind]
                shortcut.b.zero_()
    after, _ = step(model, batch)
    assert error(after, before) > 1e-4


def test_parameters_are_the_models():
    model = with_shortcuts(plain("bert"))
    names = [n for n, p in model.named_parameters() if n.startswith("low_rank_shortcuts.")]
    assert len(names) == 14 and not any("lora_" in name for name in names)
    assert {n for n in model.state_dict() if n.startswith("low_rank_shortcuts.")} == set(names)
    assert all(dict(model.named_parameters())[name].requires_grad for name in names)
    batch = batch_for(model)
    expected = model(**batch).logits
    half = model.to(torch.bfloat16)(**batch).logits
    assert half.dtype == torch.bfloat16 and error(half.float(), expected) < 0.05


def test_mixed_precision():
    base = plain("bert").to(torch.bfloat16)
    batch = batch_for(base)
    fresh = base(**batch).logits
    model = with_shortcuts(base, weighty=False)
    assert torch.equal(model(**batch).logits, fresh)
    assert next(iter(model.low_rank_shortcuts)).a.dtype == torch.float32
    logits, grads = step(with_shortcuts(plain("bert").to(torch.bfloat16)), batch)
    assert logits.dtype == torch.bfloat16 and all(g.isfinite().all() for g in grads.values())
    model = with_shortcuts(plain("bert"))
    whole, _ = step(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = step(model, batch)
    assert 0 < error(cast.float(), whole) < 0.05


@pytest.mark.parametrize("targets", [["query", "value"], ["pooler.dense"]], ids="+".join)
def test_off_with_the_adapters_and_gone_with_them(caplog, targets):
    base = plain("bert")
    batch = batch_for(base)
    expected = base(**batch).logits
    model = with_shortcuts(base, targets=targets)
    on = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model(**batch).logits, on)
    copied = copy.deepcopy(model)
    unloaded = model.unload()
    assert torch.equal(unloaded(**batch).logits, expected)
    assert "unloaded, and the shortcuts with them" in caplog.text
    assert torch.equal(copied(**batch).logits, on)
    heterolora.remove_shortcuts(copied)
    assert Shortcuts.of(copied) is None
    assert all("Attachment" not in repr(m._forward_hooks) for m in copied.modules())
    assert error(copied(**batch).logits, on) > 1e-4


def test_explicit_mapping_equals_what_is_found():
    batch = batch_for(plain("bert"))
    expected, _ = step(with_shortcuts(plain("bert")), batch)
    mapping = [
        {
            "attention_out": f"bert.encoder.layer.{i}.attention.output.dense",
            "ffn_out": f"bert.encoder.layer.{i}.output.dense",
            "layer_input": f"bert.encoder.layer.{i}.attention.self.query",
            "ffn_input": f"bert.encoder.layer.{i}.intermediate.dense",
        }
        for i in range(2)
    ]
    model = with_shortcuts(plain("bert"))
    state = model.low_rank_shortcuts.state_dict()
    heterolora.remove_shortcuts(model)
    heterolora.add_shortcuts(model, rank=RANKS, mapping=mapping)
    model.low_rank_shortcuts.load_state_dict(state)
    assert torch.equal(step(model, batch)[0], expected)


def test_opt_350m_has_95_candidates():
    config = transformers.OPTConfig(
        vocab_size=97, hidden_size=16, num_hidden_layers=24, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=8, do_layer_norm_before=False,
    )  # fmt: skip
    found = shortcut_candidates(transformers.OPTForCausalLM(config))
    assert len(found) == 95
    assert {candidate.unit_cost for candidate in found} == {32}
    assert sum(candidate.kind == "cross-ffn" for candidate in found) == 23


def test_ranks_and_alphas_by_name():
    model = get_peft_model(build("bert"), LoraConfig(r=2, target_modules=["query"]))
    last = "bert.encoder.layer.1.output.dense:in-ffn"
    names = heterolora.add_shortcuts(model, rank={"in-ffn": 4, last: 6}, alpha={"in-ffn": 8})
    assert names == ("bert.encoder.layer.0.output.dense:in-ffn", last)
    first, second = model.low_rank_shortcuts
    assert (first.rank, first.scale, second.rank, second.scale) == (4, 2, 6, 8 / 6)
    more = heterolora.add_shortcuts(model, ("cross-ffn",), rank=3)
    assert more == ("bert.encoder.layer.1.attention.output.dense:cross-ffn",)
    assert len(list(model.low_rank_shortcuts)) == 3


def _adapted(name="bert"):
    return get_peft_model(build(name), LoraConfig(r=2, target_modules="all-linear"))


GOOD = {
    "attention_out": "bert.encoder.layer.0.attention.output.dense",
    "ffn_out": "bert.encoder.layer.0.output.dense",
    "layer_input": "bert.encoder.layer.0.attention",
    "ffn_input": "bert.encoder.layer.0.intermediate",
}
REFUSED = {
    "unknown kind": ({"kinds": ["in-att"]}, "unknown kind 'in-att'"),
    "kinds as text": ({"kinds": "in-attn"}, "kinds must be a list"),
    "negative rank": ({"rank": -1}, "rank -1 is not an integer"),
    "rank as text": ({"rank": "8"}, "rank '8' is not an integer"),
    "no rank": ({"rank": 0}, "no shortcut is left"),
    "rank of unknown": ({"rank": {"in-atn": 1}}, "'in-atn' is neither a kind"),
    "alpha": ({"alpha": float("nan")}, "alpha nan is not a finite number"),
    "empty mapping": ({"mapping": []}, "mapping must be a list"),
    "keys": ({"mapping": [{"attention_out": "a"}]}, "must be a dict of exactly attention_out"),
    "name": ({"mapping": [{**GOOD, "ffn_input": "bert.nix"}]}, "ffn_input: .*no module 'bert.nix'"),
    "not linear": (
        {"mapping": [{**GOOD, "ffn_out": "bert.encoder.layer.0.intermediate"}]},
        "ffn_out: bert.encoder.layer.0.intermediate is a BertIntermediate",
    ),
    "twice": ({"mapping": [GOOD, GOOD]}, "as an output projection twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, message = REFUSED[case]
    model = _adapted()
    with pytest.raises(ShortcutError, match=message):
        heterolora.add_shortcuts(model, **options)
    assert Shortcuts.of(model) is None
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_refused_models():
    with pytest.raises(ShortcutError, match=r"cannot read the layers.*encoder\.block\.0 \(T5Block"):
        heterolora.add_shortcuts(_adapted("t5"))
    with pytest.raises(ShortcutError, match=r"has no LoRA layers; wrap it first"):
        heterolora.add_shortcuts(build("bert"))
    model = _adapted()
    heterolora.add_shortcuts(model)
    with pytest.raises(ShortcutError, match=r"0.attention.output.dense:in-attn is there already"):
        heterolora.add_shortcuts(model)
    base = build("bert")
    base.bert.encoder.layer[0].chunk_size_feed_forward = 4
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(ShortcutError, match=r"layer\.0 runs its FFN in chunks"):
        heterolora.add_shortcuts(model)
    base = build("llama")
    base.model.layers[1].mlp = torch.nn.Identity()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ShortcutError, match=r"model\.layers\.1 \(LlamaDecoderLayer\) is no layer"):
        heterolora.add_shortcuts(model)


def test_a_model_with_injected_layers():
    base = plain("llama")
    batch = batch_for(base)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj", "o_proj"]), base)
    expected = model(**batch).logits
    assert len(heterolora.add_shortcuts(model)) == 7
    assert torch.equal(model(**batch).logits, expected)
    step(model, batch)
    assert all((shortcut.b.grad != 0).any() for shortcut in model.low_rank_shortcuts)
