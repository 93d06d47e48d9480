"""The registry, the gate, and one tiny case end to end."""

import argparse
import dataclasses

import pytest
import torch

import heterolora
from heterolora.bench import cases, cli, models
from heterolora.bench.harness import BenchError
from heterolora.bench.parity import check_parity
from heterolora.bench.record import read_run

CPU = torch.device("cpu")


def tiny(dtype: torch.dtype = torch.float32) -> models.Workload:
    return cases.CASES["tiny-4x16-fp32-uniform"].build(dtype, CPU)


def steps(dtype: torch.dtype = torch.float32, ranks=models.mixed_ranks):
    return [
        models.build_step(name, load, ranks(load.targets))
        for name, load in (("peft", tiny(dtype)), ("fused", tiny(dtype)))
    ]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("prefix", ["minilm-16x64", "llama-8x64", "linears-16x64", "tiny-4x16"])
def test_mixed_ranks_cost_exactly_what_uniform_ranks_cost(prefix):
    with torch.device("meta"):
        load = cases.CASES[f"{prefix}-fp32-mixed"].build(torch.float32, torch.device("meta"))
    mixed, uniform = models.mixed_ranks(load.targets), models.uniform_ranks(load.targets)

    def cost(ranks):
        return sum(ranks[name] * sum(load.targets[name]) for name in ranks)

    assert cost(mixed) == cost(uniform)
    assert {0, 32} <= set(mixed.values()) and set(uniform.values()) == {8}
    assert mixed == models.mixed_ranks(load.targets)


def test_cases_of_the_issue_are_registered():
    for family, modules in (("minilm-16x64", 36), ("llama-8x64", 84), ("linears-16x64", 36)):
        for dtype in ("fp32", "bf16"):
            for ranks in ("uniform", "mixed"):
                assert f"{family}-{dtype}-{ranks}" in cases.CASES
        with torch.device("meta"):
            case = cases.CASES[f"{family}-fp32-uniform"]
            assert len(case.build(torch.float32, torch.device("meta")).targets) == modules


def test_adapters_have_the_asked_ranks_and_one_scale():
    load = tiny()
    ranks = models.mixed_ranks(load.targets)
    model = models.with_adapters(load, ranks)
    found = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert {name: m.r["default"] for name, m in found.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert {m.scaling["default"] for m in found.values()} == {2.0}
    assert all(m.lora_B["default"].weight.abs().max() > 0 for m in found.values())


def test_variants_start_from_the_same_weights_and_batch():
    peft, fused = steps()
    for (name, a), (other, b) in zip(
        peft.module.named_parameters(), fused.module.named_parameters(), strict=True
    ):
        assert name == other and torch.equal(a, b)
    assert all(torch.equal(peft.inputs[key], fused.inputs[key]) for key in peft.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [models.uniform_ranks, models.mixed_ranks])
def test_gate_is_green_for_the_fused_model(dtype, ranks):
    found = check_parity(*steps(dtype, ranks))
    assert found.green, found.reason
    assert found.gradient is not None and found.gradient > 0


def test_gate_is_red_when_nothing_was_fused():
    peft, fused = steps()
    heterolora.unfuse(fused.module)
    fused.fuse_report = heterolora.FuseReport()
    found = check_parity(peft, fused)
    assert not found.green and found.reason.startswith("not fused: 11 of 11 LoRA layers")


def test_gate_is_red_when_the_report_claims_what_did_not_run():
    peft, fused = steps()
    heterolora.unfuse(fused.module)
    found = check_parity(peft, fused)
    assert not found.green and "0 of 11 adapters went through the fused op" in found.reason


def test_gate_is_red_when_one_module_is_declined():
    peft, fused = steps()
    name = next(iter(fused.fuse_report.fused))
    left = {key: path for key, path in fused.fuse_report.fused.items() if key != name}
    fused.fuse_report = dataclasses.replace(
        fused.fuse_report, fused=left, declined={name: "a good reason"}
    )
    found = check_parity(peft, fused)
    assert not found.green and name in found.reason and "a good reason" in found.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", [1.0, 1.2, float("nan")])
def test_gate_is_red_when_one_factor_of_one_module_differs(dtype, factor):
    peft, fused = steps(dtype)
    name, parameter = list(models.adapter_parameters(fused.module).items())[5]
    parameter.data.mul_(factor)
    found = check_parity(peft, fused)
    assert found.green == (factor == 1.0), (name, found)


def test_red_case_has_no_number_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(heterolora, "fuse", lambda model, **_: heterolora.FuseReport())
    target = tmp_path / "red.json"
    args = parse("--case", "tiny-4x16-fp32-uniform", "--quick", "--json", str(target))
    assert cli.run(args, []) == 1
    assert "RED, not timed" in capsys.readouterr().out
    (result,) = read_run(target).results
    assert result.timing is None and result.memory == {}


def test_tiny_case_end_to_end(tmp_path, capsys):
    args = parse("--case", "tiny-4x16-fp32-mixed", "--rounds", "2", "--out", str(tmp_path))
    before = torch.get_num_threads()
    assert cli.run(args, ["--case", "tiny"]) == 0
    assert torch.get_num_threads() == before
    shown = capsys.readouterr().out
    (path,) = tmp_path.rglob("tiny-4x16-fp32-mixed.json")
    measured = read_run(path)
    assert measured.environment["threads"] == 1
    (result,) = measured.results
    assert list(result.timing.seconds) == ["peft", "fused", "base-only", "peft-lowp"]
    assert result.timing.rounds == 2
    for name, use in result.memory.items():
        assert name in shown and use.peak > use.saved > 0 and use.resident > 0
    # No adapter, nothing saved for one: the floor is a floor in memory too.
    assert result.memory["base-only"].saved < result.memory["peft"].saved

    assert cli.run(parse("--report", str(tmp_path)), []) == 0
    assert "| tiny-4x16-fp32-mixed | fused |" in capsys.readouterr().out


def test_a_variant_that_cannot_run_is_reported_and_the_others_count(monkeypatch, tmp_path):
    def no_compiler(model):
        def fail(**inputs):
            raise RuntimeError("no C++ compiler\nlong traceback")

        model.forward = fail
        return model

    monkeypatch.setattr(torch, "compile", no_compiler)
    target = tmp_path / "x.json"
    argv = ["--case", "tiny-4x16-fp32-uniform", "--rounds", "1", "--compile", "--json", str(target)]
    assert cli.run(parse(*argv), argv) == 1
    (result,) = read_run(target).results
    assert result.green and "fused" in result.timing.seconds
    assert result.failed == {
        "compile-peft": "RuntimeError: no C++ compiler",
        "compile-fused": "RuntimeError: no C++ compiler",
    }


def test_list_names_every_case(capsys):
    assert cli.run(parse("--list")) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(cases.CASES)


def test_selection():
    assert [c.name for c in cases.select(["*bf16-mixed", "minilm-16x64-bf16-mixed"])] == [
        "tiny-4x16-bf16-mixed",
        "minilm-16x64-bf16-mixed",
        "llama-8x64-bf16-mixed",
        "linears-16x64-bf16-mixed",
    ]
    assert {c.quick for c in cases.select(None, quick=True)} == {True}
    assert {c.quick for c in cases.select(None)} == {False}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--case", "nonesuch"], "no case matches 'nonesuch'"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--threads", "0", "--quick"], "threads must be at least 1"),
        (["--device", "abacus"], "use auto, cpu, cuda"),
        (["--device", "meta"], "only CPU and CUDA"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--report", "/nonexistent/folder"], "no such folder"),
        (["--json", "/dev/null/x.json", "--quick"], "cannot be written"),
    ],
)
def test_bad_requests(argv, message):
    with pytest.raises(BenchError, match=message):
        cli.run(parse(*argv), argv)
