"""A dynamic search over LoRA and shortcuts on a post-norm OPT, against HeteroLoRA's formulas.

The reference is a post-norm OPT written out in float64, where a LoRA module is a weight W + s B A
and a shortcut a matrix M = s B A between two places (arXiv 2406.14956, its code's layer without
the second norms). With G the gradient of such a matrix, summed over the batches, dL/dA = s B^T G
and dL/dB = s G A^T.
"""

import math

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from search_runs import make_trainer
from torch.nn.functional import cross_entropy, gelu, layer_norm
from transformers import TrainerCallback

import heterolora
from heterolora import Budget, DynamicSearchCallback

WIDTH, HEADS, RANK = 32, 2, 4
UNIT = 2 * WIDTH
# Unlike each other, so that a scale in the wrong place shows.
ALPHA, SHORTCUT_ALPHA = 16, 3


def opt(targets, layers=3, rank=RANK):
    """A post-norm OPT, as OPT-350M is, with LoRA on two modules a layer and all shortcuts."""
    torch.manual_seed(7)
    config = transformers.OPTConfig(
        vocab_size=61,
        hidden_size=WIDTH,
        word_embed_proj_dim=24,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        ffn_dim=64,
        max_position_embeddings=16,
        dropout=0.0,
        attention_dropout=0.0,
        do_layer_norm_before=False,
        # A ReLU whose input is within rounding of zero jumps, and so does the gradient.
        activation_function="gelu",
        init_std=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config.use_cache = False
    lora = LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(transformers.OPTForCausalLM(config), lora)
    heterolora.add_shortcuts(model, rank=rank, alpha=SHORTCUT_ALPHA)
    return model


class Texts(torch.utils.data.Dataset):
    def __init__(self, rows=40, seed=3):
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(3, 61, (rows, 7), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


BATCHES = [
    {k: Texts(12, 50).ids[4 * i : 4 * i + 4] for k in ("input_ids", "labels")} for i in range(3)
]


def scale_of(name):
    return (SHORTCUT_ALPHA if ":" in name else ALPHA) / RANK


class Reference:
    """What the search has to find at a step, from the state dict and what is parked alone."""

    def __init__(self, model, parked):
        state = {k: v.detach().double().clone() for k, v in model.state_dict().items()}
        names = [shortcut.name for shortcut in model.low_rank_shortcuts]
        self.factors = {}
        for key, a in state.items():
            if ".lora_A." in key:
                name = key.removeprefix("base_model.model.").split(".lora_A")[0]
                b = state[key.replace("lora_A", "lora_B")]
            elif key.startswith("low_rank_shortcuts") and key.endswith(".a"):
                name, b = names[int(key.split(".")[2])], state[key[:-1] + "b"]
            else:
                continue
            if f"{name}|a" in parked:
                rest = parked[f"{name}|a"].double()
                a = torch.cat([a[: RANK - len(rest)], rest])
                b = torch.cat([b[:, : RANK - len(rest)], parked[f"{name}|b"].double()], 1)
            self.factors[name] = a, b
        prefix = "base_model.model."
        self.weights = {
            k.removeprefix(prefix).replace(".base_layer", ""): v
            for k, v in state.items()
            if k.startswith(prefix) and ".lora_" not in k
        }
        self.layers = 1 + max(int(n.split("layers.")[1].split(".")[0]) for n in self.factors)

    def gradients(self, batches):
        """{name: G}, summed over the batches."""
        dense = {n: (scale_of(n) * b @ a).requires_grad_() for n, (a, b) in self.factors.items()}
        total = 0
        for batch in batches:
            loss = self._loss(dense, batch["input_ids"])
            found = torch.autograd.grad(loss, list(dense.values()))
            total = [g + t for g, t in zip(found, total or [0] * len(found), strict=True)]
        return dict(zip(dense, total, strict=True))

    def scores(self, proxy, batches):
        scores = {}
        for name, gradient in self.gradients(batches).items():
            (a, b), s = self.factors[name], scale_of(name)
            of_a, of_b = s * b.T @ gradient, s * gradient @ a.T
            if proxy == "grad-norm":
                scores[name] = math.sqrt((of_a * of_a).sum()) + math.sqrt((of_b * of_b).sum())
            else:
                scores[name] = float((a * of_a).abs().sum() + (b * of_b).abs().sum())
        return scores

    def _loss(self, dense, ids):
        w = self.weights
        decoder = "model.decoder"

        def linear(name, x):
            weight = w[f"{name}.weight"] + dense.get(name, 0)
            return x @ weight.T + w.get(f"{name}.bias", 0)

        def norm(name, x):
            return layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"])

        def shortcut(projection, kind, u):
            return 0 if u is None else u @ dense[f"{projection}:{kind}"].T

        length = ids.shape[1]
        hidden = linear(f"{decoder}.project_in", w[f"{decoder}.embed_tokens.weight"][ids])
        # OPT's table of positions begins at its row 2.
        x = hidden + w[f"{decoder}.embed_positions.weight"][2 : 2 + length]
        unseen = torch.ones(length, length).triu(1).bool()
        before = None
        for index in range(self.layers):
            layer = f"{decoder}.layers.{index}"
            q, k, v = (
                linear(f"{layer}.self_attn.{part}_proj", x).unflatten(-1, (HEADS, -1))
                for part in "qkv"
            )
            weights = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(WIDTH // HEADS)
            weights = weights.masked_fill(unseen, -math.inf).softmax(-1)
            context = torch.einsum("bhlm,bmhd->blhd", weights, v).flatten(2)
            out = f"{layer}.self_attn.out_proj"
            attention = linear(out, context)
            attention = attention + shortcut(out, "in-attn", x) + shortcut(out, "cross-ffn", before)
            z = norm(f"{layer}.self_attn_layer_norm", x + attention)
            out = f"{layer}.fc2"
            ffn = linear(out, gelu(linear(f"{layer}.fc1", z)))
            ffn = ffn + shortcut(out, "in-ffn", z) + shortcut(out, "cross-layer", x)
            x, before = norm(f"{layer}.final_layer_norm", z + ffn), z
        logits = linear(f"{decoder}.project_out", x) @ w[f"{decoder}.embed_tokens.weight"].T
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class Watch(TrainerCallback):
    """References of the steps, from before the search ranks."""

    def __init__(self, search):
        self.search = search
        self.references = {}

    def on_step_begin(self, args, state, control, **kwargs):
        parked = {key: value.clone() for key, value in self.search.masks.tensors().items()}
        self.references[state.global_step] = Reference(kwargs["model"], parked)


def top(scores, count):
    return set(sorted(scores, key=scores.get, reverse=True)[:count])


def of(scores, shortcuts):
    return {name: score for name, score in scores.items() if (":" in name) == shortcuts}


@pytest.mark.parametrize("mode", ["combined", "separated"])
@pytest.mark.parametrize("proxy", ["grad-norm", "snip"])
def test_scores_and_choices_follow_the_formulas(tmp_path, proxy, mode):
    """6 LoRA modules and 11 shortcuts; snip after a warm-up, as it is zero for a fresh adapter."""
    budgets = {"budget": Budget(params=9 * RANK * UNIT)}
    if mode == "separated":
        budgets = {
            "budget": Budget(params=4 * RANK * UNIT),
            "shortcut_budget": Budget(params=5 * RANK * UNIT),
        }
    search = DynamicSearchCallback(
        **budgets, proxy=proxy, batches=BATCHES, every=0.5, warmup_epochs=0.5 * (proxy == "snip")
    )
    watch = Watch(search)
    # At the outputs of the attention LoRA and shortcuts meet.
    model = opt(["v_proj", "out_proj"])
    for layer in model.get_base_model().model.decoder.layers:
        # Else what attention adds is so small that no LoRA module is chosen.
        for projection in (layer.self_attn.v_proj, layer.self_attn.out_proj):
            torch.nn.init.normal_(projection.base_layer.weight, std=0.2)
    trainer = make_trainer(model, tmp_path, [watch, search], rows=Texts(), learning_rate=0.06)
    trainer.train()
    steps = [0, 5, 10, 15][proxy == "snip" :]
    assert [ranking.step for ranking in search.rankings] == steps
    for ranking in search.rankings:
        expected = watch.references[ranking.step].scores(proxy, BATCHES)
        assert expected.keys() == ranking.scores.keys() and len(expected) == 17
        assert len(set(expected.values())) == 17 and min(expected.values()) > 0
        for name, score in expected.items():
            # Float32: some hundred terms of a sum, each through a few dozen sums.
            assert ranking.scores[name] == pytest.approx(score, rel=1e-5), (ranking.step, name)
        scores = {name: score / scale_of(name) for name, score in expected.items()}
        if mode == "combined":
            chosen = top(scores, 9)
        else:
            chosen = top(of(scores, False), 4) | top(of(scores, True), 5)
        assert {name for name, rank in ranking.ranks.items() if rank == RANK} == chosen
        assert sum(ranking.ranks.values()) == 9 * RANK
        assert 0 < len(of(dict.fromkeys(chosen, 1), False)) < 6
    assert len({tuple(ranking.ranks.values()) for ranking in search.rankings}) > 1


@pytest.mark.parametrize("mode", ["combined", "separated"])
@pytest.mark.parametrize("proxy", ["grad-norm", "constant"])
def test_36_of_143_as_on_opt_350m(tmp_path, proxy, mode):
    """48 LoRA modules and 95 shortcuts; p = 25 % of them: 12 and 24 (its code rounds 23.75 up)."""
    rank = 32
    counts = [(36, None), (12, 24)][mode == "separated"]
    budgets = [None if n is None else Budget(params=n * rank * UNIT) for n in counts]
    search = DynamicSearchCallback(
        budgets[0], shortcut_budget=budgets[1], proxy=proxy, batches=BATCHES[:1], seed=4
    )
    options = {"rows": Texts(), "max_steps": 1}
    model = opt(["q_proj", "v_proj"], layers=24, rank=rank)
    make_trainer(model, tmp_path, [search], **options).train()
    (ranking,) = search.rankings
    scores = ranking.scores
    assert [len(of(scores, False)), len(of(scores, True))] == [48, 95]
    # Equal scores go in the order of the seed's own numbers.
    own = int(np.random.SeedSequence([4, 0]).generate_state(1)[0])
    pools = [scores] if mode == "combined" else [of(scores, False), of(scores, True)]
    chosen = set()
    for pool, count in zip(pools, counts, strict=False):
        lots = dict(zip(pool, np.random.default_rng(own).random(len(pool)), strict=True))
        alphas = {n: SHORTCUT_ALPHA if ":" in n else ALPHA for n in pool}
        if proxy == "constant":
            alphas = dict.fromkeys(pool, 1)
        chosen |= top({n: (pool[n] / alphas[n], lots[n]) for n in pool}, count)
    assert {n for n, r in ranking.ranks.items() if r} == chosen and len(chosen) == 36
    assert set(ranking.ranks.values()) == {0, rank}
    assert search.counts.enabled == 36 * rank * UNIT
