"""Dynamic search under transformers' Trainer: when it ranks, what stays, and exact resumption."""

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from search_runs import (
    BATCH,
    BEST_AT_END,
    HALF,
    QUICK,
    R,
    Rows,
    Stop,
    make_model,
    make_trainer,
    run,
    weights,
)
from transformers import TrainerCallback

import heterolora
from heterolora import Budget, DynamicSearchCallback
from heterolora.errors import DataError, ModelError
from heterolora.search import save_enabled
from heterolora.search.dynamic.masks import parked_count

UNIFORM = {"warmup": "uniform"}


class Trace(TrainerCallback):
    """What each step begins with, behind the search."""

    def __init__(self, search):
        self.search = search
        self.ranks, self.random = {}, {}

    def on_step_begin(self, args, state, control, **kwargs):
        self.ranks[state.global_step] = self.search.ranks
        self.random[state.global_step] = torch.get_rng_state()


def test_when_it_ranks(tmp_path):
    search = DynamicSearchCallback(HALF, **QUICK)
    trace = Trace(search)
    run(tmp_path, search, more=[trace], learning_rate=0.1)
    # Ten steps an epoch; two fifths of them are four.
    steps = [0, 4, 8, 10, 14, 18]
    assert [ranking.step for ranking in search.rankings] == steps
    assert len(trace.ranks) == 20
    last = {}
    for step, ranks in trace.ranks.items():
        if step in steps:
            last = search.rankings[steps.index(step)].ranks
        assert ranks == last
    assert len({tuple(r.ranks.values()) for r in search.rankings}) > 1
    for ranking in search.rankings:
        assert set(ranking.ranks.values()) <= {0, R}
        assert len(ranking.scores) == 6 and min(ranking.scores.values()) > 0


def test_accumulation_counts_as_one_step(tmp_path):
    search = DynamicSearchCallback(HALF, batches=1, every=0.5)
    run(tmp_path, search, gradient_accumulation_steps=3, num_train_epochs=2)
    assert [ranking.step for ranking in search.rankings] == [0, 2, 4, 6]


def test_a_stream_is_one_epoch(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([Rows()[i] for i in range(40)])

    given = [{k: torch.stack([Rows()[i][k] for i in range(3)]) for k in ("input_ids", "labels")}]
    search = DynamicSearchCallback(HALF, batches=given, every=0.5)
    run(tmp_path, search, rows=Stream(), max_steps=6, fused=False)
    assert [ranking.step for ranking in search.rankings] == [0, 3]
    with pytest.raises(DataError, match="a Stream cannot be indexed.*give a list of batches"):
        run(tmp_path, DynamicSearchCallback(HALF, batches=1), rows=Stream(), max_steps=6)


@pytest.mark.parametrize("proxy", ["grad-norm", "snip", "synflow", "constant"])
@pytest.mark.parametrize("fused", [False, True])
def test_scoring_changes_nothing(tmp_path, proxy, fused):
    """With a budget for everything a run is the run without a search, to the bit: with dropout,
    shuffled data, and an adapter whose B is zero at first.
    """
    search = DynamicSearchCallback(Budget(rank=R), proxy=proxy, fresh=True, **QUICK)
    trace, plain = Trace(search), Trace(search)
    found, _ = run(tmp_path, search, fused=fused, more=[trace], num_train_epochs=1)
    expected, _ = run(tmp_path, None, fused=fused, more=[plain], num_train_epochs=1)
    assert len(search.rankings) == 3 and set(search.ranks.values()) == {R}
    assert all(torch.equal(trace.random[step], plain.random[step]) for step in range(10))
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys() and len(found) == 14
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "fused", "rate", "stop"),
    [
        ({"proxy": "constant"}, False, 0.03, 18),
        ({"proxy": "grad-norm", "fresh": True}, True, 0.1, 16),
        ({"proxy": "snip", "ranks": (0, 1, 2, 4), "warmup_epochs": 0.5}, True, 0.03, 18),
        ({**UNIFORM, "ranks": (0, 1, 3), "warmup_epochs": 0.4, "fresh": True}, False, 0.1, 16),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options, fused, rate, stop):
    """Cut off in the middle of an epoch, after several rankings; at step 18 one is due at once."""
    make = lambda: DynamicSearchCallback(HALF, **QUICK, **options)  # noqa: E731
    more = {"fused": fused, "learning_rate": rate}
    whole = make()
    expected, first = run(tmp_path / "whole", whole, **more)
    cut = make()
    run(tmp_path / "parts", cut, more=[Stop(stop)], **more)
    before = [ranking.step for ranking in cut.rankings]
    assert len(before) >= 2
    rest = make()
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop}"
    found, second = run(tmp_path / "parts", rest, resume=str(checkpoint), **more)
    assert [r.step for r in cut.rankings + rest.rankings] == [r.step for r in whole.rankings]
    assert cut.rankings + rest.rankings == whole.rankings
    assert len({tuple(r.ranks.values()) for r in whole.rankings}) > 1
    if "ranks" in options:
        assert any(0 < rank < R for rank in cut.ranks.values())
    assert rest.counts == whole.counts and rest.ranks == whole.ranks
    for masks, trainer in ((whole.masks, first), (rest.masks, second)):
        masks.lift(trainer.optimizer)
    found, expected = weights(found), weights(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [{i: s for i, s in t.optimizer.state_dict()["state"].items()} for t in (first, second)]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 14
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())


def test_what_is_off_stays_where_it_was(tmp_path):
    """Through the Trainer with AdamW and weight decay, between two rankings, whatever gradient some
    other code gives it.
    """
    search = DynamicSearchCallback(HALF, proxy="constant", every=0.5)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            step = state.global_step
            seen[step] = (search.ranks, {k: v.clone() for k, v in search.masks.tensors().items()})

    class Zeros(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    callbacks = [Zeros(), search, Watch()]
    trainer = make_trainer(make_model(), tmp_path, callbacks, num_train_epochs=1)
    trainer.train()
    for step in range(1, 10):
        ranks, parked = seen[step]
        if step != 5:
            assert ranks == seen[step - 1][0] and parked.keys() == seen[step - 1][1].keys()
            assert all(torch.equal(parked[key], seen[step - 1][1][key]) for key in parked)
    on_then_off = [n for n, r in seen[0][0].items() if r and not seen[5][0][n]]
    assert on_then_off
    for name in on_then_off:
        assert seen[5][1][f"{name}|b"].any()  # it had trained
        factor = search.masks.layers[name].lora_B["default"].weight
        assert trainer.optimizer.state[factor]["step"] == 5
    assert search.masks.parked_is_zero()


def test_warm_ups(tmp_path):
    def made(**options):
        search = DynamicSearchCallback(HALF, **QUICK, warmup_epochs=1.5, **options)
        trace = Trace(search)
        run(tmp_path, search, more=[trace])
        return search, trace.ranks

    late = [15, 18]
    search, ranks = made()
    assert [ranking.step for ranking in search.rankings] == late
    assert all(set(ranks[step].values()) == {R} for step in range(15))
    assert search.counts.ever_trained == 2 * search._pools[0].parameters
    search, ranks = made(warmup="uniform")
    assert [ranking.step for ranking in search.rankings] == late
    assert all(set(ranks[step].values()) == {R // 2} for step in range(15))
    search, _ = made(warmup="constant")
    assert [r.step for r in search.rankings] == [0, 4, 8, 10, 14, *late]
    assert [r.proxy for r in search.rankings] == ["constant"] * 5 + ["grad-norm"] * 2
    assert len({tuple(r.ranks.values()) for r in search.rankings[:5]}) > 1


def test_counts(tmp_path):
    search = DynamicSearchCallback(HALF, proxy="constant", ranks=(0, 1, 4), every=0.5)
    assert search.counts == (search.counts.__class__)(0, 0, 0) and search.ranks == {}
    model, _ = run(tmp_path, search)
    unit = {name: sum(search.masks.shape(name)) for name in search.ranks}
    counts = search.counts
    assert counts.enabled == sum(rank * unit[name] for name, rank in search.ranks.items())
    assert counts.enabled <= 2 * sum(unit.values())
    ever = {n: max(ranking.ranks[n] for ranking in search.rankings) for n in unit}
    assert counts.ever_trained == sum(rank * unit[name] for name, rank in ever.items())
    assert counts.enabled < counts.ever_trained
    save_enabled(model, tmp_path / "cut")
    stored = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert counts.stored == sum(v.numel() for k, v in stored.items() if "lora_" in k)


def test_checkpoints_load_in_stock_peft(tmp_path):
    """Also the best one, whose ranks are not the last ones."""
    search = DynamicSearchCallback(HALF, proxy="constant", every=0.5)
    model, trainer = run(
        tmp_path,
        search,
        **BEST_AT_END,
    )
    best = Path(trainer.state.best_model_checkpoint)
    last = {r.step: r for r in search.rankings}[15]
    assert int(best.name.split("-")[1]) <= 14 and search.ranks != last.ranks
    batch = {k: torch.stack([Rows()[i][k] for i in range(8)]) for k in ("input_ids", "labels")}
    model.eval()
    logits = model(**batch).logits
    loaded = PeftModel.from_pretrained(make_model().unload(), str(best)).eval()
    torch.testing.assert_close(loaded(**batch).logits, logits, rtol=1e-5, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_an_error_while_scoring_leaves_the_model_as_it_was(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 4:
                rows.ids[0, 0] = 10**6
                kept.append(weights(kwargs["model"]))

    rows, kept = Rows(), []
    search = DynamicSearchCallback(HALF, **QUICK)
    model = make_model()
    trainer = make_trainer(model, tmp_path, [Spoil(), search], rows=rows)
    with pytest.raises(IndexError):
        trainer.train()
    first = search.rankings[0].ranks
    assert len(search.rankings) == 1 and search.ranks == first
    assert parked_count(model) == sum(rank < R for rank in first.values())
    after = weights(model)
    assert all(torch.equal(kept[0][name], after[name]) for name in after)


def test_training_on_in_the_same_process(tmp_path):
    search = DynamicSearchCallback(HALF, **QUICK)
    model, trainer = run(tmp_path, search, num_train_epochs=1)
    assert parked_count(model)
    trainer.train()
    assert len(search.rankings) == 3
    other = make_trainer(model, tmp_path, [DynamicSearchCallback(HALF, **QUICK)])
    with pytest.raises(
        ModelError, match=r"switched off by an earlier search; call `masks.lift\(\)"
    ):
        other.train()
    search.masks.lift()
    other.train()


def test_graphed_trainer_runs_its_steps_without_graphs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "heterolora"):
        _, trainer = run(
            tmp_path,
            DynamicSearchCallback(HALF, **QUICK),
            kind=heterolora.GraphedTrainer,
            num_train_epochs=1,
        )
    assert trainer.graph_summary == "no CUDA device"
    from recorder import CpuRecorder

    class Graphed(heterolora.GraphedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, recorder=CpuRecorder(), **kwargs)

    _, trainer = run(
        tmp_path, DynamicSearchCallback(HALF, **QUICK), kind=Graphed, num_train_epochs=1
    )
    assert trainer.graph_summary.startswith("a callback changes the model between steps")


def test_batches_are_the_same_for_the_same_seed_whatever_came_before(tmp_path):
    from heterolora.search.dynamic.samples import Samples

    loader = make_trainer(make_model(), tmp_path, []).get_train_dataloader()
    fixed, fresh = Samples(3, fresh=False), Samples(3, fresh=True)
    first = fixed.take(loader, BATCH, 1)
    assert torch.equal(torch.cat([b["input_ids"] for b in first]), Rows().ids[: 3 * BATCH])
    one, same, other = (fresh.take(loader, BATCH, seed) for seed in (1, 1, 2))
    ids = [torch.cat([b["input_ids"] for b in batches]) for batches in (one, same, other)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])
    assert len(Samples(99, fresh=True).take(loader, BATCH, 0)) == 10
