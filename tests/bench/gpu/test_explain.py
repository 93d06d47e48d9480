"""`heterolora bench --explain`: the groups that `fuse` finds, and predictions labelled as such."""

import argparse
import dataclasses
import json

import pytest
import torch
from bench_runs import result

from heterolora.bench import cli
from heterolora.bench.cases import registry as cases
from heterolora.bench.gpu import explain
from heterolora.bench.harness import record
from heterolora.bench.harness.timing import BenchError
from heterolora.kernels.cost import estimate
from heterolora.kernels.devices import Device, device_for
from heterolora.kernels.dispatch import decide

H100 = device_for("H100")
MIXED = cases.CASES["tiny-4x16-bf16-mixed"]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture(scope="module")
def on_h100() -> explain.CaseExplained:
    return explain.explain_case(MIXED, H100, on_gpu=True)


def test_every_layer_is_in_one_group_with_its_rank_and_shape(on_h100):
    load = MIXED.build(torch.bfloat16, torch.device("cpu"))
    ranks = MIXED.ranks_of(load.targets)
    seen = {}
    for group in on_h100.groups:
        p = group.problem
        assert (p.m, p.itemsize, p.factor_itemsize, p.bias) == (load.tokens, 2, 4, True)
        for names in group.modules:
            for index, name in enumerate(names):
                assert name not in seen
                seen[name] = p.branches[index].rank
                assert load.targets[name] == (p.sources[0], p.sites[index])
    assert seen == ranks
    # Siblings are together; a layer without an adapter stays a plain layer of its own.
    assert any(len(names) > 1 for group in on_h100.groups for names in group.modules)
    for group in on_h100.groups:
        assert (group.chosen == "base") == (max(b.rank for b in group.problem.branches) == 0)


def test_the_chosen_path_is_the_one_dispatch_takes(on_h100):
    for group in on_h100.groups:
        if group.problem.live:
            assert (
                group.chosen == decide(group.problem, H100, None, ("peft", "aten", "triton")).path
            )
            assert (
                f"{group.estimates[group.chosen].seconds * 1e3:.3g} ms by the cost model"
                in group.reason
            )
        assert group.estimates == estimate(group.problem, H100)


def test_totals_count_alike_groups(on_h100):
    for name in ("base", "peft", "aten", "triton"):
        total = 0.0
        for group in on_h100.groups:
            total += len(group.modules) * group.estimates[name].seconds
        assert on_h100.expected[name] == pytest.approx(total)
    least = min(on_h100.expected[name] for name in ("peft", "aten", "triton"))
    assert on_h100.expected["chosen"] <= least


def test_on_a_cpu_triton_is_no_choice():
    device = Device.measured("a CPU", flops=1e11, bandwidth=1e10, gap=1e-6, host=0.0)
    found = explain.explain_case(MIXED, device, on_gpu=False)
    assert {group.chosen for group in found.groups} == {"peft", "base"}
    # Where Python costs nothing there is nothing that speaks for PEFT's own layers.
    free = dataclasses.replace(device, call=0.0)
    found = explain.explain_case(MIXED, free, on_gpu=False)
    assert {group.chosen for group in found.groups} == {"aten", "base"}
    assert all(set(group.estimates) == {"base", "peft", "aten"} for group in found.groups)


def test_measured_steps_come_from_the_result_file_of_the_same_device_and_case(tmp_path):
    device = Device.measured("A CPU", flops=1e11, bandwidth=1e10, host=0.0)
    path = tmp_path / "a-cpu" / f"{MIXED.name}.json"
    seconds = {"peft": [0.010, 0.012], "fused": [0.008, 0.008], "base-only": [0.005, 0.004]}
    doubled = {name: [2 * value for value in values] for name, values in seconds.items()}
    results = [result("another", "model", doubled), result(MIXED.name, "model", seconds)]
    record.write_run(record.BenchRun({}, results), path)
    found = explain.explain_case(MIXED, device, on_gpu=False, results=tmp_path)
    assert found.measured == pytest.approx({"peft": 0.011, "fused": 0.008, "base-only": 0.0045})
    path.write_text("{")
    with pytest.raises(BenchError, match="not valid JSON"):
        explain.explain_case(MIXED, device, on_gpu=False, results=tmp_path)
    elsewhere = Device.measured("another CPU", flops=1e11, bandwidth=1e10)
    assert not explain.explain_case(MIXED, elsewhere, on_gpu=False, results=tmp_path).measured


def test_command_for_a_gpu_that_is_not_here(tmp_path, capsys):
    file = tmp_path / "explained.json"
    case = "tiny-4x16-bf16-uniform"
    assert cli.run(parse("--explain", "--case", case, "--device", "H100", "--json", str(file))) == 0
    text = capsys.readouterr().out
    assert "PREDICTED" in text and "not measured" in text.replace("\n", " ")
    rows = [line.split() for line in text.splitlines()]
    for name in ("base", "peft", "aten", "triton", "chosen"):
        assert any(row[:1] == [name] for row in rows)
    content = json.loads(file.read_text())
    assert content["kind"] == "heterolora.bench.explain" and content["prediction"] is True
    [found] = content["cases"]
    assert found["device"]["flops"] == H100.flops
    for group in found["groups"]:
        assert set(group["estimates"]) == {"base", "peft", "aten", "triton"}
        half = group["estimates"]["peft"]["backward"]
        assert half["bytes"] > 0 and half["seconds"] > 0 and half["launches"] > 0


def test_command_measures_the_ceilings_of_a_cpu(capsys, monkeypatch):
    asked = []

    def measure(place, dtype):
        asked.append((place.type, dtype))
        return explain_measure(place, dtype, scale=0.05)

    explain_measure = explain.measure_device
    monkeypatch.setattr(explain, "measure_device", measure)
    argv = ["--explain", "--case", "tiny-4x16-fp32-*", "--device", "cpu"]
    assert cli.run(parse(*argv)) == 0
    # Once for both cases.
    assert asked == [("cpu", torch.float32)]
    text = capsys.readouterr().out
    assert "(measured)" in text.replace("\n", " ") and "triton" not in text


def test_measured_ceilings_are_plausible():
    device = explain.measure_device(torch.device("cpu"), torch.float32, scale=0.2)
    # Between a hundredth and a thousand times what one core of today does.
    assert 1e8 < device.flops == device.flops32 < 1e14
    assert 1e8 < device.bandwidth < 1e13
    assert 0 < device.gap < 1e-3 and device.host == 0


@pytest.mark.parametrize(
    "name",
    ["scoring-tiny-4x16-fp32", "train-tiny-4x16-fp32", "op-1024x1024-m1024-r16-fp32-shortcut"],
)
def test_what_the_model_does_not_describe_is_an_error(name):
    with pytest.raises(BenchError, match="predicts training steps without shortcuts"):
        explain.explain_case(cases.CASES[name], H100, on_gpu=True)


def test_unknown_device_and_case_are_errors():
    with pytest.raises(BenchError, match="'K80': no figures for it; auto, cpu, cuda, or one of"):
        cli.run(parse("--explain", "--case", "tiny-*", "--device", "K80"))
    with pytest.raises(BenchError, match="no case matches"):
        cli.run(parse("--explain", "--case", "nothing"))
