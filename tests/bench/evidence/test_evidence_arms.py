"""Every arm, trained for a few steps on a tiny model."""

import math
from dataclasses import replace

import pytest
import torch
from evidence_runs import (
    ROWS,
    STEPS_TAKEN,
    a_run,
    save_sick,
    save_tiny_model,
)
from tiny import save_model

from heterolora.bench.evidence.arms import outside
from heterolora.bench.evidence.arms import registry as arms
from heterolora.bench.evidence.arms.candidates import pooler_by_hand
from heterolora.bench.evidence.arms.registry import ARMS
from heterolora.bench.evidence.arms.setting import Setting, adapter_parameters
from heterolora.bench.evidence.tasks.registry import TASKS
from heterolora.bench.evidence.trial import Trials
from heterolora.bench.harness.timing import BenchError
from heterolora.search import Budget, SearchSpace, recommended, uniform

# Two layers of four 32 x 32 and two 32 x 64 linears; 64 and 96 parameters per unit of rank.
UNIT = 2 * (4 * 64 + 2 * 96)
ABLATIONS = [name for name in ARMS if name.startswith("alone-")]
PLAIN = [name for name in ARMS if name not in ABLATIONS]
# With the pooler's 32 x 32 linear among the candidates, and not trained in full beside them.
ALL_LINEAR = [name for name in ARMS if name.startswith("all-linear")]
# One of each way to be built; the others run with the slow tests.
FEW = (
    "uniform",
    "spectral-warm-floor",
    "eva",
    "adalora",
    "dynamic-grad-norm",
    "shortcuts-spectral",
    "short-57",
)
EACH = [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in PLAIN]
BUDGETED = [each for each in EACH if ARMS[each.values[0]].build is not outside.adalora]
STEPS = 2 * math.ceil(ROWS / 8)


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    return Trials(save_sick(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


class Results(dict):
    """{arm: result}, each run when it is asked for first."""

    def __init__(self, trials, model):
        super().__init__()
        self.trials, self.model = trials, model

    def __missing__(self, name):
        self[name] = self.trials.run(a_run(self.model, arm=name))
        return self[name]


@pytest.fixture(scope="module")
def results(trials, model):
    return Results(trials, model)


@pytest.mark.parametrize("name", EACH)
def test_every_arm_trains_and_is_measured(results, name):
    result = results[name]
    assert result["steps"] == math.ceil(STEPS * STEPS_TAKEN.get(name, 1))
    assert (result["train_rows"], result["test_rows"]) == (ROWS, ROWS)
    assert not result["diverged"] and 0 < result["loss"] < 3
    assert 0 <= result["accuracy"] <= 1
    # Pooler, and classifier of three classes.
    pooler = 0 if name in ALL_LINEAR else 32 * 32 + 32
    assert result["trained_in_full"] == pooler + 3 * 32 + 3
    assert result["seconds_per_step"]["cpu"] > 0
    assert len(result["ranks"]) > 0
    # All but these go through FuseCallback; AdaLoRA's layers are not LoRA's. Of layers as small as
    # these it leaves all to PEFT, whose forward is faster there.
    assert result["fused_modules"] == (None if name == "adalora" else 0)


@pytest.mark.parametrize("name", BUDGETED)
def test_parameters_are_within_the_budget(results, name):
    enabled = results[name]["parameters"]["enabled"]
    shortcuts = name in ("shortcuts-all", "lora-higher")
    # Seven shortcuts, as the first layer has no cross-ffn, of 64 parameters each.
    budget = 2 * UNIT + (2 * 7 * 64 if shortcuts else 0) + (2 * 64 if name in ALL_LINEAR else 0)
    assert 0.9 * budget < enabled <= budget
    if name in ("uniform", "random", "grad-norm", "shuffled", "shortcuts-all"):
        assert enabled == budget


def test_on_off_is_a_quarter_of_the_parameters_at_four_times_the_rank(results):
    for name in ("random-onoff", "grad-norm-onoff", "dynamic-grad-norm", "dynamic-spectral"):
        assert set(results[name]["ranks"].values()) == {0, 8}


def test_shuffling_deals_the_same_ranks_among_modules_of_one_size(results):
    dealt, own = results["shuffled"]["ranks"], results["spectral-warm"]["ranks"]
    assert dealt != own
    for attention in (True, False):
        ranks = [
            sorted(rank for name, rank in found.items() if ("attention" in name) is attention)
            for found in (dealt, own)
        ]
        assert ranks[0] == ranks[1]


def test_ablations_adapt_one_module(results, model):
    assert len(ABLATIONS) == 36
    alone = results["alone-1-query"]["ranks"]
    assert [name for name, rank in alone.items() if rank] == [
        "bert.encoder.layer.1.attention.self.query"
    ]
    with pytest.raises(BenchError, match="no module 5-query"):
        ARMS["alone-5-query"].build(setting(model))


def test_lora_higher_has_two_neighbouring_ranks(results, model):
    # Here the shortcuts cost half of uniform LoRA: 2 and 1 of them make 3, 1 and a half 1.5.
    assert set(results["lora-higher"]["ranks"].values()) == {3}
    adapted = ARMS["lora-higher"].build(replace(setting(model), rank=1))
    assert set(adapted.ranks.values()) == {1, 2}
    assert 1.4 * UNIT < adapter_parameters(adapted.model) <= 1.5 * UNIT


def test_shortcuts_are_trained_and_counted(results):
    everywhere = ("shortcuts-all", "shortcuts-even", "shortcuts-spectral")
    for name in everywhere:
        ranks = [rank for key, rank in results[name]["ranks"].items() if ":" in key]
        assert len(ranks) == 7 and all(ranks)


def test_floors_and_warm_ups_reach_the_search(results):
    assert min(results["spectral-warm-floor"]["ranks"].values()) == 1
    assert min(results["sigma-warm-floor"]["ranks"].values()) == 1
    assert results["spectral"]["search_seconds"] < results["spectral-warm"]["search_seconds"]


def test_dynamic_ranks_again_five_times_an_epoch_and_says_what_was_trained(results):
    result = results["dynamic-grad-norm"]
    counts = result["parameters"]
    # Six steps an epoch: a ranking every ceil(1.2) steps.
    assert result["rankings"] == 6
    assert counts["enabled"] == counts["stored"] <= counts["ever_trained"] <= 8 * UNIT


def test_adalora_prunes_after_every_step(results):
    result = results["adalora"]
    assert result["update_and_allocate_calls"] == STEPS
    assert sum(result["ranks"].values()) == 2 * 12
    counts = result["parameters"]
    assert counts["ever_trained"] == 4 * (UNIT + 12)
    assert counts["enabled"] < counts["ever_trained"]


def setting(model, seed=0):
    made, tokenizer = TASKS["sick"].make(str(model), seed)
    rows = TASKS["sick"]
    texts = tokenizer(["good film", "the plot is weak"] * 4, return_tensors="pt", padding=True)
    batch = {**texts, "labels": torch.arange(8) % 3}
    return Setting(
        model=made,
        rank=2,
        seed=seed,
        steps=12,
        space=SearchSpace(target_modules=rows.targets),
        scoring_batches=2,
        bf16=True,
        draw=lambda count: [dict(batch) for _ in range(count)],
    )


def test_without_dropout_training_computes_what_evaluation_does(tmp_path):
    folder = save_model(tmp_path / "tiny", dropout=0.3)
    logits = {}
    for name in ("uniform", "no-dropout"):
        made = setting(folder)
        adapted = ARMS[name].build(made).model
        batch = made.batches(1)[0]
        for mode in (True, False):
            logits[name, mode] = adapted.train(mode)(**batch).logits
    # Its time was measured with the plain form of attention.
    assert adapted.config._attn_implementation == "eager"
    expected = logits["uniform", False]
    assert not torch.allclose(logits["uniform", True], expected, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(logits["no-dropout", True], expected)


def test_pefts_default_modules_get_the_whole_budget(model):
    ranks = ARMS["peft-targets"].build(setting(model)).ranks
    # Of 1792 values, 64 for each unit of rank of four modules.
    assert {name.split(".")[-1] for name, rank in ranks.items() if rank} == {"query", "value"}
    assert set(ranks.values()) == {0, 7} and len(ranks) == 12
    given = setting(model)
    given.model.config.model_type = "unheard-of"
    with pytest.raises(BenchError, match="PEFT adapts no module of 'unheard-of' by default"):
        outside.peft_targets(given)


def test_the_command_lines_own_candidates_take_the_pooler_in_and_leave_only_the_head(results):
    plain = results["uniform"]
    found = {arm: results[arm] for arm in ("all-linear", "all-linear-search")}
    pooler = "bert.pooler.dense"
    for arm, result in found.items():
        assert set(result["ranks"]) == {*plain["ranks"], pooler}, arm
        # The pooler's 32 x 32 weights and 32 biases, and nothing else, are trained only in uniform.
        assert plain["trained_in_full"] - result["trained_in_full"] == 32 * 32 + 32
        assert result["parameters"]["enabled"] == 2 * (UNIT + 32 + 32)
    assert set(found["all-linear"]["ranks"].values()) == {2}
    assert min(found["all-linear-search"]["ranks"].values()) >= 1


def test_the_search_over_them_is_by_the_defaults(monkeypatch, model):
    given = setting(model)
    asked = {}

    def searched(setting, proxy, ranks, budget, **options):
        asked.update(proxy=proxy, **options)
        return uniform(setting.model, setting.rank, setting.space)

    monkeypatch.setattr(arms, "searched", searched)
    expected = recommended(given.model, Budget(rank=given.rank), SearchSpace())
    ARMS["all-linear-search"].build(given)
    assert asked == expected


def test_the_pooler_by_hand_has_four_times_the_rank_at_the_same_parameters(results):
    ranks = results["all-linear-pooler"]["ranks"]
    pooler = "bert.pooler.dense"
    assert ranks[pooler] == 8
    rest = {rank for name, rank in ranks.items() if name != pooler}
    assert 1 in rest and max(rest) <= 4
    assert results["all-linear-pooler"]["parameters"]["enabled"] == 2 * (UNIT + 32 + 32)


def test_ranks_are_dealt_out_anew_but_for_the_poolers(results):
    own = results["all-linear-search"]["ranks"]
    dealt = results["all-linear-encoder-shuffled"]["ranks"]
    pooler = "bert.pooler.dense"
    assert dealt != own and dealt[pooler] == own[pooler]
    for attention in (True, False):
        ranks = [
            sorted(r for n, r in found.items() if n != pooler and ("attention" in n) is attention)
            for found in (dealt, own)
        ]
        assert ranks[0] == ranks[1]


def test_pefts_default_modules_among_the_command_lines_candidates(results):
    ranks = results["all-linear-peft-targets"]["ranks"]
    chosen = {name.split(".")[-1] for name, rank in ranks.items() if rank}
    assert chosen == {"query", "value"} and "bert.pooler.dense" in ranks


def test_without_a_pooler_among_the_candidates_nothing_is_given_by_hand(model):
    with pytest.raises(BenchError, match="no pooler"):
        pooler_by_hand(setting(model))


def test_eva_keeps_its_components_and_its_scale(model):
    adapted = outside.eva(setting(model))
    layers = {
        name: layer
        for name, layer in adapted.model.get_base_model().named_modules()
        if hasattr(layer, "lora_A")
    }
    ranks = {name: rank for name, rank in adapted.ranks.items() if rank}
    assert {n: layer.lora_A["default"].weight.shape[0] for n, layer in layers.items()} == ranks
    assert adapter_parameters(adapted.model) <= 2 * UNIT <= adapted.notes["parameters_before_trim"]
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(2.0)
        # Principal directions are orthonormal, which no random start is.
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)), atol=1e-4, rtol=0)
        assert not layer.lora_B["default"].weight.any()


def test_a_run_repeats_and_seeds_differ(trials, model):
    first, again = (trials.run(a_run(model, arm="shuffled", epochs=1.0)) for _ in range(2))
    other = trials.run(a_run(model, arm="shuffled", epochs=1.0, seed=1))
    assert (first["loss"], first["ranks"]) == (again["loss"], again["ranks"])
    assert first["loss"] != other["loss"] and first["ranks"] != other["ranks"]


def test_a_choice_run_holds_rows_of_the_training_split_out(trials, model):
    result = trials.run(a_run(model, purpose="choice", epochs=1.0))
    assert (result["train_rows"], result["test_rows"]) == (43, 5)


def test_a_run_that_diverges_says_so(trials, model):
    result = trials.run(a_run(model, learning_rate=1e30, epochs=1.0))
    assert result["diverged"] and result["loss"] is None


def test_searches_see_training_rows_only(trials, model, monkeypatch):
    seen = []

    def spy(given):
        seen.append(given)
        return ARMS["uniform"].build(given)

    monkeypatch.setitem(ARMS, "spy", arms.Arm("spy", "uniform", "", spy))
    run = a_run(model, arm="spy", purpose="choice", epochs=1.0)
    trials.run(run)
    train, held_out = (
        {tuple(row["input_ids"]) for row in rows}
        for rows in trials._splits(TASKS["sick"], run, None)
    )
    drawn = [
        tuple(ids[ids > 0].tolist()) for batch in seen[0].batches(6) for ids in batch["input_ids"]
    ]
    assert len(drawn) == 43 and set(drawn) == train
    assert held_out - train
    assert len(seen[0].batches()) == 2 and seen[0].steps == 6
