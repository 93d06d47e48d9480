"""Which backward operations a trace says are needed, against what autograd runs."""

import random
from collections import Counter

import pytest
import torch
import transformers
from helpers import batch_for, build, with_lora
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.errors import ModelError
from heterolora.search.sites import find_sites
from heterolora.search.step_time.trace import trace

CHAINS = ("bert", "roberta", "distilbert", "opt", "gpt2", "llama", "qwen3", "gemma", "vit")
# Backward operations that no adapter makes.
OWN = ("layer_norm", "gelu", "silu", "softmax", "relu", "threshold", "tanh", "attention")


class Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def own(names):
    return Counter({n: c for n, c in names.items() if "backward" in n and any(k in n for k in OWN)})


def observed(model, batch, chosen):
    """({site: whether its input needs a gradient}, own backward operations) with real adapters."""
    adapted = with_lora(model, {name: 2 for name in chosen})
    needs = {}
    for name, module in adapted.get_base_model().named_modules():
        base = getattr(module, "base_layer", module)
        if hasattr(base, "weight") and base.weight.dim() == 2:

            def see(layer, inputs, name=name):
                needs[name] = inputs[0].requires_grad

            module.register_forward_pre_hook(see)
    loss = adapted(**batch).loss
    counts = Counts()
    with counts:
        loss.backward()
    return needs, own(counts.names)


def predicted(found, names):
    cut = next(i for i, group in enumerate(found.groups) if set(group.names) & set(names))
    steps = Counter(step.name for part in found.backward[cut:] for step in part)
    needs = {name: cut <= group.above for group in found.groups for name in group.names}
    return needs, own(steps)


@pytest.mark.parametrize("name", CHAINS)
def test_the_cut_is_where_autograd_stops(name):
    model = build(name)
    batch = batch_for(model)
    sites = find_sites(model)
    found = trace(model, batch, sites)
    assert sorted(n for g in found.groups for n in g.names) == sorted(s.name for s in sites)
    draw = random.Random(1)
    for group in found.groups:
        above = [n for other in found.groups[found.groups.index(group) + 1 :] for n in other.names]
        pick = [*group.names, *draw.sample(above, min(2, len(above)))]
        needs, operations = observed(build(name), batch, pick)
        expected, modelled = predicted(found, pick)
        assert modelled == operations
        assert {n: needs[n] for n in expected} == expected
    assert operations


def test_a_sibling_that_is_not_adapted_is_an_upper_bound():
    """The activation of the gate needs no gradient where only `up_proj` is adapted."""
    model = build("llama")
    batch = batch_for(model)
    found = trace(model, batch, find_sites(model))
    pick = ["model.layers.1.mlp.up_proj"]
    needs, operations = observed(build("llama"), batch, pick)
    expected, modelled = predicted(found, pick)
    assert modelled - operations == Counter({"aten.silu_backward": 1})
    assert {n: needs[n] for n in expected} == expected


def test_an_encoder_and_a_decoder_are_an_upper_bound():
    model = build("t5")
    batch = batch_for(model)
    found = trace(model, batch, find_sites(model))
    for group in found.groups:
        needs, operations = observed(build("t5"), batch, group.names[:1])
        expected, modelled = predicted(found, group.names[:1])
        assert operations <= modelled
        assert all(expected[n] for n in expected if needs[n])
    decoder = next(i for i, g in enumerate(found.groups) if g.names[0].startswith("decoder"))
    assert found.groups[decoder].above == -1
    assert found.groups[decoder + 1].above == decoder


def test_groups_are_those_that_share_an_input():
    model = build("bert")
    found = trace(model, batch_for(model, rows=3, length=9), find_sites(model))
    layer = "bert.encoder.layer.1."
    group = next(g for g in found.groups if g.names[0].startswith(layer))
    assert group.names == tuple(f"{layer}attention.self.{n}" for n in ("query", "key", "value"))
    assert group.problem.m == 27 and group.problem.sources == (48,)
    assert group.problem.sites == (48, 48, 48) and group.problem.bias
    assert group.problem.itemsize == 4


def test_under_autocast_the_operands_are_of_its_dtype():
    model = build("bert")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trace(model, batch_for(model), find_sites(model))
    assert {group.problem.itemsize for group in found.groups} == {2}
    assert {group.problem.factor_itemsize for group in found.groups} == {4}


def test_flops_of_the_forward_pass_are_those_of_its_matmuls():
    model = build("bert")
    found = trace(model, batch_for(model, rows=3, length=9), find_sites(model))
    encoder = sum(2 * g.problem.m * g.problem.sources[0] * sum(g.problem.sites)
                  for g in found.groups)  # fmt: skip
    head = 2 * 3 * 48 * 3
    attention = 2 * (4 * 3 * 9 * 9 * 48)
    assert sum(step.flops for step in found.forward) == encoder + head + attention


def test_checkpointing_computes_the_forward_pass_again_and_never_ends_the_backward_pass():
    """Transformers makes the embeddings' output require grad for it, whatever is adapted."""
    plain, kept = build("bert"), build("bert")
    kept.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_for(plain)
    first, second = (trace(m, batch, find_sites(m)) for m in (plain, kept))
    assert [(g.names, g.problem) for g in first.groups] == [
        (g.names, g.problem) for g in second.groups
    ]
    ones, twos = (sum(s.flops for part in f.backward for s in part) for f in (first, second))
    encoder = sum(2 * g.problem.m * g.problem.sources[0] * sum(g.problem.sites)
                  for g in first.groups)  # fmt: skip
    assert twos > ones + 0.8 * encoder
    top = list(second.groups[-1].names)
    needs, _ = observed(kept, batch, top)
    expected, _ = predicted(second, top)
    assert {n: needs[n] for n in expected} == expected and all(expected.values())


def test_reentrant_checkpointing_is_refused():
    model = build("bert")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="called with gradients off.*'use_reentrant': False"):
        trace(model, batch_for(model), find_sites(model))


def test_a_module_that_is_called_twice_counts_all_its_rows():
    config = transformers.AlbertConfig(
        vocab_size=97, embedding_size=16, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=80, num_labels=3,
    )  # fmt: skip
    model = transformers.AlbertForSequenceClassification(config)
    found = trace(model, batch_for(model, rows=3, length=9), find_sites(model, ["query", "value"]))
    assert [group.problem.m for group in found.groups] == [3 * 27]


def test_the_model_is_left_as_it_was():
    model = build("bert").eval()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    grads = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    trace(model, batch_for(model), find_sites(model))
    assert all(torch.equal(before[n], p) for n, p in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not model.training
