"""`bench evidence`: runs once, goes on where it stopped, and says what failed."""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from evidence_runs import a_run, entry, save_sick, save_tiny_model

from heterolora.bench import cli
from heterolora.bench.evidence import pool
from heterolora.bench.evidence.pool import Outcome
from heterolora.bench.evidence.store import Store
from heterolora.bench.harness.timing import BenchError
from heterolora.errors import DataError, ModelError

CONFIG = {
    "epochs": {"sick": 1},
    "ranks": [1],
    "arms": ["uniform", "random", "random-onoff"],
    "seeds": [0, 1],
    "learning_rates": [0.001, 0.01],
    "batch_size": 8,
    "scoring_batches": 1,
}
# Two families at two rates with one seed, then three arms with two seeds.
CHOOSING, FINAL = 4, 6


@pytest.fixture
def given(tmp_path):
    """(folder of the data, configuration file, folder of the results)."""
    data = save_sick(tmp_path / "data")
    model = save_tiny_model(tmp_path / "model")
    path = tmp_path / "quick.json"
    path.write_text(json.dumps({**CONFIG, "model": str(model)}))
    return data, path, tmp_path / "out"


def command(*words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args([str(word) for word in words]))


def arguments(given, *more):
    data, path, out = given
    return ["evidence", path, "--data", data, "--out", out, *more]


@pytest.fixture
def done(monkeypatch):
    """Runs that were worked off, by a stand-in for the worker processes."""
    names = []

    def work_off(runs, data, workers):
        for run in runs:
            names.append(run.name)
            loss = run.learning_rate
            result = entry(run.arm, run.seed, loss, seconds={"wall": 1.0, "cpu": 1.0})["result"]
            yield Outcome(run, result)

    monkeypatch.setattr(pool, "work_off", work_off)
    return names


def files(out):
    return sorted(str(path.relative_to(out)) for path in out.rglob("*.json"))


def test_every_run_is_done_once_and_kept(given, done, capsys):
    assert command(*arguments(given)) == 0
    assert len(done) == len(set(done)) == CHOOSING + FINAL
    out = given[2]
    assert "test/sick/random-onoff/rank1-seed1-lr0.001.json" in files(out)
    assert "choice/sick/rank1-on-off.json" in files(out)
    assert len(files(out)) == CHOOSING + FINAL + 2
    choice = json.loads((out / "choice/sick/rank1-uniform.json").read_text())
    assert (choice["learning_rate"], choice["arm"]) == (0.001, "uniform")
    assert choice["losses"] == {"0.001": 0.001, "0.01": 0.01} and choice["at_edge"]
    # One line a run on stderr, and where it stands.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == CHOOSING + FINAL and lines[-1].startswith("[6/6, ")

    kept = json.loads((out / "test/sick/uniform/rank1-seed0-lr0.001.json").read_text())
    assert kept["schema"] == 1 and kept["run"]["recipe"]["batch_size"] == 8
    assert kept["environment"]["workers"] == 2
    assert str(given[0]) not in json.dumps(kept["environment"])

    done.clear()
    assert command(*arguments(given)) == 0
    assert done == []
    (out / "test/sick/random/rank1-seed1-lr0.001.json").unlink()
    assert command(*arguments(given)) == 0
    assert done == ["test/sick/random/rank1-seed1-lr0.001"]


def test_two_commands_do_not_share_a_folder(given, done):
    with (
        Store(given[2]).locked(),
        pytest.raises(BenchError, match="another `bench evidence` is at work on this folder"),
    ):
        command(*arguments(given))
    assert not done
    assert command(*arguments(given)) == 0


def test_a_folder_that_cannot_be_written_is_named(given, done):
    given[2].write_text("a file")
    with pytest.raises(BenchError, match="out: cannot be written"):
        command(*arguments(given))
    assert not done


def test_only_some_arms(given, done):
    assert command(*arguments(given, "--only", "random")) == 0
    # The family's rate is chosen by its own arm.
    assert {name.split("/")[2] for name in done} == {"uniform", "random"}
    assert sum(name.startswith("test/") for name in done) == 2
    with pytest.raises(BenchError, match="--only eva: the configuration has uniform, random"):
        command(*arguments(given, "--only", "eva"))


def test_the_model_is_named_on_the_command_line(given, done, tmp_path):
    other = save_tiny_model(tmp_path / "other")
    assert command(*arguments(given, "--model", other)) == 0
    (kept, *_) = (given[2] / "test").rglob("*.json")
    assert json.loads(kept.read_text())["run"]["recipe"]["model"] == str(other)
    # Results of one model are not taken for those of another.
    with pytest.raises(BenchError, match="other settings"):
        command(*arguments(given))


def test_list_runs_nothing(given, done, capsys):
    assert command("evidence", given[1], "--list") == 0
    assert done == []
    assert f"{FINAL} runs, and {CHOOSING} to choose" in capsys.readouterr().out


def test_results_of_other_settings_are_not_taken_for_these(given, done):
    assert command(*arguments(given)) == 0
    data, path, out = given
    path.write_text(json.dumps({**json.loads(path.read_text()), "batch_size": 16}))
    with pytest.raises(BenchError, match=r"other settings \(batch_size 8, not 16\)"):
        command(*arguments(given))


def test_a_failed_run_is_named_and_the_others_are_done(given, monkeypatch, done, capsys):
    whole = pool.work_off

    def work_off(runs, data, workers):
        for outcome in whole(runs, data, workers):
            failed = outcome.run.arm == "random" and outcome.run.purpose == "test"
            yield Outcome(outcome.run, None, "no luck") if failed else outcome

    monkeypatch.setattr(pool, "work_off", work_off)
    assert command(*arguments(given)) == 1
    assert "failed: test/sick/random/rank1-seed0-lr0.001: no luck" in capsys.readouterr().err
    assert len(list((given[2] / "test").rglob("*.json"))) == FINAL - 2


def test_an_unsettled_family_is_left_out_and_the_others_are_done(given, monkeypatch, done, capsys):
    whole = pool.work_off

    def work_off(runs, data, workers):
        for outcome in whole(runs, data, workers):
            failed = outcome.run.arm == "random-onoff" and outcome.run.learning_rate == 0.01
            yield Outcome(outcome.run, None, "no luck") if failed else outcome

    monkeypatch.setattr(pool, "work_off", work_off)
    assert command(*arguments(given)) == 1
    assert "rank1-on-off is not settled" in capsys.readouterr().err
    assert not (given[2] / "test/sick/random-onoff").exists()
    assert (given[2] / "test/sick/random").exists()


def test_requests_that_make_no_sense(given, done, tmp_path):
    data, path, out = given
    with pytest.raises(BenchError, match="needs --data"):
        command("evidence", path, "--out", out)
    with pytest.raises(BenchError, match="give a configuration"):
        command("evidence", "--data", data, "--out", out)
    with pytest.raises(BenchError, match="--workers must be at least 1"):
        command(*arguments(given, "--workers", 0))
    with pytest.raises(DataError, match="no folder 'sick'"):
        command("evidence", path, "--data", tmp_path, "--out", out)
    with pytest.raises(BenchError, match="no results"):
        command("evidence", "--report", tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        command(*arguments(given, "--model", tmp_path / "none"))
    llama = save_tiny_model(tmp_path / "llama", "llama")
    with pytest.raises(ModelError, match="task sick adapts .* a BERT encoder"):
        command(*arguments(given, "--model", llama))
    decoder = {**CONFIG, "epochs": {"alpaca-en-demo": 1}, "arms": ["uniform", "spectral-warm"]}
    path.write_text(json.dumps(decoder))
    with pytest.raises(BenchError, match="task alpaca-en-demo .* arms need: spectral-warm;"):
        command(*arguments(given))
    assert done == []


def test_report_is_made_of_the_files(given, done, tmp_path, capsys):
    assert command(*arguments(given)) == 0
    capsys.readouterr()
    assert command("evidence", "--report", given[2]) == 0
    text = capsys.readouterr().out
    assert "| random-onoff | 100 | 2 |" in text
    assert command("evidence", "--report", given[2], "--markdown", tmp_path / "t.md") == 0
    assert (tmp_path / "t.md").read_text() == text


def test_store_refuses_what_is_no_result(tmp_path):
    store, run = Store(tmp_path), a_run("m")
    path = tmp_path / f"{run.name}.json"
    assert store.result(run) is None
    path.parent.mkdir(parents=True)
    for text, message in (("{", "delete it"), ("[]", "not a result"), ("schema", "schema 2")):
        found = {"schema": 2, "run": {}, "result": {}, "environment": {}}
        path.write_text(json.dumps(found) if text == "schema" else text)
        with pytest.raises(BenchError, match=message):
            store.result(run)
    whole = {**entry("uniform", 0, 1.0), "run": run.as_json()}
    for part, key in (("run", "recipe"), ("result", "diverged")):
        lacking = {**whole, part: {k: v for k, v in whole[part].items() if k != key}}
        path.write_text(json.dumps(lacking))
        with pytest.raises(BenchError, match=f"'{key}' is missing in it; delete it"):
            store.result(run)
    newer = {**run.as_json(), "recipe": {**run.as_json()["recipe"], "packing": True}}
    path.write_text(json.dumps({**whole, "run": newer}))
    with pytest.raises(BenchError, match=r"other settings \(packing True, not None\)"):
        store.result(run)
    path.write_text(json.dumps(whole))
    assert store.result(run) == whole["result"]
    # What is not finite has no place in JSON, and leaves nothing behind.
    path.unlink()
    with pytest.raises(ValueError, match="JSON"):
        store.save(run, {"loss": float("nan")}, {})
    assert files(tmp_path) == []


def start(given):
    return subprocess.Popen(
        [sys.executable, "-m", "heterolora.bench", *map(str, arguments(given))],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.slow
def test_worker_processes_train_and_an_interrupted_command_goes_on(given):
    out = given[2]
    first = start(given)
    try:
        deadline = time.monotonic() + 300
        while not list(out.rglob("rank*seed*.json")):
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        errors = first.communicate(timeout=60)[1]
    finally:
        # It, and its workers if it left any.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 130
    assert "run the same command again" in errors
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("rank*seed*.json")}
    assert 0 < len(kept) < CHOOSING + FINAL

    second = start(given)
    errors = second.communicate(timeout=300)[1]
    assert second.returncode == 0, errors
    assert len(list(out.rglob("rank*seed*.json"))) == CHOOSING + FINAL
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in (out / "test").rglob("*.json"):
        found = json.loads(path.read_text())
        assert found["result"]["steps"] == 6
    assert not list(out.rglob("*.partial"))


@pytest.mark.slow
def test_a_worker_that_dies_is_reported_with_its_run(given, monkeypatch):
    data, path, _ = given
    model = json.loads(path.read_text())["model"]
    # Far more epochs than it lives to see.
    runs = [a_run(model, epochs=1e6), a_run(model, seed=1)]
    outcomes = pool.work_off(runs, data, workers=2)
    first = next(outcomes)
    assert (first.run.seed, first.error) == (1, "") and first.result["steps"] == 12
    for process in multiprocessing.active_children():
        process.kill()
    (last,) = outcomes
    assert last.run.seed == 0 and last.result is None
    assert last.error == "its process ended with -9"


@pytest.mark.slow
def test_a_worker_that_dies_between_two_runs_loses_neither(given, monkeypatch):
    data, path, _ = given
    model = json.loads(path.read_text())["model"]
    really = pool.wait

    def wait(connections):
        ready = really(connections)
        # After it has sent its result, before it is sent another run.
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        return ready

    monkeypatch.setattr(pool, "wait", wait)
    first, second = pool.work_off([a_run(model), a_run(model, seed=1)], data, workers=1)
    assert (first.run.seed, first.error, first.result["steps"]) == (0, "", 12)
    assert (second.run.seed, second.result, second.error) == (1, None, "no worker process is left")
