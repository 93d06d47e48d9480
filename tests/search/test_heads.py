"""Heads that PEFT's task classes do not know by name are trained, saved and loaded all the same."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel

from heterolora import Budget, Variant
from heterolora.errors import ModelError
from heterolora.search import adapt, allocate, recommended, uniform
from heterolora.search.sites import find_sites, head_modules, head_names, heads_to_save, task_type

SMALL = {"vocab_size": 97, "num_labels": 3}
SEQ2SEQ = {
    **SMALL,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def _xlnet(kind):
    config = transformers.XLNetConfig(**SMALL, d_model=32, n_layer=1, n_head=2, d_inner=48)
    return getattr(transformers, f"XLNetFor{kind}")(config)


def _bart():
    return transformers.BartForSequenceClassification(transformers.BartConfig(**SEQ2SEQ))


def _t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**SMALL, **sizes, eos_token_id=2, decoder_start_token_id=0)
    return transformers.T5ForSequenceClassification(config)


def _xlm():
    config = transformers.XLMConfig(**SMALL, emb_dim=32, n_layers=1, n_heads=2)
    return transformers.XLMForSequenceClassification(config)


HEADS = {
    "bart": (_bart, ("classification_head",)),
    "t5": (_t5, ("classification_head",)),
    "xlm": (_xlm, ("sequence_summary",)),
    "xlnet": (
        lambda: _xlnet("SequenceClassification"),
        ("sequence_summary", "logits_proj"),
    ),
    "xlnet multiple choice": (
        lambda: _xlnet("MultipleChoice"),
        ("sequence_summary", "logits_proj"),
    ),
    "xlnet question answering": (
        lambda: _xlnet("QuestionAnswering"),
        ("start_logits", "end_logits", "answer_class"),
    ),
}


def model_of(name):
    torch.manual_seed(0)
    return HEADS[name][0]().train()


def batches():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (2, 3, 9), generator=generator)
    ids[..., -1] = 2  # T5 and BART classify the state at the end-of-sequence token.
    return [
        {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": torch.arange(3)}
        for x in ids
    ]


@pytest.mark.parametrize("name", HEADS)
def test_what_lies_beside_the_base_model_is_the_head(name):
    model = model_of(name)
    expected = HEADS[name][1]
    assert head_names(model) == heads_to_save(model) == expected
    assert head_modules(model) == [getattr(model, head) for head in expected]
    assert {site.name.split(".")[0] for site in find_sites(model)} == {model.base_model_prefix}


@pytest.mark.parametrize("name", HEADS)
def test_it_is_trained_and_comes_back_from_disk(name, tmp_path):
    model = model_of(name)
    plain = copy.deepcopy(model)
    adapted = adapt(model, uniform(model, 2))
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".modules_to_save")[0].rsplit(".", 1)[1] for n in trained} == set(
        HEADS[name][1]
    )
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(1.0)
    adapted.save_pretrained(tmp_path)
    again = dict(PeftModel.from_pretrained(plain, tmp_path).named_parameters())
    for key, parameter in trained.items():
        assert torch.equal(again[key], parameter)


@pytest.mark.parametrize("name", ["bart", "t5", "xlm", "xlnet"])
def test_it_is_warmed_before_scoring_and_left_as_it_was(name):
    model = model_of(name)
    before = copy.deepcopy(model.state_dict())
    cold = allocate(model, batches(), budget=Budget(rank=2), proxy="spectral")
    warm = allocate(
        model,
        batches(),
        budget=Budget(rank=2),
        proxy="spectral",
        variant=Variant(head_steps=3, lr=0.05),
    )
    assert warm.scores.keys() == cold.scores.keys() and warm.scores != cold.scores
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("proxy", ["synflow", "synflow-output"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_synflow_says_that_it_needs_embeddings_for_input(name, proxy):
    with pytest.raises(ModelError, match="does not run on all-ones embeddings.*use grad-norm"):
        allocate(model_of(name), batches(), budget=Budget(rank=2), proxy=proxy)


class OwnForSequenceClassification(transformers.BertPreTrainedModel):
    """Somebody's own task class, with a second tower that may be pretrained."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.tower = torch.nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def test_of_a_class_that_is_not_transformers_own_nothing_is_taken_for_new():
    config = transformers.BertConfig(
        **SMALL, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    model = OwnForSequenceClassification(config)
    assert head_modules(model) == [] and heads_to_save(model) == ()
    assert {"tower", "out_proj"} < {site.name for site in find_sites(model)}


def test_a_head_that_is_named_like_a_part_of_the_base_does_not_take_that_along():
    config = transformers.SwiftFormerConfig(
        depths=[1, 1], embed_dims=[8, 16], mlp_ratio=2, downsamples=[True, True], num_labels=3
    )
    model = transformers.SwiftFormerForImageClassification(config)
    assert any(name.endswith("norm") for name, _ in model.swiftformer.named_modules())
    assert head_names(model) == ("head", "dist_head")
    assert head_modules(model) == [model.head, model.dist_head]


def test_a_decoder_that_cannot_generate_is_no_causal_model_to_peft():
    class TinyForCausalLM(transformers.BertPreTrainedModel):
        pass

    assert not hasattr(TinyForCausalLM, "prepare_inputs_for_generation")
    assert task_type(TinyForCausalLM(transformers.BertConfig())) is None


def test_a_model_that_is_not_made_for_a_task_has_none():
    bart = transformers.BartForConditionalGeneration(transformers.BartConfig(**SEQ2SEQ))
    masked = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=97,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=48,
        )
    )
    for model in (bart, masked, bart.model):
        assert head_names(model) == ()
        assert head_modules(model) == []
    assert recommended(masked, Budget(rank=2))["variant"].head_steps == 0
