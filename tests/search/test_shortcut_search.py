"""Shortcuts in the static search: candidates, budgets, and models made of what it finds."""

import json
import math
from dataclasses import replace

import pytest
import torch
import transformers
from shortcut_models import plain

import heterolora
from heterolora.errors import AllocationFileError, BudgetError, ModelError, ShortcutError
from heterolora.search import Allocation, Budget, SearchSpace, adapt, allocate, uniform
from heterolora.shortcuts.model import KINDS, Shortcuts, shortcut_candidates

ON_OFF = SearchSpace(target_modules=["q_proj", "v_proj"], ranks=(0, 4), shortcuts=KINDS)


def batches(count=2):
    found = []
    for index in range(count):
        generator = torch.Generator().manual_seed(40 + index)
        ids = torch.randint(3, 60, (3, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids.clone()})
    return found


# Of every candidate of `ON_OFF`, 48 -> 48.
UNIT = 2 * 48


def opt(layers=3):
    """OPT-350M's structure: post-norm, embeddings of fewer columns than layers.

    The weights are larger than those of a fresh model, whose attention hardly looks at q.
    """
    model = plain("opt-350m", layers)
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.weight.mul_(20)
    return model


def trained(model):
    """LoRA and shortcut parameters that an optimizer would get."""
    return sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and ("lora_" in name or "shortcuts" in name)
    )


@pytest.mark.parametrize("proxy", ["constant", "grad-norm", "snip", "synflow"])
@pytest.mark.parametrize("name", ["bert", "opt-350m", "gpt2", "llama"])
def test_every_candidate_is_scored_and_the_model_is_made_of_it(name, proxy):
    model = plain(name).eval()
    space = SearchSpace(shortcuts=KINDS)
    batch = batches()
    if name == "bert":
        batch = [{**entry, "labels": torch.tensor([0, 1, 1])} for entry in batch]
    inputs = {key: value for key, value in batch[0].items() if key != "labels"}
    with torch.no_grad():
        before = model(**inputs).logits
    found = allocate(model, batch, budget=Budget(rank=2), proxy=proxy, space=space, seed=3)

    candidates = shortcut_candidates(model)
    assert list(found.shortcuts) == [candidate.name for candidate in candidates]
    assert len(candidates) == 4 * 2 - 1
    assert found.scores.keys() == found.ranks.keys() | found.shortcuts.keys()
    # Cross-layer and in-attn read the first layer's input, which nothing trained lies under.
    assert all(found.scores[candidate.name] > 0 for candidate in candidates)
    costs = {**found.sites, **found.shortcut_candidates}
    assert found.budget_parameters == 2 * sum(cost.unit_cost for cost in costs.values())
    assert found.parameters == found.budget_parameters

    made = adapt(model, found).eval()
    on = {name: rank for name, rank in found.shortcuts.items() if rank}
    assert {shortcut.name: shortcut.rank for shortcut in Shortcuts.of(made) or ()} == on
    assert all(shortcut.scale == found.scaling for shortcut in Shortcuts.of(made) or ())
    assert trained(made) == found.parameters
    with torch.no_grad():
        assert torch.equal(made(**inputs).logits, before)


def test_a_file_keeps_shortcuts(tmp_path):
    found = allocate(opt(), batches(), budget=Budget(rank=2), space=ON_OFF, shortcut_scaling=0.5)
    found.save(tmp_path / "a.json")
    loaded = Allocation.load(tmp_path / "a.json")
    assert loaded == found and loaded.shortcut_scaling == 0.5
    torch.manual_seed(0)
    made = adapt(opt(), loaded)
    assert {shortcut.scale for shortcut in Shortcuts.of(made) or ()} == {0.5}


def test_a_file_of_the_first_version_has_none(tmp_path):
    path = tmp_path / "a.json"
    found = uniform(opt(), 2)
    found.save(path)
    document = json.loads(path.read_text())
    for key in ("mapping", "shortcut_candidates", "shortcut_scaling", "variant"):
        del document[key]
    document["schema_version"] = 1
    path.write_text(json.dumps(document))
    assert Allocation.load(path) == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "sideways"}, "kind is 'sideways'"),
        ({"layer": -1}, "layer is -1"),
        ({"width": 0}, "width is 0"),
        ({"projection": "other"}, "describes 'other:in-attn'"),
        ({"more": 1}, "more is not a key"),
    ],
)
def test_malformed_candidates_are_named(tmp_path, change, message):
    path = tmp_path / "a.json"
    uniform(opt(), 2, ON_OFF).save(path)
    document = json.loads(path.read_text())
    name = "model.decoder.layers.1.self_attn.out_proj:in-attn"
    document["shortcut_candidates"][name] |= change
    path.write_text(json.dumps(document))
    with pytest.raises(AllocationFileError, match=f"shortcut_candidates.*{message}"):
        Allocation.load(path)


def test_uniform_turns_every_shortcut_on():
    found = uniform(opt(), 4, ON_OFF)
    assert set(found.shortcuts.values()) == {4} and len(found.shortcuts) == 11
    # 6 LoRA modules beside them.
    assert found.parameters == found.budget_parameters == 4 * 17 * UNIT


def test_combined_is_one_ranking_and_separated_is_two():
    arguments = {"space": ON_OFF, "seed": 1}
    three, twelve = Budget(params=3 * 4 * UNIT), Budget(params=12 * 4 * UNIT)
    nine = Budget(params=9 * 4 * UNIT)
    combined = allocate(opt(), batches(), budget=twelve, **arguments)
    separated = allocate(opt(), batches(), budget=three, shortcut_budget=nine, **arguments)
    assert combined.scores == separated.scores

    def top(names, count):
        return set(sorted(names, key=combined.scores.get, reverse=True)[:count])

    everything = {**combined.ranks, **combined.shortcuts}
    assert {name for name, rank in everything.items() if rank} == top(everything, 12)
    modules = {name for name, rank in separated.ranks.items() if rank}
    assert modules == top(separated.ranks, 3)
    assert {n for n, rank in separated.shortcuts.items() if rank} == top(separated.shortcuts, 9)
    assert combined.parameters == separated.parameters == separated.budget_parameters
    assert modules != {name for name, rank in combined.ranks.items() if rank}


def test_scales_do_not_decide():
    """HeteroLoRA's alphas, 16 for LoRA and 4 for shortcuts, at rank 8: gradients are 4 to 1."""
    found = [
        allocate(opt(), batches(), budget=Budget(rank=1), space=ON_OFF, shortcut_scaling=scaling)
        for scaling in (2.0, 0.5)
    ]
    assert found[0].shortcuts == found[1].shortcuts and found[0].ranks == found[1].ranks
    # B is 0 and 4 a power of two, so nothing is rounded differently.
    for name, score in found[0].scores.items():
        assert found[1].scores[name] == score / (4 if ":" in name else 1)


def test_a_random_choice_knows_no_scale():
    arguments = {"budget": Budget(rank=1), "space": ON_OFF, "proxy": "constant", "seed": 2}
    alike, unlike = (
        allocate(opt(), batches(1), shortcut_scaling=scaling, **arguments) for scaling in (2.0, 0.1)
    )
    assert alike.shortcuts == unlike.shortcuts and alike.ranks == unlike.ranks


# The candidates of HeteroLoRA's runs on OPT-350M: Q and V of 24 layers, and 95 shortcuts.
SIZES = {
    "small": {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 24, "vocab_size": 61},
    "full": {"hidden_size": 1024, "ffn_dim": 4096, "word_embed_proj_dim": 512},
}


@pytest.mark.parametrize("size", ["small", pytest.param("full", marks=pytest.mark.slow)])
def test_36_of_143_on_opt_350m(size):
    """p = 25 %: floor(0.25 x 48) + round(0.25 x 95) = 12 + 24 modules of rank 32 are on."""
    config = transformers.OPTConfig(
        num_hidden_layers=24,
        num_attention_heads=16,
        do_layer_norm_before=False,
        dropout=0.0,
        **SIZES[size],
    )
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config)
    rank, unit = min(32, SIZES[size]["hidden_size"]), 2 * SIZES[size]["hidden_size"]
    space = SearchSpace(["q_proj", "v_proj"], (0, rank), KINDS)
    on = math.floor(0.25 * 48), round(0.25 * 95)
    pay = [Budget(params=count * rank * unit) for count in (*on, sum(on))]
    assert on == (12, 24)

    combined = allocate(model, batches(), budget=pay[2], space=space)
    separated = allocate(model, batches(), budget=pay[0], shortcut_budget=pay[1], space=space)

    for found in (combined, separated):
        assert (len(found.ranks), len(found.shortcuts)) == (48, 95)
        assert found.parameters == found.budget_parameters == 36 * rank * unit
    everything = {**combined.ranks, **combined.shortcuts}
    ordered = sorted(everything, key=combined.scores.get, reverse=True)
    at_least_one = max(combined.ranks, key=combined.scores.get)
    expected = set(ordered[:36])
    if not expected & combined.ranks.keys():
        expected = {*ordered[:35], at_least_one}
    assert {name for name, rank in everything.items() if rank} == expected
    for ranks, count in zip((separated.ranks, separated.shortcuts), on, strict=True):
        ordered = sorted(ranks, key=separated.scores.get, reverse=True)
        assert {name for name, rank in ranks.items() if rank} == set(ordered[:count])
    made = adapt(model, combined)
    assert trained(made) == 36 * rank * unit


def test_a_mapping_serves_where_structure_does_not(tmp_path):
    model = opt()
    parts = [
        {
            "attention_out": f"model.decoder.layers.{i}.self_attn.out_proj",
            "ffn_out": f"model.decoder.layers.{i}.fc2",
            "layer_input": f"model.decoder.layers.{i}.self_attn",
            "ffn_input": f"model.decoder.layers.{i}.fc1",
        }
        for i in range(3)
    ]
    space = SearchSpace(["q_proj", "v_proj"], (0, 4), KINDS, mapping=parts)
    found = allocate(model, batches(), budget=Budget(rank=2), space=space)
    read = allocate(model, batches(), budget=Budget(rank=2), space=ON_OFF)
    assert (found.scores, found.shortcuts) == (read.scores, read.shortcuts)
    found.save(tmp_path / "a.json")
    assert Allocation.load(tmp_path / "a.json").mapping == parts
    made = adapt(model, found)
    assert len(list(Shortcuts.of(made))) == sum(map(bool, found.shortcuts.values())) > 0


def test_what_cannot_be_searched():
    two = Budget(rank=2)
    with pytest.raises(BudgetError, match="the search space has no shortcuts"):
        allocate(opt(), batches(), budget=two, shortcut_budget=two)
    with pytest.raises(BudgetError, match=r"shortcut_budget must be a Budget\(.*not 2"):
        allocate(opt(), batches(), budget=two, shortcut_budget=2, space=ON_OFF)
    with pytest.raises(BudgetError, match=r"Budget\(rank=8\) is above the largest rank"):
        allocate(opt(), batches(), budget=two, shortcut_budget=Budget(rank=8), space=ON_OFF)
    with pytest.raises(ShortcutError, match="cannot read the layers"):
        space = SearchSpace(["p"], (0, 2), KINDS)
        allocate(torch.nn.ModuleDict({"p": torch.nn.Linear(4, 4)}), [], budget=two, space=space)


def test_one_module_is_adapted_where_shortcuts_win_everything():
    # The weights of one token's attention are 1 whatever its key is, so keys get no gradient.
    ids = torch.tensor([[5], [7]])
    batch = [{"input_ids": ids, "labels": torch.tensor([0, 1])}]
    space = SearchSpace(["key"], (0, 4), KINDS)
    found = allocate(plain("bert"), batch, budget=Budget(params=3 * 4 * UNIT), space=space)
    assert max(found.scores[name] for name in found.ranks) < 1e-9
    assert sorted(found.ranks.values()) == [0, 4]
    assert sorted(found.shortcuts.values()) == [0] * 5 + [4] * 2
    top = sorted(found.shortcuts, key=found.scores.get, reverse=True)[:2]
    assert {name for name, rank in found.shortcuts.items() if rank} == set(top)


def test_adapt_refuses_another_model():
    found = uniform(opt(3), 2, SearchSpace(["q_proj"], (0, 2), ("in-ffn",)))
    with pytest.raises(ModelError, match=r"no linear layer 'model.decoder.layers.2"):
        adapt(opt(2), found)
    broken = uniform(opt(2), 2, SearchSpace(["q_proj"], (0, 2), ("in-ffn",)))
    name, candidate = next(iter(broken.shortcut_candidates.items()))
    broken.shortcut_candidates[name] = replace(candidate, width=64)
    with pytest.raises(ModelError, match=f"no shortcut '{name}' of width 64 in layer 0"):
        adapt(opt(2), broken)


def test_saved_and_loaded_beside_the_adapter(tmp_path):
    found = allocate(opt(), batches(), budget=Budget(rank=2), space=ON_OFF)
    made = adapt(opt(), found).eval()
    for shortcut in Shortcuts.of(made):
        torch.nn.init.normal_(shortcut.b, std=0.02)
    heterolora.save_adapter(made, tmp_path)
    loaded = heterolora.load_adapter(opt().eval(), tmp_path).eval()
    inputs = {key: value for key, value in batches()[0].items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, made(**inputs).logits)
