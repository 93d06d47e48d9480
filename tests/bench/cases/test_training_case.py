"""The train cases: every arm goes through `train`, the gate can turn red, and rounds are paired."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import default_collate

import heterolora
from heterolora.bench import runner
from heterolora.bench.cases import follow, reviews, training
from heterolora.bench.cases import registry as cases
from heterolora.bench.cases.training import ArmRun, TrainRecipe
from heterolora.bench.harness.parity import Parity
from heterolora.bench.harness.record import BenchRun, environment, read_run, write_run
from heterolora.bench.harness.timing import BenchError

CPU = torch.device("cpu")
TINY = cases.CASES["train-tiny-4x16-fp32"]
RECIPE = TrainRecipe(steps=4, untimed=1, gate_steps=3, scoring_batches=1)
GREEN = Parity(True, "", "gradients", 0.0, 0.0)


@pytest.fixture(autouse=True)
def everything_fused(monkeypatch):
    """Dispatch would leave layers as small as these to PEFT."""
    fused = SimpleNamespace(path="aten", reason="for the test")
    monkeypatch.setattr("heterolora.fusion.call.quickest", lambda *_, **__: fused, raising=False)


@pytest.fixture(scope="module")
def load():
    return TINY.build(torch.float32, CPU)


@pytest.fixture
def plan(load):
    return training.search(load, RECIPE)


def test_rows_are_the_reviews_at_one_length(load):
    path = Path(heterolora.__file__).parent / "demo" / "reviews" / "train.tsv"
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    assert len(load.rows) == len(lines)
    for row, line in zip(load.rows[:50], lines[:50], strict=True):
        text, _, label = line.rpartition("\t")
        kept = text.encode()[:16]
        assert bytes(row["input_ids"][row["attention_mask"].bool()].tolist()) == kept
        assert {len(row["input_ids"]), len(row["attention_mask"])} == {16}
        assert int(row["labels"]) == (label == "positive")
    assert torch.equal(load.inputs["input_ids"], default_collate(load.rows[:4])["input_ids"])
    assert load.tokens == 64 and load.layers == 2 and load.weights == reviews.RANDOM


def test_minilm_has_its_own_weights_where_they_are_installed(monkeypatch):
    sizes = cases.CASES["train-minilm-32x32-fp32"].shapes

    def absent():
        raise heterolora.errors.ModelError("not installed")

    monkeypatch.setattr(reviews, "embedded_minilm", absent)
    load = reviews.minilm(**sizes, dtype=torch.float32, device=CPU)
    assert load.weights == reviews.RANDOM
    monkeypatch.undo()
    try:
        reviews.embedded_minilm()
    except heterolora.errors.ModelError:
        pytest.skip("the package with MiniLM's weights is not installed")
    real = reviews.minilm(**sizes, dtype=torch.float32, device=CPU)
    assert real.weights == "all-MiniLM-L6-v2"
    assert list(real.targets) == list(load.targets) and real.targets == load.targets
    assert real.tokens == load.tokens == 1024
    assert len(real.rows) >= 32 * training.TrainRecipe().steps
    assert not [m for m in real.model.modules() if isinstance(m, torch.nn.Dropout) and m.p]


def test_batches_are_as_long_as_their_longest_row():
    sizes = {**TINY.shapes, "length": 64}
    load = reviews.classifier(**sizes, padded=False, dtype=torch.float32, device=CPU)
    even = reviews.classifier(**sizes, dtype=torch.float32, device=CPU)
    lengths = [len(row["input_ids"]) for row in load.rows]
    assert len(set(lengths)) > 20 and max(lengths) == 64
    assert all(row["attention_mask"].all() for row in load.rows)
    for start in (0, 4, 8):
        batch, whole = (reviews.to_longest(one.rows[start : start + 4]) for one in (load, even))
        longest = max(lengths[start : start + 4])
        assert batch["input_ids"].shape == (4, longest) == batch["attention_mask"].shape
        for name in ("input_ids", "attention_mask"):
            assert torch.equal(batch[name], whole[name][:, :longest])
            assert not whole[name][:, longest:].any()
        assert torch.equal(batch["labels"], whole["labels"])


@pytest.mark.slow
def test_a_case_end_to_end(tmp_path):
    case = dataclasses.replace(TINY, recipe=RECIPE)
    result = runner.run_case(case, device=CPU, rounds=2)
    assert result.green, result.parity
    assert "12 of 12 adapters of fused-uniform through the op" in result.parity.rule
    assert "gradient" not in result.parity.reason and result.parity.gradient > 0
    trained = result.training
    assert list(result.timing.seconds) == list(training.ARMS) == list(trained.losses)
    assert all(value > 0 for values in result.timing.seconds.values() for value in values)
    # 12 linears of 64 and 256 features at rank 8, and the head.
    uniform = 8 * 2 * (4 * 128 + 2 * 320) + 64 * 2 + 2
    assert trained.parameters["peft"] == trained.parameters["fused-uniform"] == uniform
    assert trained.parameters["fused"] == trained.parameters["peft-searched"]
    assert 0.99 * uniform <= trained.parameters["fused"] <= uniform
    adapters = sum(rank > 0 for rank in result.ranks.values())
    assert trained.through_op == {
        "peft": 0,
        "fused": adapters,
        "peft-searched": 0,
        "fused-uniform": 12,
    }
    for one, other in (("peft", "fused-uniform"), ("peft-searched", "fused")):
        assert trained.losses[one][0] != trained.losses[one][1], "two seeds, one curve"
        for mine, theirs in zip(trained.losses[one], trained.losses[other], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5) and len(mine) == 4
    for used in result.memory.values():
        assert used.resident > 0 and used.peak > used.saved > 0
    assert result.launches["fused"] < result.launches["peft-searched"]
    path = tmp_path / "x.json"
    write_run(BenchRun(environment(CPU, []), [result]), path)
    assert read_run(path).results == [result]


def test_what_is_recorded_is_what_trainer_saw(plan, tmp_path):
    from heterolora.bench.cases.recorder import StepRecorder
    from heterolora.train.run import train

    steps = iter(range(100))

    class Ticks:
        clock = "ticks"

        def start(self):
            self.began = next(steps)

        def stop(self):
            return 30.0 * (next(steps) - self.began), 60.0

    recorder = StepRecorder(1, Ticks())
    model = training._adapted(plan, "fused", 0)
    done = train(
        model, training._data(plan.load), output_dir=tmp_path / "run", max_steps=4, batch_size=4,
        callbacks=[recorder],
    )  # fmt: skip
    losses = torch.stack(recorder.losses)
    assert len(losses) == 4 and not model._forward_hooks
    assert losses.mean().item() == pytest.approx(done.metrics["train_loss"], rel=1e-6)
    assert recorder.seconds == (10.0, 20.0)


def test_rounds_alternate_and_share_their_seed(plan, monkeypatch):
    seen = []

    def run(plan, name, *, seed):
        seen.append((name, seed))
        return ArmRun([0.5 + seed] * 4, (1.0 + len(seen), 2.0), [], torch.float32)

    monkeypatch.setattr(training, "train_arm", run)
    timing, trained = training.measure_time(plan, 2, CPU)
    names = list(training.ARMS)
    assert seen == [(name, 0) for name in names] + [(name, 1) for name in reversed(names)]
    assert timing.clock == "process CPU time"
    assert timing.seconds == {name: [2.0 + i, 9.0 - i] for i, name in enumerate(names)}
    assert timing.wall_seconds == {name: [2.0, 2.0] for name in names}
    assert trained.losses == {name: [[0.5] * 4, [1.5] * 4] for name in names}


def test_gate_is_red_when_nothing_was_fused(plan, monkeypatch):
    monkeypatch.setattr(
        "heterolora.train.callbacks.fuse", lambda model, **_: heterolora.FuseReport()
    )
    found = follow.losses_follow(plan, GREEN)
    assert not found.green
    assert found.reason.startswith("not fused: 0 of ") and found.reason.endswith("step of fused")


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_gate_is_red_when_losses_part(plan, monkeypatch, factor):
    adapted = training._adapted

    def scaled(plan, name, seed):
        model = adapted(plan, name, seed)
        if training.ARMS[name].fused:
            layer = model.base_model.model.bert.encoder.layer[0].attention.self.value
            layer.scaling["default"] *= factor
        return model

    monkeypatch.setattr(training, "_adapted", scaled)
    found = follow.losses_follow(plan, GREEN)
    assert found.green == (factor == 1.0), found
    if factor == 1.0:
        assert found.rule.endswith("; gradients") and found.gradient == 0.0
    else:
        assert found.reason.startswith("parity: losses ")


@pytest.mark.parametrize(("off", "green"), [(0.19, True), (0.21, False)])
def test_in_bfloat16_the_limit_is_pefts_own_error(monkeypatch, off, green):
    plan = training.search(TINY.build(torch.bfloat16, CPU), RECIPE)
    asked = []
    theirs = {None: [2.0, 1.1], torch.float32: [2.0, 1.0]}

    def run(plan, name, *, steps, counted=False, dtype=None):
        asked.append((name, dtype))
        losses = [2.0, 1.0 + off] if name == "fused-uniform" else theirs[dtype]
        return ArmRun(losses, (1.0, 1.0), [training.through_op(plan, name)] * steps, torch.bfloat16)

    monkeypatch.setattr(follow, "train_arm", run)
    found = follow.losses_follow(plan, GREEN)
    assert found.green == green, found
    assert set(asked) == {
        ("fused", None), ("fused-uniform", None), ("peft", None), ("peft", torch.float32)
    }  # fmt: skip


def test_causal_language_models_are_trained_on_packed_bytes():
    sizes = {"layers": 1, "hidden": 32, "ffn": 64, "heads": 2, "kv_heads": 1}
    load = reviews.language(batch=2, length=64, dtype=torch.bfloat16, device=CPU, **sizes)
    text = b"".join(bytes(row["input_ids"].tolist()) for row in load.rows[:3])
    assert text.startswith(b"In all fairness, I must report that the children of varying ages")
    assert all(row["labels"] is row["input_ids"] for row in load.rows)
    plan = training.search(load, RECIPE)
    wide = training.train_arm(plan, "peft", steps=2, dtype=torch.float32)
    run = training.train_arm(plan, "fused", counted=True)
    assert len(run.losses) == 4 and min(run.losses) > 0 and run.seconds[0] > 0
    assert set(run.adapters_run) == {training.through_op(plan, "fused")} != {0}
    # From the same first weights: adapters of a bfloat16 model start as rounded as its own.
    assert wide.losses[0] == pytest.approx(run.losses[0], rel=2**-8)
    assert wide.losses != run.losses[:2]


def test_unequal_parameters_are_refused(load, monkeypatch):
    def allocate(model, feed, *, budget, space, seed):
        return heterolora.search.uniform(model, budget.rank + 1, space)

    monkeypatch.setattr("heterolora.search.allocate", allocate)
    with pytest.raises(BenchError, match="20736 parameters, the uniform one 18432"):
        training.search(load, RECIPE)


def test_more_steps_than_rows_are_refused(load):
    with pytest.raises(BenchError, match="321 steps of 4 rows are more than the 1280 rows"):
        training.search(load, dataclasses.replace(RECIPE, steps=321))


def test_a_gpu_cannot_be_passed_by(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BenchError, match="`train` runs on cuda:0, not on cpu"):
        training.check_device(CPU)
    training.check_device(torch.device("cuda"))
    assert not TINY.on_cpu


def test_the_gates_batch_fits_in_float64(load):
    assert follow.gate_load(load).inputs["input_ids"].shape == (4, 16)
    ids = torch.ones(8, 1024)
    long = dataclasses.replace(load, inputs={"input_ids": ids}, tokens=8192)
    cut = follow.gate_load(long)
    assert cut.inputs["input_ids"].shape == (1, 1024) and cut.tokens == 1024
    hidden = dataclasses.replace(load, inputs={"hidden_states": torch.ones(8192, 16)})
    assert follow.gate_load(hidden) is hidden
