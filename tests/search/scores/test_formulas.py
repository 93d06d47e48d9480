"""The proxies and the selection against HeteroLoRA's formulas, worked out another way.

The reference never sees an adapter. It merges W + s B A into a plain OPT in float64, takes the
gradient G of the full weight, and applies dL/dA = s B^T G and dL/dB = s G A^T (arXiv 2406.14956;
its code sums gradients over batches, and compares raw scores).
"""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from heterolora.search.budget import log_gains, solve
from heterolora.search.scores.probe import draw_b
from heterolora.search.scores.proxies import PROXIES
from heterolora.search.sites import Site

MODULES = ["q_proj", "v_proj", "fc1"]
RANK = 3
# float32 keeps about 1e-7 a term, and a score is a sum of some hundred terms, each a chain of a few
# dozen sums. Float64 shows that nothing but rounding is left.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}


def adapted(subject, *, alpha=6.0, b_std=0.05, dtype=torch.float32):
    made = subject("opt")
    with torch.no_grad():
        # Logits of absolute weights would saturate the loss, and its gradient be a difference of
        # nearly equal numbers: all rounding, whoever computes it.
        made.model.get_input_embeddings().weight.mul_(0.05)
    if dtype == torch.float32:
        for layer in made.model.model.decoder.layers:
            # A ReLU whose input is within rounding of zero jumps, and so does the gradient.
            layer.activation_fn = torch.nn.GELU()
    plain = copy.deepcopy(made.model)
    torch.manual_seed(11)
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=MODULES)
    model = get_peft_model(made.model, config)
    if b_std:
        draw_b(model, 5, b_std)
    return model.to(dtype), plain, made


def factors_of(model):
    """{module: (A, B)} as float64 copies, read from the names in the state dict."""
    state = {k.removeprefix("base_model.model."): v.double() for k, v in model.state_dict().items()}
    return {
        key.split(".lora_A")[0]: (value, state[key.replace("lora_A", "lora_B")])
        for key, value in state.items()
        if ".lora_A." in key
    }


def weight_gradients(plain, batches, factors, scale, *, absolute=False, ones=False):
    """{module: G}, the gradient of the loss summed over the batches, one batch at a time."""
    twin = copy.deepcopy(plain).double().train()
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if absolute:
                parameter.abs_()
            if (module := name.removesuffix(".weight")) in factors:
                a, b = (f.abs() if absolute else f for f in factors[module])
                parameter.add_(scale * b @ a)
    total = {name: 0.0 for name in factors}
    for batch in batches:
        inputs = dict(batch)
        if ones:
            width = twin.get_input_embeddings().weight.shape[1]
            shape = (*inputs.pop("input_ids").shape, width)
            inputs["inputs_embeds"] = torch.ones(shape, dtype=torch.float64)
        loss = twin(**inputs).loss
        wanted = [parameters[f"{name}.weight"] for name in factors]
        gradients = torch.autograd.grad(loss, wanted)
        total = {n: total[n] + g for n, g in zip(factors, gradients, strict=True)}
    return total


def entries(matrix):
    return [value for row in matrix.tolist() for value in row]


def slow(proxy, model, plain, batches, scale):
    factors = factors_of(model)
    if proxy == "synflow":
        gradients = weight_gradients(plain, batches[:1], factors, scale, absolute=True, ones=True)
        factors = {name: (a.abs(), b.abs()) for name, (a, b) in factors.items()}
    else:
        gradients = weight_gradients(plain, batches, factors, scale)
    scores = {}
    for name, (a, b) in factors.items():
        of_a, of_b = scale * b.T @ gradients[name], scale * gradients[name] @ a.T
        if proxy == "grad-norm":
            scores[name] = sum(math.sqrt(sum(g * g for g in entries(m))) for m in (of_a, of_b))
        else:
            scores[name] = sum(
                abs(w * g)
                for pair in ((a, of_a), (b, of_b))
                for w, g in zip(*map(entries, pair), strict=True)
            )
    return scores


def assert_close(found, expected, dtype=torch.float32):
    assert found.keys() == expected.keys() and len(expected) == 6
    assert len(set(expected.values())) == 6 and min(expected.values()) > 0
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=TOLERANCES[dtype]), name


@pytest.mark.parametrize("alpha", [6.0, 16.0, 1.0])
@pytest.mark.parametrize(
    ("proxy", "dtype"),
    [
        ("grad-norm", torch.float32),
        ("grad-norm", torch.float64),
        ("snip", torch.float32),
        ("snip", torch.float64),
        ("synflow", torch.float32),  # always
    ],
)
def test_scores_follow_the_formulas(subject, proxy, dtype, alpha):
    """Summed over three batches (synflow: of the first), with s = alpha/r."""
    model, plain, made = adapted(subject, alpha=alpha, dtype=dtype)
    batches = made.batches(3)
    expected = slow(proxy, model, plain, batches, alpha / RANK)
    assert_close(PROXIES[proxy](model, batches), expected, dtype)


def test_grad_norm_of_a_fresh_adapter_is_the_norm_of_db_alone(subject):
    model, plain, made = adapted(subject, b_std=0.0)
    batches = made.batches(2)
    expected = slow("grad-norm", model, plain, batches, 2.0)
    assert_close(PROXIES["grad-norm"](model, batches), expected)
    gradients = weight_gradients(plain, batches, factors_of(model), 2.0)
    for name, (a, _) in factors_of(model).items():
        assert expected[name] == pytest.approx(2.0 * (gradients[name] @ a.T).norm().item())


def test_raw_scores_of_a_fresh_adapter_grow_with_alpha(subject):
    """Why a shortcut of alpha 4 beside LoRA of alpha 16 loses by a factor of four."""
    scores = []
    for alpha in (4.0, 16.0):
        model, _, made = adapted(subject, alpha=alpha, b_std=0.0)
        scores.append(PROXIES["grad-norm"](model, made.batches(1)))
    for name, score in scores[0].items():
        # A power of two: to the last bit but for the square roots.
        assert scores[1][name] == pytest.approx(4 * score, rel=1e-6)


def test_gradients_not_scores_are_summed_over_batches(subject):
    model, plain, made = adapted(subject)
    batches = made.batches(3)
    together = PROXIES["grad-norm"](model, batches)
    apart = [PROXIES["grad-norm"](model, [batch]) for batch in batches]
    for name, score in together.items():
        # The triangle inequality, far from equality: these batches disagree.
        assert score < 0.95 * sum(scores[name] for scores in apart)


def chosen_by_sorting(scores, count, seed):
    """The top scores, equal ones in the order of the seed's own numbers."""
    lots = np.random.default_rng(seed).random(len(scores))
    order = sorted(range(len(scores)), key=lambda i: (scores[i], lots[i]), reverse=True)
    return set(order[:count])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kinds", [1, 2, 5, 48])
def test_selection_is_the_top_quarter_with_ties_by_the_seed(kinds, seed):
    """48 modules of one size at rank 32 or nothing, as OPT-350M's Q and V at p = 25 %."""
    sites = [Site(str(i), 1024, 1024) for i in range(48)]
    draw = np.random.default_rng(100 + seed)
    scores = (1.0 + draw.integers(0, kinds, 48)).tolist()
    ranks = solve(sites, log_gains(scores, (0, 32)), (0, 32), 12 * 32 * 2048, seed=seed)
    found = {i for i, rank in enumerate(ranks) if rank}
    assert len(found) == 12 and set(ranks) == {0, 32}
    assert found == chosen_by_sorting(scores, 12, seed)


def test_constant_draws_every_module_equally_often(subject):
    """A random subset, another for each seed: no early layer is favoured."""
    model, _, _ = adapted(subject)
    scores = PROXIES["constant"](model, [])
    assert set(scores.values()) == {1.0}
    sites = [Site(str(i), 64, 64) for i in range(8)]
    draws = 400
    times = np.zeros(8)
    for seed in range(draws):
        ranks = solve(sites, log_gains([1.0] * 8, (0, 4)), (0, 4), 2 * 4 * 128, seed=seed)
        assert sum(map(bool, ranks)) == 2
        times += [bool(rank) for rank in ranks]
    # A fair draw is binomial: n = 400, p = 1/4. The seeds are fixed, so this holds or does not.
    deviation = math.sqrt(draws * 0.25 * 0.75)
    assert abs(times - draws / 4).max() < 3 * deviation
