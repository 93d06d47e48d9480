"""Dynamic search over LoRA modules and shortcuts: budgets, what stays, and exact resumption."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from search_runs import (
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
from heterolora import Budget, DynamicSearchCallback, ShortcutCallback, load_adapter
from heterolora.errors import AdapterFileError, BudgetError, ModelError, TrainingError
from heterolora.search import save_enabled
from heterolora.search.dynamic.masks import parked_count

UNIT = 2 * 32  # of every LoRA module and every shortcut
SEPARATED = {"budget": Budget(params=2 * R * UNIT), "shortcut_budget": Budget(params=7 * R * UNIT)}
BATCH = {key: torch.stack([Rows()[i][key] for i in range(8)]) for key in ("input_ids", "labels")}


def plain_base():
    model = make_model()
    heterolora.unfuse(model)
    return model.unload()


def split(ranks):
    """(of LoRA modules, of shortcuts)."""
    return tuple({n: r for n, r in ranks.items() if (":" in n) == wanted} for wanted in (0, 1))


@pytest.mark.parametrize("fused", [False, True])
def test_one_ranking_or_a_budget_each(tmp_path, fused):
    combined = DynamicSearchCallback(HALF, **QUICK)
    model, _ = run(tmp_path, combined, shortcuts=True, fused=fused, learning_rate=0.1)
    separated = DynamicSearchCallback(**SEPARATED, **QUICK)
    run(tmp_path, separated, shortcuts=True, fused=fused, learning_rate=0.1)
    names = [shortcut.name for shortcut in model.low_rank_shortcuts]
    for search in (combined, separated):
        assert [ranking.step for ranking in search.rankings] == [0, 4, 8, 10, 14, 18]
        assert len({tuple(r.ranks.values()) for r in search.rankings}) > 1
        for ranking in search.rankings:
            assert list(ranking.scores)[6:] == list(ranking.ranks)[6:] == names
            assert min(ranking.scores.values()) > 0 and len(ranking.scores) == 17
    # Half of 17 modules of one size, 8 and a half; or 2 of 6 and 7 of 11.
    for ranking in combined.rankings:
        assert sum(map(bool, ranking.ranks.values())) == 8
    for ranking in separated.rankings:
        assert [sum(map(bool, part.values())) for part in split(ranking.ranks)] == [2, 7]
    assert separated.counts.enabled == 9 * R * UNIT


@pytest.mark.parametrize("proxy", ["grad-norm", "snip", "synflow", "constant"])
def test_scoring_changes_nothing(tmp_path, proxy):
    """With a budget for everything a run is the run without a search, to the bit."""
    search = DynamicSearchCallback(Budget(rank=R), proxy=proxy, fresh=True, **QUICK)
    options = {"shortcuts": True, "num_train_epochs": 1}
    found, _ = run(tmp_path, search, **options)
    expected, _ = run(tmp_path, None, **options)
    assert len(search.rankings) == 3 and set(search.ranks.values()) == {R}
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys() and len(found) == 14 + 22
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "fused", "stop"),
    [
        ({"budget": HALF, "proxy": "constant"}, False, 18),
        ({**SEPARATED, "fresh": True}, True, 16),
        ({"budget": HALF, "proxy": "snip", "ranks": (0, 1, 2, 4), "warmup_epochs": 0.5}, True, 18),
        ({**SEPARATED, "ranks": (0, 1, 3), "warmup_epochs": 0.4, "warmup": "uniform"}, False, 16),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, options, fused, stop):
    make = lambda: DynamicSearchCallback(**QUICK, **options)  # noqa: E731
    more = {"fused": fused, "learning_rate": 0.03, "shortcuts": True}
    whole = make()
    expected, first = run(tmp_path / "whole", whole, **more)
    cut = make()
    run(tmp_path / "parts", cut, more=[Stop(stop)], **more)
    assert len(cut.rankings) >= 2
    rest = make()
    checkpoint = tmp_path / "parts" / f"checkpoint-{stop}"
    found, second = run(tmp_path / "parts", rest, resume=str(checkpoint), **more)
    assert cut.rankings + rest.rankings == whole.rankings
    assert len({tuple(r.ranks.values()) for r in whole.rankings}) > 1
    of_shortcuts = split(cut.ranks)[1].values()
    assert any(of_shortcuts) and min(of_shortcuts) < R
    if "ranks" in options:
        assert any(0 < rank < R for r in cut.rankings for rank in split(r.ranks)[1].values())
    assert rest.counts == whole.counts and rest.ranks == whole.ranks
    for masks, trainer in ((whole.masks, first), (rest.masks, second)):
        masks.lift(trainer.optimizer)
    found, expected = weights(found), weights(expected)
    assert sum("low_rank_shortcuts" in name for name in expected) == 22
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [t.optimizer.state_dict()["state"] for t in (first, second)]
    # A module that was never on has none.
    assert states[0].keys() == states[1].keys() and len(states[0]) > 14
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())


def test_what_is_off_stays_where_it_was(tmp_path):
    search = DynamicSearchCallback(HALF, proxy="constant", every=0.5)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            step = state.global_step
            seen[step] = (search.ranks, {k: v.clone() for k, v in search.masks.tensors().items()})

    class Zeros(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for shortcut in kwargs["model"].low_rank_shortcuts:
                assert (shortcut.b.grad is None) == (search.ranks[shortcut.name] == 0)
            for parameter in kwargs["model"].parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    model = make_model(shortcuts=True)
    trainer = make_trainer(model, tmp_path, [Zeros(), search, Watch()], num_train_epochs=1)
    trainer.train()
    for step in range(1, 10):
        ranks, parked = seen[step]
        if step != 5:
            assert ranks == seen[step - 1][0] and parked.keys() == seen[step - 1][1].keys()
            assert all(torch.equal(parked[key], seen[step - 1][1][key]) for key in parked)
    on_then_off = [n for n, r in split(seen[0][0])[1].items() if r and not seen[5][0][n]]
    assert on_then_off
    own = {shortcut.name: shortcut for shortcut in model.low_rank_shortcuts}
    for name in on_then_off:
        assert seen[5][1][f"{name}|b"].any()  # it had trained
        assert trainer.optimizer.state[own[name].b]["step"] == 5
    assert search.masks.parked_is_zero()


def test_uniform_warm_up_pays_for_shortcuts(tmp_path):
    seen = {}

    class Trace(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.setdefault(state.global_step, search.ranks)

    late = {"warmup": "uniform", "warmup_epochs": 0.5}
    budgets = (
        # 17 modules: 30 ranks in all pay for rank 1 on each, and not for 2.
        ({"budget": Budget(params=30 * UNIT)}, (1, 1)),
        ({"budget": Budget(params=30 * UNIT), "shortcut_budget": Budget(rank=2)}, (R, 2)),
    )
    for budget, (lora, shortcut) in budgets:
        search = DynamicSearchCallback(**budget, **late, ranks=(0, 1, 2, R), **QUICK)
        seen.clear()
        run(tmp_path, search, shortcuts=True, more=[Trace()], num_train_epochs=1)
        assert [ranking.step for ranking in search.rankings] == [5, 8]
        for step in range(5):
            of_lora, of_shortcuts = split(seen[step])
            assert set(of_lora.values()) == {lora} and set(of_shortcuts.values()) == {shortcut}
    poor = {"budget": HALF, "shortcut_budget": Budget(params=10 * UNIT)}
    search = DynamicSearchCallback(**poor, **late, ranks=(0, 1, R), **QUICK)
    with pytest.raises(BudgetError, match="of 768 and 640 parameters does not pay for rank 1"):
        run(tmp_path, search, shortcuts=True)


def test_a_random_choice_knows_no_scale(tmp_path):
    search = DynamicSearchCallback(HALF, proxy="constant", every=0.1)
    model = make_model(shortcuts=True, alpha=100.0)
    make_trainer(model, tmp_path, [search], num_train_epochs=2).train()
    times = [sum(map(bool, split(r.ranks)[0].values())) for r in search.rankings]
    # 8 of 17, of which 6 are LoRA modules: 2.8 on average; never, or always, all of them if ranked.
    assert len(times) == 20 and 2 < sum(times) / 20 < 4


def test_counts_and_what_is_stored(tmp_path):
    search = DynamicSearchCallback(HALF, proxy="constant", ranks=(0, 1, 4), every=0.5)
    model, _ = run(tmp_path, search, shortcuts=True)
    counts = search.counts
    assert counts.enabled == UNIT * sum(search.ranks.values()) <= 2 * 17 * UNIT
    ever = {n: max(ranking.ranks[n] for ranking in search.rankings) for n in search.ranks}
    assert counts.ever_trained == UNIT * sum(ever.values()) > counts.enabled
    assert {1, 4} <= set(split(search.ranks)[1].values())
    written = save_enabled(model, tmp_path / "cut")
    assert written == {name: rank for name, rank in search.ranks.items() if rank}
    stored = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    numbers = sum(value.numel() for key, value in stored.items() if "lora_" in key)
    stored = load_file(tmp_path / "cut" / "heterolora_shortcuts.safetensors")
    assert counts.stored == numbers + sum(value.numel() for value in stored.values())
    assert {key.rpartition(".")[0] for key in stored} == split(written)[1].keys()
    logits = model.eval()(**BATCH).logits
    loaded = load_adapter(plain_base(), tmp_path / "cut").eval()
    heterolora.unfuse(loaded)
    # The sums run over the same numbers, and zeros.
    torch.testing.assert_close(loaded(**BATCH).logits, logits, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        plain = PeftModel.from_pretrained(plain_base(), str(tmp_path / "cut")).eval()
    assert (plain(**BATCH).logits - logits).abs().max() > 1e-3

    # Nothing is left of the shortcuts' files where none is in use, and stock PEFT is enough.
    off = {n: R if n in search.masks.layers else 0 for n in search.ranks}
    search.masks.apply(off)
    assert save_enabled(model, tmp_path / "cut") == split(off)[0]
    assert not list((tmp_path / "cut").glob("heterolora*"))
    plain = PeftModel.from_pretrained(plain_base(), str(tmp_path / "cut")).eval()
    logits = model(**BATCH).logits
    torch.testing.assert_close(plain(**BATCH).logits, logits, rtol=1e-5, atol=1e-6)
    search.masks.apply({name: R - rank for name, rank in off.items()})
    with pytest.raises(ModelError, match=r"no LoRA layer.*heterolora.save_adapter"):
        save_enabled(model, tmp_path / "cut")
    search.masks.lift()
    with torch.no_grad():
        next(iter(model.low_rank_shortcuts)).b[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match="in-attn: B holds NaN"):
        save_enabled(model, tmp_path / "nan")
    assert not (tmp_path / "nan").exists()


@pytest.mark.parametrize("more", [[], [ShortcutCallback()]], ids=["alone", "both"])
def test_checkpoints_hold_what_the_model_computes(tmp_path, more):
    """Also the best one, whose ranks are not the last ones."""
    search = DynamicSearchCallback(HALF, proxy="constant", every=0.5)
    model, trainer = run(
        tmp_path,
        search,
        shortcuts=True,
        more=more,
        **BEST_AT_END,
    )
    best = Path(trainer.state.best_model_checkpoint)
    last = {r.step: r for r in search.rankings}[15]
    assert int(best.name.split("-")[1]) <= 14 and search.ranks != last.ranks
    logits = model.eval()(**BATCH).logits
    loaded = load_adapter(plain_base(), best).eval()
    torch.testing.assert_close(loaded(**BATCH).logits, logits, rtol=1e-5, atol=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_both_callbacks_are_no_more_than_one(tmp_path):
    options = {"shortcuts": True, "more": [Stop(6)]}
    run(tmp_path, DynamicSearchCallback(HALF, **QUICK), **options)
    results = []
    for callbacks in ([], [ShortcutCallback()]):
        search = DynamicSearchCallback(HALF, **QUICK)
        # Behind the search, and the same before it.
        folder = str(tmp_path / "checkpoint-6")
        model, trainer = run(tmp_path, search, shortcuts=True, more=callbacks, resume=folder)
        search.masks.lift(trainer.optimizer)
        results.append((search.rankings, weights(model)))
    model = make_model(shortcuts=True)
    search = DynamicSearchCallback(HALF, **QUICK)
    callbacks = [ShortcutCallback(), search, heterolora.FuseCallback(backend="aten")]
    trainer = make_trainer(model, tmp_path, callbacks)
    trainer.train(resume_from_checkpoint=folder)
    search.masks.lift(trainer.optimizer)
    results.append((search.rankings, weights(model)))
    for rankings, found in results[1:]:
        assert rankings == results[0][0] and len(rankings) == 4
        assert all(torch.equal(found[name], value) for name, value in results[0][1].items())


def test_graphed_trainer_runs_its_steps_without_graphs(tmp_path):
    from recorder import CpuRecorder

    class Graphed(heterolora.GraphedTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, recorder=CpuRecorder(), **kwargs)

    search = DynamicSearchCallback(HALF, **QUICK)
    _, trainer = run(tmp_path, search, kind=Graphed, num_train_epochs=1, shortcuts=True)
    assert trainer.graph_summary.startswith("a callback changes the model between steps")


def test_refused(tmp_path):
    with pytest.raises(BudgetError, match="shortcut_budget must be a Budget or None, not 3"):
        DynamicSearchCallback(HALF, shortcut_budget=3)
    both = {"budget": HALF, "shortcut_budget": HALF}
    with pytest.raises(BudgetError, match="shortcut_budget is given, and .* no shortcuts"):
        run(tmp_path, DynamicSearchCallback(**both, **QUICK))
    large = {"budget": HALF, "shortcut_budget": Budget(rank=R + 1)}
    with pytest.raises(BudgetError, match=r"rank=5\) is above the largest rank"):
        run(tmp_path, DynamicSearchCallback(**large, **QUICK), shortcuts=True)
    model = make_model()
    heterolora.add_shortcuts(model, rank=R + 1)
    with pytest.raises(ModelError, match=r"shortcut bert\..*:in-attn has rank 5, and .* rank 4"):
        make_trainer(model, tmp_path, [DynamicSearchCallback(HALF, **QUICK)]).train()
    model = make_model(shortcuts=True)
    model.get_base_model().bert.compile()
    with pytest.raises(TrainingError, match=r"no dynamic search under torch\.compile"):
        make_trainer(model, tmp_path, [DynamicSearchCallback(HALF, **QUICK)]).train()
    assert parked_count(model) == 0


def test_resuming_with_other_shortcuts_or_budgets(tmp_path):
    run(tmp_path, DynamicSearchCallback(HALF, **QUICK), shortcuts=True, more=[Stop(6)])
    resume = {"resume": str(tmp_path / "checkpoint-6")}
    search = DynamicSearchCallback(HALF, shortcut_budget=HALF, **QUICK)
    with pytest.raises(TrainingError, match="by a search with parameters=2176, and this one has"):
        run(tmp_path, search, shortcuts=True, **resume)
    same = {"budget": Budget(params=2176), "shortcut_budget": HALF}
    with pytest.raises(TrainingError, match="shortcut_parameters=None, and this one has 1408"):
        run(tmp_path, DynamicSearchCallback(**same, **QUICK), shortcuts=True, **resume)
    for path in (tmp_path / "checkpoint-6").glob("heterolora_shortcuts*"):
        path.unlink()
    with pytest.raises(TrainingError, match="checkpoint-6 has no shortcuts, and the model has"):
        run(tmp_path, DynamicSearchCallback(HALF, **QUICK), shortcuts=True, **resume)
