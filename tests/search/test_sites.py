"""Candidates are exactly what PEFT would adapt, and a search space refuses nonsense."""

import pytest
import torch
from helpers import build
from peft import LoraConfig, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from heterolora.errors import ModelError, SearchSpaceError
from heterolora.search import SearchSpace, adapt, uniform
from heterolora.search.sites import find_sites, head_modules, head_names, task_type


def adapted_by_peft(model, **arguments):
    peft_model = get_peft_model(model, LoraConfig(r=2, **arguments))
    layers = peft_model.get_base_model().named_modules()
    return {name: module for name, module in layers if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "t5", "mobilevit"])
def test_default_candidates_are_peft_all_linear(subject, name):
    model = subject(name).model
    sites = find_sites(model)
    heads = None if task_type(model) else list(head_names(model))
    layers = adapted_by_peft(
        model, target_modules="all-linear", task_type=task_type(model), modules_to_save=heads
    )
    assert [site.name for site in sites] == list(layers)
    for site in sites:
        layer = layers[site.name]
        weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        assert weights[0].shape == (2, site.in_features)
        assert weights[1].shape == (site.out_features, 2)
        assert site.unit_cost * 2 == sum(w.numel() for w in weights)
        assert site.conv1d == (name == "gpt2")


@pytest.mark.parametrize(
    "target",
    [
        ["query", "value"],
        ["0.attention.output.dense"],
        ("bert.pooler.dense",),
        r".*\.1\.attention\.self\.(query|key)",
        "all-linear",
    ],
)
def test_explicit_targets_match_as_in_peft(subject, target):
    model = subject("bert").model
    names = [site.name for site in find_sites(model, target)]
    peft_target = target if isinstance(target, str) else list(target)
    assert names == list(adapted_by_peft(model, target_modules=peft_target, task_type="SEQ_CLS"))


def test_heads_that_peft_trains_by_the_end_of_their_name():
    """`pre_classifier` ends like `classifier`, so PEFT trains and saves both in full."""
    model = build("distilbert")
    assert {name for name, _ in model.named_children()} >= {"pre_classifier", "classifier"}
    assert not {"pre_classifier", "classifier"} & {site.name for site in find_sites(model)}
    heads = head_modules(model)
    assert heads == [model.pre_classifier, model.classifier]
    adapted = adapt(model, uniform(model, 2)).get_base_model()
    for head in (adapted.pre_classifier, adapted.classifier):
        assert all(p.requires_grad for p in head.modules_to_save.parameters())


def test_heads_are_never_candidates(subject):
    assert "lm_head" not in {s.name for s in find_sites(subject("opt").model)}
    assert "classifier" not in {s.name for s in find_sites(subject("bert").model)}
    assert "classifier" not in {s.name for s in find_sites(subject("mobilevit").model)}
    with pytest.raises(SearchSpaceError, match="classifier, score is trained in full"):
        find_sites(subject("bert").model, ["classifier"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", TaskType.SEQ_CLS),
        ("opt", TaskType.CAUSAL_LM),
        ("gpt2", TaskType.CAUSAL_LM),
        ("t5", TaskType.SEQ_2_SEQ_LM),
        ("mobilevit", None),
    ],
)
def test_task_type_follows_the_class(subject, name, expected):
    assert task_type(subject(name).model) == expected


def test_task_type_of_a_subclass(subject):
    model = subject("bert").model
    model.__class__ = type("Mine", (type(model),), {})
    assert task_type(model) == "SEQ_CLS"


def test_no_match_names_the_closest(subject):
    with pytest.raises(SearchSpaceError, match=r"'querry'.*closest: query"):
        find_sites(subject("bert").model, ["querry"])
    with pytest.raises(SearchSpaceError, match="closest: .*k_proj"):
        find_sites(subject("opt").model, r".*kproj")


def test_an_entry_without_a_match_warns(subject):
    with pytest.warns(UserWarning, match="'valeu' matches no module"):
        sites = find_sites(subject("bert").model, ["query", "valeu"])
    assert len(sites) == 2


def test_other_refusals(subject):
    with pytest.raises(SearchSpaceError, match="'.*word_embeddings', a Embedding"):
        find_sites(subject("bert").model, ["word_embeddings"])
    with pytest.raises(SearchSpaceError, match="not a valid regular expression"):
        find_sites(subject("bert").model, r"query(")
    with pytest.raises(ModelError, match="no linear layer"):
        find_sites(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)))
    with pytest.raises(ModelError, match="expected a model"):
        find_sites("bert-base-uncased")
    with torch.device("meta"):
        meta = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match="meta device"):
        find_sites(meta)


def test_an_adapted_model_is_refused(subject):
    model = subject("bert").model
    peft_model = get_peft_model(model, LoraConfig(target_modules=["query"]))
    for adapted in (peft_model, model):
        with pytest.raises(ModelError, match="already carries PEFT adapters"):
            find_sites(adapted)
    assert len(find_sites(peft_model.unload())) == 13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ranks": ()}, "no rank above 0"),
        ({"ranks": (0,)}, "no rank above 0"),
        ({"ranks": (0, -1)}, "rank -1"),
        ({"ranks": (0, 1.5)}, "rank 1.5"),
        ({"ranks": (False, True)}, "rank False"),
        ({"ranks": (0, 10**9)}, "rank 1000000000"),
        ({"ranks": (0, 4, 4)}, "twice"),
        ({"ranks": (4, 0)}, "increasing"),
        ({"ranks": 8}, "sequence"),
        ({"ranks": "8"}, "sequence"),
        ({"shortcuts": ("in-attn", "around")}, "unknown shortcut 'around'; choose of in-attn"),
        ({"shortcuts": "in-attn"}, "must be a list"),
        ({"shortcuts": 4}, "must be a list"),
        ({"target_modules": ""}, "empty string"),
        ({"target_modules": []}, "empty list"),
        ({"target_modules": ["query", 3]}, "holds 3"),
        ({"target_modules": 3}, "not int"),
    ],
)
def test_malformed_spaces(arguments, message):
    with pytest.raises(SearchSpaceError, match=message):
        SearchSpace(**arguments)


def test_space_is_normalised_and_frozen():
    space = SearchSpace(target_modules=["q", "k"], ranks=[0, 8])
    assert space == SearchSpace(target_modules=("q", "k"), ranks=(0, 8))
    with pytest.raises(AttributeError):
        space.ranks = (0,)
