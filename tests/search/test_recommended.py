"""What `recommended` recommends for which model and budget."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from heterolora.errors import BudgetError
from heterolora.search import Budget, SearchSpace, Variant, allocate, recommended

ENCODER = r".*\.encoder\..*(query|key|value|dense)"


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
    )


@pytest.fixture(scope="module")
def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
        )
    )


def variant(model, budget, **space):
    found = recommended(model, budget, SearchSpace(target_modules=None, **space))
    assert found["proxy"] == "spectral"
    return found["variant"]


def batches():
    rows = torch.randint(0, 40, (2, 4, 6), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "labels": torch.arange(4) % 3} for ids in rows]


def test_a_head_is_warmed_where_there_is_one(bert, llama):
    assert variant(bert, Budget(rank=4)) == Variant(head_steps=70, floor=1)
    assert variant(llama, Budget(rank=4)) == Variant(floor=1)


def test_a_floor_needs_a_budget_that_pays_for_it(bert):
    # Per layer four linears of 16 x 16 and two of 16 x 24, and the pooler.
    unit = 2 * (4 * 32 + 2 * 40) + 32
    spread = Variant(head_steps=70, by_layer=True)
    assert variant(bert, Budget(params=unit - 1)) == spread
    assert variant(bert, Budget(params=unit)) == Variant(head_steps=70, floor=1)
    assert variant(bert, Budget(rank=1)) == Variant(head_steps=70, floor=1)
    assert variant(bert, Budget(rank=4), ranks=(0, 16)) == spread


def test_the_floor_is_the_smallest_rank_that_is_offered(bert):
    ranks = (0, 2, 8)
    assert variant(bert, Budget(rank=2), ranks=ranks) == Variant(head_steps=70, floor=2)
    assert variant(bert, Budget(rank=1), ranks=ranks) == Variant(head_steps=70, by_layer=True)


def test_what_is_no_budget_is_refused(bert):
    with pytest.raises(
        BudgetError, match=r"budget must be a Budget\(rank=... or params=...\), not 8"
    ):
        recommended(bert, 8)
    with pytest.raises(BudgetError, match="shortcut_budget must be"):
        recommended(bert, Budget(rank=8), shortcut_budget=8)


def test_shortcuts_get_a_floor_where_the_budget_pays_for_theirs_too(bert):
    floor, spread = Variant(head_steps=70, floor=1), Variant(head_steps=70, by_layer=True)
    shortcuts = {"shortcuts": ("in-attn",)}
    # The modules, and a shortcut of 16 x 16 in each of the two layers.
    modules, both = 2 * (4 * 32 + 2 * 40) + 32, 2 * 32
    assert variant(bert, Budget(rank=1), **shortcuts) == floor
    assert variant(bert, Budget(params=modules + both), **shortcuts) == floor
    assert variant(bert, Budget(params=modules + both - 1), **shortcuts) == spread
    space = SearchSpace(target_modules=None, **shortcuts)
    for params, expected in ((both, floor), (both - 1, spread)):
        own = Budget(params=params)
        found = recommended(bert, Budget(params=modules), space, own)
        assert found["variant"] == expected


@pytest.mark.parametrize("own", [None, Budget(rank=2)])
def test_what_it_says_of_shortcuts_can_be_done(bert, own):
    space = SearchSpace(target_modules=ENCODER, shortcuts=("in-attn", "cross-ffn"))
    budget = Budget(rank=2)
    advice = recommended(bert, budget, space, own)
    found = allocate(bert, batches(), budget=budget, shortcut_budget=own, space=space, **advice)
    assert min([*found.ranks.values(), *found.shortcuts.values()]) == 1
    assert found.parameters <= found.budget_parameters


def test_allocate_takes_it(bert):
    space = SearchSpace(target_modules=ENCODER)
    budget = Budget(rank=2)
    found = allocate(
        bert, batches(), budget=budget, space=space, **recommended(bert, budget, space)
    )
    assert found.variant == Variant(head_steps=70, floor=1) and found.proxy == "spectral"
    assert 1 == min(found.ranks.values()) < max(found.ranks.values())
    assert found.parameters == found.budget_parameters
