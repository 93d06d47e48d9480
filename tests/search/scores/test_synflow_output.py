"""SynFlow of the summed output, in fp64, against an explicit twin of absolute weights."""

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from heterolora import Budget, allocate
from heterolora.errors import DataError, DegenerateScoreError, ModelError
from heterolora.search.scores.probe import draw_b
from heterolora.search.scores.synflow import synflow, synflow_output

MODULES = ["query", "value", "dense", "k_proj", "fc1", "fc2", "c_attn", "q", "wi"]


def adapted(subject, name, *, b_std=0.02, **options):
    made = subject(name, **options)
    config = LoraConfig(r=3, target_modules=MODULES, fan_in_fan_out=name == "gpt2")
    model = get_peft_model(made.model, config)
    if b_std:
        draw_b(model, 5, b_std)
    return model, made


def slow(model, batch):
    """One deep copy of positive float64 weights, one row of ones, one gradient a factor."""
    twin = copy.deepcopy(model).double().eval()
    for parameter in twin.parameters():
        parameter.data.abs_()
    inputs = {key: value[:1] for key, value in batch.items() if key != "input_ids"}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = torch.ones(inputs["pixel_values"].shape, dtype=torch.float64)
    else:
        width = twin.get_base_model().get_input_embeddings().weight.shape[1]
        shape = (1, batch["input_ids"].shape[1], width)
        inputs["inputs_embeds"] = torch.ones(shape, dtype=torch.float64)
    total = twin(**inputs).logits.sum()
    scores = {}
    for name, module in twin.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            leaves = [f["default"].weight for f in (module.lora_A, module.lora_B)]
            gradients = torch.autograd.grad(total, leaves, retain_graph=True)
            scores[name] = sum(
                abs(v * g)
                for leaf, gradient in zip(leaves, gradients, strict=True)
                for v, g in zip(leaf.flatten().tolist(), gradient.flatten().tolist(), strict=True)
            )
    return scores


# Float64 keeps 1e-16 a term. Of sums of positive terms next to nothing is lost, but a LayerNorm
# subtracts nearly equal numbers.
REL = 1e-9


@pytest.mark.parametrize("name", ["bert", "opt", "gpt2", "t5", "mobilevit"])
def test_scores_are_those_of_the_twin(subject, name):
    model, made = adapted(subject, name)
    batch = made.batch(0)
    expected = slow(model, batch)
    scores = synflow_output(model, [batch])
    assert list(scores) == list(expected) and max(expected.values()) > 0
    for module, value in expected.items():
        assert scores[module] == pytest.approx(value, rel=REL), module


@pytest.mark.parametrize("name", ["opt", "mobilevit"])
def test_nothing_but_the_shape_and_mask_of_the_first_row_matters(subject, name):
    model, made = adapted(subject, name)
    one, other = made.batches(2)
    other["labels"] = other["labels"].flip(0)
    assert not all(torch.equal(one[key], other[key]) for key in one)
    scores = synflow_output(model, [one])
    assert scores == synflow_output(model, [other, one])
    assert scores == synflow_output(model, [{k: v[:1] for k, v in one.items() if k != "labels"}])
    assert scores != synflow(model, [one])


def test_dropout_and_the_model_s_mode_do_not_matter(subject):
    model, made = adapted(subject, "bert", dropout=0.5)
    assert synflow_output(model.train(), [made.batch(0)]) == synflow_output(
        model.eval(), [made.batch(0)]
    )
    assert synflow(model, [made.batch(0)]) != synflow(model, [made.batch(0)])


def test_a_half_precision_model_is_scored_in_fp64(subject):
    model, made = adapted(subject, "opt")
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    expected = slow(model, made.batch(0))
    assert synflow_output(model, [made.batch(0)]) == pytest.approx(expected, rel=REL)
    assert next(model.get_base_model().model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(subject, reentrant):
    model, made = adapted(subject, "opt")
    plain = synflow_output(model, [made.batch(0)])
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    assert synflow_output(model, [made.batch(0)]) == plain


def test_refusals(subject):
    model, made = adapted(subject, "bert", b_std=0.0)
    assert set(slow(model, made.batch(0)).values()) == {0.0}
    with pytest.raises(DegenerateScoreError, match="synflow-output is zero for every module"):
        synflow_output(model, [made.batch(0)])
    draw_b(model, 1)
    with pytest.raises(DataError, match="empty"):
        synflow_output(model, [])
    with pytest.raises(DataError, match="batch 0 is a list"):
        synflow_output(model, [[1]])
    batch = {key: value for key, value in made.batch(0).items() if key != "labels"}
    with pytest.raises(ModelError, match="BertModel returns no logits"):
        synflow_output(model.get_base_model().bert, [batch])


@pytest.mark.parametrize("proxy", ["synflow", "synflow-output"])
def test_other_inputs_in_floating_point_are_of_the_scoring_dtype(proxy):
    config = transformers.VisualBertConfig(
        vocab_size=61,
        hidden_size=32,
        visual_embedding_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    model = transformers.VisualBertForMultipleChoice(config).bfloat16()
    batch = {
        "input_ids": torch.randint(3, 61, (2, 2, 7)),
        "visual_embeds": torch.randn(2, 2, 3, 16, dtype=torch.bfloat16),
        "labels": torch.tensor([0, 1]),
    }
    found = allocate(model, [batch], budget=Budget(rank=2), proxy=proxy)
    assert max(found.scores.values()) > 0


def test_a_search_draws_a_b_to_score(subject):
    made = subject("bert")
    found = allocate(made.model, made.batches(1), budget=Budget(rank=2), proxy="synflow-output")
    assert max(found.scores.values()) > 0 and found.parameters == found.budget_parameters
