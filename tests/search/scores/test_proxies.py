"""Every proxy against a slow implementation that shares no code with it."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from heterolora.errors import DataError, DegenerateScoreError, ModelError, ScoreError
from heterolora.search.scores.constant import constant
from heterolora.search.scores.grad_norm import grad_norm
from heterolora.search.scores.probe import PROBE_B_STD, draw_b
from heterolora.search.scores.proxies import PROXIES
from heterolora.search.scores.snip import snip
from heterolora.search.scores.synflow import synflow

MODELS = ["bert", "opt"]


def adapted(subject, name, *, b_std=0.02, **options):
    made = subject(name, **options)
    modules = ["query", "value", "dense", "k_proj", "fc1", "fc2"]
    model = get_peft_model(made.model, LoraConfig(r=3, lora_alpha=6, target_modules=modules))
    if b_std:
        draw_b(model, 5, b_std)
    return model, made


def factors_by_name(model):
    """{base module name: [parameter name of A, of B]}, read from the parameter names alone."""
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    strip = "base_model.model."
    return {
        name.removeprefix(strip).split(".lora_A")[0]: [name, name.replace("lora_A", "lora_B")]
        for name in names
    }


def summed_loss(model, batches):
    """One graph for the sum of all losses: its gradient is the sum of the gradients."""
    model.train()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        total = total + model(**batch).loss.double()
    return total


def slow_grad_norm(model, batches):
    parameters = dict(model.named_parameters())
    scores = {}
    for module, names in factors_by_name(model).items():
        leaves = [parameters[name] for name in names]
        gradients = torch.autograd.grad(summed_loss(model, batches), leaves)
        scores[module] = sum(
            math.sqrt(sum(value * value for value in gradient.flatten().tolist()))
            for gradient in gradients
        )
    return scores


def slow_snip(model, batches):
    """Explicit masks: a forward with A * M and B * M in place of A and B, differentiated by M."""
    parameters = dict(model.named_parameters())
    named = factors_by_name(model)
    masks = {
        name: torch.ones_like(parameters[name], requires_grad=True)
        for names in named.values()
        for name in names
    }
    model.train()
    total = 0.0
    for batch in batches:
        masked = {name: parameters[name].detach() * mask for name, mask in masks.items()}
        total = total + torch.func.functional_call(model, masked, (), batch).loss
    gradients = dict(zip(masks, torch.autograd.grad(total, list(masks.values())), strict=True))
    return {
        module: sum(gradients[name].double().abs().sum().item() for name in names)
        for module, names in named.items()
    }


def slow_synflow(model, batch):
    """A deep copy whose weights are made positive in place, and one explicit backward pass."""
    twin = copy.deepcopy(model).train()
    for parameter in twin.parameters():
        parameter.data = parameter.data.abs()
    inputs = {key: value for key, value in batch.items() if key != "input_ids"}
    width = twin.get_base_model().get_input_embeddings().weight.shape[1]
    inputs["inputs_embeds"] = torch.ones(*batch["input_ids"].shape, width)
    parameters = dict(twin.named_parameters())
    loss = twin(**inputs).loss
    scores = {}
    for module, names in factors_by_name(twin).items():
        leaves = [parameters[name] for name in names]
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
        scores[module] = sum(
            (leaf.detach() * gradient).abs().sum().item()
            for leaf, gradient in zip(leaves, gradients, strict=True)
        )
    return scores


def assert_close(scores, expected, rel=2e-5):
    assert list(scores) == list(expected)
    assert len(set(expected.values())) > 1 and min(expected.values()) > 0
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=rel), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("b_std", [0.0, 0.02])
def test_grad_norm(subject, name, b_std):
    model, made = adapted(subject, name, b_std=b_std)
    batches = made.batches()
    assert_close(grad_norm(model, batches), slow_grad_norm(model, batches))


@pytest.mark.parametrize("name", MODELS)
def test_snip(subject, name):
    model, made = adapted(subject, name)
    batches = made.batches()
    assert_close(snip(model, batches), slow_snip(model, batches), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_synflow(subject, name):
    model, made = adapted(subject, name)
    batches = made.batches()
    assert_close(synflow(model, batches), slow_synflow(model, batches[0]), rel=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_constant(subject, name):
    model, _ = adapted(subject, name)
    assert constant(model, []) == dict.fromkeys(factors_by_name(model), 1.0)


def test_gradients_are_summed_not_averaged(subject):
    model, made = adapted(subject, "bert")
    once, twice = (grad_norm(model, made.batches(1) * count) for count in (1, 2))
    assert_close(twice, {name: 2 * score for name, score in once.items()})


def test_synflow_of_pixels_ignores_their_values(subject):
    made = subject("mobilevit")
    model = get_peft_model(made.model, LoraConfig(r=2, target_modules=["query", "dense"]))
    draw_b(model, 0)
    batch, other = made.batches(2)
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])
    assert synflow(model, [batch]) == synflow(model, [other])
    assert grad_norm(model, [batch]) != grad_norm(model, [other])


@pytest.mark.parametrize("proxy", [snip, synflow])
@pytest.mark.parametrize("name", MODELS)
def test_zero_b_is_refused_where_it_makes_every_score_zero(subject, proxy, name):
    model, made = adapted(subject, name, b_std=0.0)
    batches = made.batches()
    slow = slow_snip(model, batches) if proxy is snip else slow_synflow(model, batches[0])
    assert set(slow.values()) == {0.0}
    with pytest.raises(DegenerateScoreError, match="every LoRA B is zero"):
        proxy(model, batches)
    # One nonzero entry in one module is no longer degenerate: found by looking, not assumed.
    first = factors_by_name(model).popitem()[1][1]
    dict(model.named_parameters())[first].data[0, 0] = 1e-3
    assert max(proxy(model, batches).values()) > 0


@pytest.mark.parametrize("proxy", [snip, synflow])
@pytest.mark.parametrize("name", MODELS)
def test_the_scale_of_a_small_b_cancels_to_first_order(subject, proxy, name):
    scores = {}
    for std in (PROBE_B_STD, PROBE_B_STD / 10, PROBE_B_STD / 100):
        model, made = adapted(subject, name, b_std=std)
        scores[std] = {k: v / std for k, v in proxy(model, made.batches(1)).items()}
    default, smaller, limit = scores.values()
    for module, value in limit.items():
        assert smaller[module] == pytest.approx(value, rel=0.01), module
        assert default[module] == pytest.approx(value, rel=0.1), module


@pytest.mark.parametrize("proxy", sorted(PROXIES))
def test_a_proxy_leaves_weights_gradients_and_modes(subject, proxy):
    model, made = adapted(subject, "opt")
    model.get_base_model().model.decoder.layers[1].train()
    marked = next(p for p in model.parameters() if p.requires_grad)
    marked.grad = gradient = torch.full_like(marked, 3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    PROXIES[proxy](model, made.batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert marked.grad is gradient and bool((gradient == 3).all())
    assert sum(p.grad is not None for p in model.parameters()) == 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("proxy", ["grad-norm", "snip", "synflow"])
def test_gradient_checkpointing_changes_no_score(subject, proxy, reentrant):
    model, made = adapted(subject, "opt")
    plain = PROXIES[proxy](model, made.batches())
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_base_model().enable_input_require_grads()
    assert_close(PROXIES[proxy](model, made.batches()), plain, rel=1e-5)


def test_scores_of_a_bf16_model_are_finite_and_synflow_runs_in_fp32(subject):
    model, made = adapted(subject, "opt")
    reference = synflow(model, made.batches())
    half, _ = adapted(subject, "opt")
    for parameter in half.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    # bf16 rounds the weights (2^-9 relative); computing in bf16 would be far off that.
    assert_close(synflow(half, made.batches()), reference, rel=0.05)


def without(key):
    return lambda batch: {k: v for k, v in batch.items() if k != key}


@pytest.mark.parametrize("proxy", ["grad-norm", "snip", "synflow"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without("labels"), DataError, "batch 0 has no labels .*attention_mask"),
        (lambda batch: list(batch.values()), DataError, "batch 0 is a list"),
    ],
)
def test_unusable_batches(subject, proxy, spoil, error, message):
    model, made = adapted(subject, "bert")
    with pytest.raises(error, match=message):
        PROXIES[proxy](model, [spoil(batch) for batch in made.batches()])


@pytest.mark.parametrize("proxy", ["grad-norm", "snip", "synflow"])
def test_no_batches(subject, proxy):
    model, _ = adapted(subject, "bert")
    with pytest.raises(DataError, match="empty"):
        PROXIES[proxy](model, [])


def test_a_nan_loss_names_its_batch(subject):
    made = subject("mobilevit")
    model = get_peft_model(made.model, LoraConfig(r=2, target_modules=["query"]))
    batches = made.batches()
    batches[1]["pixel_values"][0] = float("nan")
    with pytest.raises(ScoreError, match="loss of batch 1 is nan"):
        grad_norm(model, batches)


def test_a_key_the_model_does_not_take(subject):
    made = subject("mobilevit")
    model = get_peft_model(made.model, LoraConfig(r=2, target_modules=["query"]))
    model.get_base_model().forward = lambda pixel_values, labels: None
    with pytest.raises(DataError, match="holds file, which MobileViTForImageClassification"):
        grad_norm(model, [{**made.batch(0), "file": "a.png"}])


def test_a_model_that_returns_no_loss(subject):
    model, made = adapted(subject, "bert")
    backbone = model.get_base_model().bert
    with pytest.raises(ModelError, match="BertModel returned no loss .*task head"):
        grad_norm(backbone, made.batches())


def test_a_model_without_lora(subject):
    made = subject("bert")
    with pytest.raises(ModelError, match="carries no LoRA layer"):
        grad_norm(made.model, made.batches())
