"""Result files: what is written is what is read, and a malformed file is one clear error."""

import json

import pytest
import torch

from heterolora.bench.harness import BenchError, Timing
from heterolora.bench.memory import MemoryUse
from heterolora.bench.parity import Parity
from heterolora.bench.record import (
    SCHEMA_VERSION,
    BenchRun,
    CaseResult,
    environment,
    read_run,
    slug,
    write_run,
)
from heterolora.bench.report import markdown_table, read_folder


def green(case: str = "toy-fp32-uniform") -> CaseResult:
    seconds = {
        "peft": [0.010, 0.010, 0.012],
        "fused": [0.008, 0.006, 0.0084],
        "base-only": [0.005, 0.005, 0.006],
    }
    return CaseResult(
        case=case,
        description="a toy",
        shapes={"hidden": 8},
        dtype="fp32",
        ranks={"layers.0.q_proj": 8, "layers.0.o_proj": 0},
        tokens=64,
        parity=Parity(True, "", "relative difference to PEFT, limit 1e-05", 0.0, 1e-7),
        timing=Timing("process CPU time", "peft", seconds, seconds),
        memory={name: MemoryUse(3_000_000, 1_000_000, 64_000) for name in seconds},
        failed={"compile-fused": "no compiler"},
    )


def red() -> CaseResult:
    return CaseResult(
        "toy-bf16-uniform", "a toy", {}, "bf16", {}, 64, Parity(False, "not fused: 2 of 2")
    )


def run_of(*results: CaseResult) -> BenchRun:
    return BenchRun(environment(torch.device("cpu"), ["--case", "toy"]), list(results))


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


def test_markdown_has_ratios_floor_memory_and_the_red_case_without_a_number(tmp_path):
    write_run(run_of(green(), red()), tmp_path / "cpu" / "run.json")
    text = markdown_table(read_folder(tmp_path))
    row = next(line for line in text.splitlines() if "| fused |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Ratios 0.8, 0.6, 0.7 to PEFT and 1.6, 1.2, 1.4 to the floor; 64 000 bytes for 64 tokens.
    want = ["toy-fp32-uniform", "fused", "8.0", "0.700", "0.65-0.75", "0.60", "1.40", "4.0"]
    assert cells == [*want, "1,000"]
    assert "toy-bf16-uniform: red, not timed. not fused: 2 of 2" in text
    assert "compile-fused: no compiler" in text


def test_folder_joins_files_of_one_environment(tmp_path):
    measured = run_of(green("a"), green("b"))
    for result in measured.results:
        write_run(BenchRun(measured.environment, [result]), tmp_path / f"{result.case}.json")
    other = run_of(green("c"))
    other.environment["device"] = "another"
    write_run(other, tmp_path / "z.json")
    runs = read_folder(tmp_path)
    assert [[result.case for result in run.results] for run in runs] == [["a", "b"], ["c"]]


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
        "schema version 2",
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


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(BenchError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(BenchError, match="no result files"):
        read_folder(tmp_path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_run(tmp_path / "nothing.json")


def test_slug():
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert slug("Intel(R) Xeon(R)") == "intel-r-xeon-r"
