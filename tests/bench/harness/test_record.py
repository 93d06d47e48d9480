"""Result files: what is written is what is read, and a malformed file is one clear error."""

import json

import pytest
import torch
from bench_runs import environment as made_up
from bench_runs import red, result, trained

from heterolora.bench.harness.record import (
    SCHEMA_VERSION,
    BenchRun,
    CaseResult,
    environment,
    read_run,
    slug,
    write_run,
)
from heterolora.bench.harness.timing import BenchError

SAMPLES = {"peft": [0.010, 0.010, 0.012], "fused": [0.008, 0.006, 0.0084]}


def green() -> CaseResult:
    return result("toy-fp32-uniform", "model", SAMPLES, failed={"compile-fused": "no compiler"})


def run_of(*results: CaseResult) -> BenchRun:
    return BenchRun(made_up(), list(results))


def test_round_trip(tmp_path):
    measured = run_of(green(), red())
    write_run(measured, tmp_path / "deeper" / "run.json")
    assert read_run(tmp_path / "deeper" / "run.json") == measured


def test_environment_says_what_was_run_where_but_not_the_host():
    found = environment(torch.device("cpu"), ["--case", "toy"])
    assert found["command"] == "heterolora bench --case toy"
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert found["threads"] == torch.get_num_threads()
    assert found.keys() == {
        "versions",
        "device",
        "device_type",
        "cpu",
        "cpu_capability",
        "threads",
        "platform",
        "commit",
        "date",
        "command",
    }
    assert environment(torch.device("cpu"), ["bench", "--quick"])["command"].endswith("h --quick")


def broken(change) -> str:
    content = json.loads(_text(run_of(green())))
    change(content)
    return json.dumps(content)


def _text(measured: BenchRun) -> str:
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        write_run(measured, Path(folder) / "x.json")
        return (Path(folder) / "x.json").read_text()


def first(content):
    return content["results"][0]


MALFORMED = {
    "not JSON": (lambda: "{", "not valid JSON"),
    "a list": (lambda: "[]", "not a result of"),
    "of something else": (lambda: '{"kind": "other"}', "not a result of"),
    "newer schema": (
        lambda: broken(lambda c: c.update(schema_version=SCHEMA_VERSION + 1)),
        f"schema version {SCHEMA_VERSION + 1}",
    ),
    "no results": (lambda: broken(lambda c: c.pop("results")), "results: missing"),
    "no environment": (lambda: broken(lambda c: c.pop("environment")), "environment: missing"),
    "result is text": (lambda: broken(lambda c: c.update(results=["x"])), "expected an object"),
    "no tokens": (lambda: broken(lambda c: first(c).pop("tokens")), "tokens: missing"),
    "tokens is text": (
        lambda: broken(lambda c: first(c).update(tokens="64")),
        "tokens: expected int, found str",
    ),
    "parity incomplete": (
        lambda: broken(lambda c: first(c)["parity"].pop("rule")),
        "parity: missing or unknown rule",
    ),
    "memory of text": (
        lambda: broken(lambda c: first(c)["memory"]["peft"].update(peak="1")),
        "memory.peft.peak: expected int, found str",
    ),
    "speed on a red gate": (
        lambda: broken(lambda c: first(c)["parity"].update(green=False)),
        "exactly when its parity is green",
    ),
    "rounds differ": (
        lambda: broken(lambda c: first(c)["timing"]["seconds"]["fused"].pop()),
        "one value a round",
    ),
    "time is null": (
        lambda: broken(lambda c: first(c)["timing"]["seconds"]["fused"].append(None)),
        "expected a list of seconds",
    ),
    "baseline not timed": (
        lambda: broken(lambda c: first(c)["timing"]["seconds"].pop("peft")),
        "'peft' in it",
    ),
    "zero baseline": (
        lambda: broken(lambda c: first(c)["timing"]["seconds"].update(peft=[0.0, 1.0, 1.0])),
        "must be positive",
    ),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files(tmp_path, what):
    text, message = MALFORMED[what]
    path = tmp_path / "bad.json"
    path.write_text(text())
    with pytest.raises(BenchError, match=message) as caught:
        read_run(path)
    assert str(path) in str(caught.value)


def training_file(tmp_path, change):
    """A file of one train case after `change` of that result."""
    case = trained("train-toy-fp32", {name: [[1.0, 0.5]] * 2 for name in ("peft", "fused")})
    path = tmp_path / "train.json"
    write_run(run_of(case), path)
    content = json.loads(path.read_text())
    change(first(content))
    path.write_text(json.dumps(content))
    return case, path


def test_training_is_read_back_and_may_be_absent_from_older_files(tmp_path):
    case, path = training_file(tmp_path, lambda item: None)
    assert read_run(path).results == [case]
    write_run(run_of(green()), path)
    content = json.loads(path.read_text())
    del first(content)["training"]
    path.write_text(json.dumps(content))
    assert read_run(path).results == [green()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda item: item.pop("training"), "training: a green train case has it, and no other"),
        (lambda item: item.update(kind="model"), "training: a green train case has it"),
        (lambda item: item["training"].pop("rank"), "training: missing or unknown rank"),
        (lambda item: item["training"].update(steps=1.5), "training.steps: expected int"),
        (lambda item: item["training"]["losses"].pop("fused"), "training.losses: expected the var"),
        (lambda item: item["training"]["losses"]["fused"].pop(), "fused: expected a list of 2 los"),
        (lambda item: item["training"]["losses"]["peft"][0].pop(), "peft: expected a list of 2"),
        (lambda item: item["training"]["losses"]["peft"][0].append(None), "for each of 2 rounds"),
    ],
)
def test_malformed_training(tmp_path, change, message):
    _, path = training_file(tmp_path, change)
    with pytest.raises(BenchError, match=message):
        read_run(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(BenchError, match="cannot be read"):
        read_run(tmp_path / "nothing.json")


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R)") == "intel-r-xeon-r"


def test_the_command_of_a_record_names_no_path():
    argv = ["bench", "--case", "a b", "--out", "/home/me/x", "--json=/home/me/y", "--rounds", "3"]
    found = environment(torch.device("cpu"), argv)
    assert found["command"] == "heterolora bench --case 'a b' --rounds 3"
