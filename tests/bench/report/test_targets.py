"""Bars, what bounds them and what is expected come from the model; measured is measured only."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from bench_runs import environment, full_run, result

from heterolora.bench import cli
from heterolora.bench.cases import peers
from heterolora.bench.cases.registry import CASES
from heterolora.bench.harness.record import BenchRun
from heterolora.bench.harness.work import minimum
from heterolora.bench.report.measures import read_folder
from heterolora.bench.report.readme import TARGETS_BLOCK, update
from heterolora.bench.report.targets import NOT_MEASURED, TARGETS, targets_table

ROOT = Path(__file__).resolve().parents[3]
D4096 = "op-4096x4096-m8192-r16-bf16"


def target(part: str):
    (found,) = (t for t in TARGETS if part in t.name)
    return found


def rows(runs) -> list[list[str]]:
    lines = targets_table(runs).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def gpu_run(*results, **ceilings) -> BenchRun:
    found = environment(device="A GPU", device_type="cuda")
    found["ceilings"] |= ceilings
    return BenchRun(found, list(results))


def test_the_page_is_what_the_results_say():
    """If this fails: `heterolora bench report --readme docs/gpu.md`."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert re.findall(r"<!-- bench:(\S+) -->", text) == [TARGETS_BLOCK]
    assert text == update(text, read_folder(ROOT / "bench" / "results"))


def test_report_prints_the_targets(capsys):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    assert cli.run(parser.parse_args(["report"])) == 0
    table = targets_table(read_folder(ROOT / "bench" / "results"))
    assert table in capsys.readouterr().out


def test_targets_name_cases_and_variants_of_the_bench():
    for one in TARGETS:
        assert set(one.cases) <= CASES.keys(), one.name
        assert all(set(one.variants) <= set(CASES[name].variants) for name in one.cases), one.name
        assert set(one.variants) <= peers.VARIANTS.keys()
        better = one.goal is None or (one.goal > one.must) == one.least
        assert better, one.name


def test_without_a_gpu_nothing_is_measured():
    for runs in ([], [full_run()]):
        assert [row[-1] for row in rows(runs)] == [NOT_MEASURED] * len(TARGETS)


def test_measured_ratios_stand_in_a_column_of_their_gpu():
    seconds = {"peft": [0.012, 0.012], "fused": [0.008, 0.008], "base-only": [0.007, 0.007]}
    mixed, uniform = target("mixed ranks").cases
    slower = {**seconds, "fused": [0.0084, 0.0084]}
    run = gpu_run(
        result(D4096, "op", {**seconds, "aten": [0.00816, 0.00816]}, dtype="bf16"),
        result(uniform, "group", seconds, dtype="bf16"),
        result(mixed, "group", slower, dtype="bf16"),
        expand={"4096x4096-m8192-r16": [1.0e-3, 1.02e-3]},
    )
    found = {row[0]: row[-1] for row in rows([run, full_run()])}
    assert found.pop(target("expand /").name) == "1.02, holds"
    assert found.pop("forward and backward / frozen, d = 4096") == "1.14, holds"
    assert found.pop("PEFT eager / fused, d = 4096") == "1.50, holds"
    assert found.pop(target("addmm").name) == "1.02, missed"
    assert found.pop(target("q, k, v in one").name) == "1.14, missed"
    assert found.pop(target("mixed ranks").name) == "1.05, missed"
    assert set(found.values()) == {NOT_MEASURED}
    head = targets_table([run]).splitlines()[0]
    assert head.endswith("| measured, A GPU |")


def test_the_floor_is_the_least_work_at_the_ceilings_of_the_run():
    """One pass of x more and 1.5 r (k + n) / (k n) more FLOPs."""
    seconds = {"peft": [0.012], "fused": [0.008], "base-only": [0.007]}
    shapes = {"proj": (4096, 4096)}
    work = minimum([["proj"]], shapes, {"proj": 16}, tokens=8192, itemsize=2)
    measured = dataclasses.replace(result(D4096, "op", seconds, dtype="bf16"), work=work)
    # Bound by FLOPs: as many more as LoRA's are.
    run = gpu_run(measured, flops={"fp32": 1e12, "bf16": 1e12}, bandwidth=1e15)
    assert work.floor(1e12, 1e15) == pytest.approx(1 + 1.5 * 16 * 8192 / 4096**2)
    # Bound by bytes: x once more, and the factors.
    assert work.floor(1e18, 1e12) == pytest.approx(work.bytes / work.base_bytes)
    name = "forward and backward / frozen, d = 4096"
    (row,) = (row for row in rows([run]) if row[0] == name)
    assert row[-2:] == ["1.01", "1.14, holds"]
    head = targets_table([run]).splitlines()[0]
    assert head.endswith("| floor, A GPU | measured, A GPU |")
