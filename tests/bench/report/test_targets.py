"""Bars, what bounds them and what is expected come from the model; measured is measured only."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest
from bench_runs import environment, full_run, result

from heterolora.bench import cli, losses, predict
from heterolora.bench.cases import peers
from heterolora.bench.cases.registry import CASES
from heterolora.bench.gpu import targets
from heterolora.bench.gpu.targets import NOT_MEASURED, TARGETS, targets_table
from heterolora.bench.harness.record import BenchRun
from heterolora.bench.report.measures import read_folder
from heterolora.bench.report.readme import update
from heterolora.kernels.cost import LowRank, Problem, estimate, load_of
from heterolora.kernels.cost_steps import peft_steps
from heterolora.kernels.devices import Device, device_for

ROOT = Path(__file__).resolve().parents[3]
H100 = device_for(targets.DEVICE)
D4096 = "op-4096x4096-m8192-r16-bf16"
# The two ceilings that the reference arithmetic is for: sustained on an H100.
SUSTAINED = Device.measured("sustained", flops=700e12, bandwidth=3.0e12, gap=0.0, host=5e-6)


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


def test_the_page_is_what_the_model_and_the_results_say():
    """If this fails: `heterolora bench report --readme docs/gpu.md`."""
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"<!-- bench:(\S+) -->", text)) == sorted(losses.BLOCKS)
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


@pytest.mark.parametrize("one", TARGETS, ids=lambda one: one.name)
def test_no_prediction_beats_its_floor(one):
    floor, predicted = one.floor(H100), one.predicted(H100)
    if len(one.cases) == 2:
        # A ratio of ratios has no bound, only an aim.
        assert floor == pytest.approx(1.0, abs=0.01)
        return
    assert predicted <= floor if one.least else predicted >= floor


def test_predictions_are_the_cost_models():
    problem = Problem(8192, (4096,), (4096,), (LowRank(16),), 2, 4)
    found = estimate(problem, H100)
    fastest = min(found[name].seconds for name in ("peft", "aten", "triton"))
    expected = found["peft"].seconds / fastest
    assert target("PEFT eager / fused, d = 4096").predicted(H100) == pytest.approx(expected)
    # Nothing of it is fixed: with a perfect matmul of Triton's, expand costs its low-rank part.
    perfect = dataclasses.replace(H100, triton_matmul=1.0)
    expand = target("expand /")
    assert 1.0 < expand.predicted(perfect) < 1.02 < expand.predicted(H100)


def test_floors_are_those_of_the_reference_arithmetic():
    """One pass of x more and 1.5 r (k + n) / (k n) more FLOPs: 1.04 and 1.08 of the frozen time."""
    for d, expected in ((4096, 1.04), (2048, 1.08)):
        problem = Problem(8192, (d,), (d,), (LowRank(16),))
        base = predict.ideal_steps(dataclasses.replace(problem, branches=()))
        frozen = load_of(base, SUSTAINED).device
        assert frozen == pytest.approx(4 * 8192 * d * d / 700e12)
        ideal = predict.group_seconds(problem, SUSTAINED, "ideal").device
        assert ideal / frozen == pytest.approx(expected, abs=0.006)


def test_the_ideal_counts_each_activation_once_a_pass():
    problem = Problem(64, (32,), (48, 16), (LowRank(4, 0), LowRank(2, 1)))
    forward, dx, da = predict.ideal_steps(problem)
    x, y, w = 64 * 32 * 2, 64 * 64 * 2, 64 * 32 * 2
    low = 2 * 64 * (4 * (32 + 48) + 2 * (32 + 16))
    assert (forward.bytes, forward.flops) == (x + y + w, 2 * 64 * 32 * 64 + low)
    assert (dx.bytes, dx.flops) == (x + y + w, 2 * 64 * 32 * 64 + 2 * low)
    assert (da.bytes, da.flops) == (x, 0)


def test_compiling_peft_fuses_what_is_elementwise_and_nothing_else():
    problem = Problem(1024, (512,), (512, 256, 256), tuple(LowRank(16, i) for i in range(3)), 2, 4)
    eager = [step for part in peft_steps(problem) for step in part]
    compiled = predict.compiled_peft_steps(problem)
    assert sum(s.flops for s in compiled) == sum(s.flops for s in eager)
    # Matmuls stay: 2 frozen and 6 of the adapter, for each layer.
    assert sum(s.launches for s in compiled if s.flops) == 3 * 8
    assert sum(s.launches for s in eager if s.flops) == 3 * 8
    # Cast of x, sum of dX, and two a layer.
    assert sum(s.launches for s in compiled if not s.flops) == 2 + 2 * 3
    assert sum(s.bytes for s in compiled) < sum(s.bytes for s in eager)
    least = 1024 * (512 * 3 + 1024 * 4)
    assert sum(s.bytes for s in compiled if not s.flops) > least


def test_problems_of_a_case_are_those_of_its_copies():
    (first, *others) = predict.problems(CASES[D4096])
    assert first == Problem(8192, (4096,), (4096,), (LowRank(16),), 2, 4)
    assert all(problem == first for problem in others)
    mixed = predict.problems(CASES["qkv-4096-gqa-m256-mixed16-bf16"])
    assert {problem.sites for problem in mixed} == {(4096, 1024, 1024)}
    ranks = [b.rank for problem in mixed for b in problem.branches]
    assert sum(ranks) == 16 * len(ranks) and len(set(ranks)) > 3


def test_a_graph_takes_the_host_out_and_a_whole_step_overlaps_it():
    short = CASES["op-768x768-m256-r16-bf16"]
    eager = predict.case_seconds(short, H100, "peft")
    assert predict.case_seconds(short, H100, "graph-peft") < eager / 2
    sizes = CASES["llama-1b-8x1024-bf16-uniform"].shapes
    groups = predict.llama_groups(sizes, 8, 2)
    assert [p.sites for p in groups] == [(2048, 512, 512), (2048,), (8192, 8192), (2048,)]
    for variant in ("peft", "fused", "compile-peft", "compile-fused", "graph-fused"):
        alone = sum(predict.group_seconds(p, H100, variant).seconds for p in groups)
        whole = predict.whole_step(sizes, H100, variant)
        device = sum(predict.group_seconds(p, H100, variant).device for p in groups)
        # The rest of the model adds to the device's time, and hides the host's.
        assert device < whole / sizes["layers"] < 3 * alone, variant


@pytest.mark.parametrize(
    "problem",
    [
        Problem(8192, (4096,), (4096,), (LowRank(16),), 2, 4),
        Problem(64, (4096,), (4096, 1024), (LowRank(16), LowRank(160, 1)), 2, 2),
        Problem(512, (512,), (512, 512), (LowRank(0), LowRank(8, 1)), 4, 4, input_grad=False),
    ],
)
def test_parts_are_all_of_a_pass(problem):
    found = losses.compare(problem, H100)
    whole = estimate(problem, H100)
    for path, parts in (("triton", found.triton), ("aten", found.aten)):
        device = whole[path].forward.device_seconds + whole[path].backward.device_seconds
        assert sum(parts.values()) == pytest.approx(device), path
    assert found.ratio == whole["triton"].seconds / whole["aten"].seconds


def test_a_step_of_no_part_is_an_error(monkeypatch):
    left = {name: part for name, part in losses.PARTS.items() if name != "dA"}
    monkeypatch.setattr(losses, "PARTS", left)
    with pytest.raises(ValueError, match="the step 'dA pass' is of no part"):
        losses.compare(Problem(64, (64,), (64,), (LowRank(16),)), H100)


def test_what_loses_is_named():
    slow = dataclasses.replace(H100.captured(), triton_matmul=0.5)
    problem = Problem(8192, (4096,), (14336,), (LowRank(16),), 2, 4)
    found = losses.compare(problem, slow)
    assert found.lost and found.worst in ("Y", "dX") and found.ratio > 1.5
    # With nothing to do on the device, what is left is the Python of a call.
    idle = losses.compare(Problem(1, (64,), (64,), (LowRank(16),), 2, 4), H100)
    assert idle.lost == (idle.worst == "host")
