"""The registry, the gate, and one tiny case end to end."""

import argparse
import dataclasses

import pytest
import torch

import heterolora
from heterolora.bench import cli, runner
from heterolora.bench.cases import peers
from heterolora.bench.cases import registry as cases
from heterolora.bench.cases.groups import group
from heterolora.bench.harness import parity, steps
from heterolora.bench.harness.parity import check_parity
from heterolora.bench.harness.record import read_run
from heterolora.bench.harness.steps import twin
from heterolora.bench.harness.timing import BenchError

CPU = torch.device("cpu")
KINDS = ("op", "group", "layer", "model", "scoring", "train")


def tiny(dtype: torch.dtype = torch.float32) -> steps.Workload:
    return cases.CASES["tiny-4x16-fp32-uniform"].build(dtype, CPU)


def built(dtype: torch.dtype = torch.float32, ranks=steps.mixed_ranks):
    load = tiny(dtype)
    return [peers.build_step(name, twin(load), ranks(load.targets)) for name in ("peft", "aten")]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


def test_every_kind_size_and_dtype_of_the_grid_is_registered():
    kinds = {kind: [c for c in cases.CASES.values() if c.kind == kind] for kind in KINDS}
    assert all(kinds.values()) and sum(map(len, kinds.values())) == len(cases.CASES)
    square = {c.shapes["k"] for c in kinds["op"] if c.shapes["k"] == c.shapes["n"]}
    assert square == {128, 384, 768, 1024, 2048, 4096, 8192}
    assert {c.shapes["m"] for c in kinds["op"]} == {32, 64, 256, 1024, 4096, 8192, 16384}
    for name in (
        "op-4096x1024-m256-r16-bf16",
        "op-4096x14336-m8192-r16-bf16",
        "op-14336x4096-m8192-r16-bf16",
        *(f"op-4096x4096-m8192-{r}-bf16" for r in ("r8", "r64", "r128", "mixed16", "sparse16")),
        "op-4096x4096-m8192-r16-bf16-dropout",
        "op-4096x4096-m8192-r16-bf16-shortcut",
        "qkv-4096-gqa-m8192-mixed16-bf16",
        "gate-up-4096-m8192-r16-bf16",
        *(f"{m}-layer-2x128-fp32-mixed" for m in ("opt-350m", "llama-1b", "llama-8b")),
        *(f"{m}-16x512-bf16-uniform" for m in ("opt-350m", "roberta-large")),
        "scoring-minilm-16x64-fp32",
        *(f"train-minilm-32x32-{dtype}" for dtype in ("fp32", "bf16")),
        *(f"train-minilm-lengths-32x64-{dtype}" for dtype in ("fp32", "bf16")),
        "train-llama-1b-8x1024-bf16",
    ):
        assert name in cases.CASES
    for case in cases.CASES.values():
        assert case.name.count(case.dtype) == 1


def test_a_cpu_is_asked_only_for_what_it_can_do_in_time():
    on_cpu, on_gpu = cases.select(None), cases.select(None, device="cuda")
    assert {case.name for case in on_cpu} < {case.name for case in on_gpu}
    assert not any(case.dropout for case in on_cpu)
    assert {case.kind for case in on_cpu} == set(KINDS)
    assert max(case.flops for case in on_cpu) < 1e12


@pytest.mark.parametrize("family", [f"{m}-2x128" for m in ("roberta-large", "opt-350m")])
def test_flops_of_a_case_are_those_of_its_adapted_linears(family):
    case = cases.CASES[f"{family}-bf16-uniform"]
    load = case.build(torch.bfloat16, torch.device("meta"))
    weights = sum(k * n for k, n in load.targets.values())
    assert case.flops == 4 * load.tokens * weights


def test_flops_of_a_group_case_are_those_of_its_linears():
    case = cases.CASES["qkv-768-m256-r16-fp32"]
    load = case.build(torch.float32, torch.device("meta"))
    weights = sum(k * n for k, n in load.targets.values())
    assert case.flops == 4 * load.tokens * weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [steps.uniform_ranks, steps.mixed_ranks])
def test_gate_is_green_for_the_fused_model(dtype, ranks):
    found = check_parity(*built(dtype, ranks))
    assert found.green, found.reason
    assert found.gradient is not None and found.gradient > 0


def test_gate_is_red_when_nothing_was_fused():
    peft, fused = built()
    heterolora.unfuse(fused.module)
    fused.fuse_report = heterolora.FuseReport()
    found = check_parity(peft, fused)
    assert not found.green and found.reason.startswith("not fused: 11 of 11 LoRA layers")


def test_gate_is_red_when_the_report_claims_what_did_not_run():
    peft, fused = built()
    heterolora.unfuse(fused.module)
    found = check_parity(peft, fused)
    assert not found.green and "0 of 11 adapters went through the fused op" in found.reason


def test_gate_is_red_when_one_module_is_declined():
    peft, fused = built()
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
    peft, fused = built(dtype)
    name, parameter = list(steps.adapter_parameters(fused.module).items())[5]
    parameter.data.mul_(factor)
    found = check_parity(peft, fused)
    assert found.green == (factor == 1.0), (name, found)


def test_a_batch_that_is_lucky_for_peft_is_not_the_last_word(monkeypatch):
    """On a miss the errors of eight other batches decide, and the given batch is put back."""
    peft, fused = built(torch.bfloat16)
    before = {name: value.clone() for name, value in fused.inputs.items()}
    monkeypatch.setattr(parity, "_exceeds", lambda squares: True)
    found = check_parity(peft, fused)
    assert found.green and "over 8 batches" in found.rule
    assert all(torch.equal(fused.inputs[name], value) for name, value in before.items())
    list(steps.adapter_parameters(fused.module).values())[5].data.mul_(1.05)
    assert not check_parity(peft, fused).green


def test_pooled_gradients_of_inputs_are_those_of_their_own_batch(monkeypatch):
    case = cases.CASES["op-1024x1024-m1024-r16-bf16"]
    load = group(m=64, k=64, sites={"proj": 48}, repeats=2, dtype=torch.bfloat16, device=CPU)
    monkeypatch.setattr(parity, "_exceeds", lambda squares: True)
    found, _ = runner.gate(case, load, dict.fromkeys(load.targets, 8))
    assert found.green and found.gradient < 2, found


def test_red_case_has_no_number_and_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(heterolora, "fuse", lambda model, **_: heterolora.FuseReport())
    target = tmp_path / "red.json"
    args = parse("--case", "tiny-4x16-fp32-uniform", "--quick", "--json", str(target))
    assert cli.run(args, []) == 1
    assert "RED, not timed" in capsys.readouterr().out
    (result,) = read_run(target).results
    assert result.timing is None and result.memory == result.launches == {}


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
    # So small that fused is PEFT's own: what aten takes is measured beside it.
    assert list(result.timing.seconds) == ["peft", "fused", "base-only", "peft-lowp", "aten"]
    assert result.timing.rounds == 2
    for name, use in result.memory.items():
        assert name in shown and use.peak > use.saved > 0 and use.resident > 0
    # No adapter, nothing saved for one: the floor is a floor in memory too.
    assert result.memory["base-only"].saved < result.memory["peft"].saved
    assert result.launches["base-only"] < result.launches["aten"] < result.launches["peft"]
    assert result.launches["fused"] == result.launches["peft"]
    assert result.skipped.keys() == {"triton", *peers.GRAPHED, "unsloth", "liger-peft"}
    assert measured.environment["ceilings"]["flops"]["fp32"] > 1e9

    assert cli.run(parse("report", str(tmp_path)), []) == 0
    assert "tiny-4x16-fp32-mixed" in capsys.readouterr().out


def test_a_group_with_a_shortcut_goes_through_the_gate():
    case = cases.CASES["op-1024x1024-m1024-r16-fp32-shortcut"]
    load = group(
        m=8, k=16, sites={"proj": 12}, repeats=2, shortcut=True, dtype=torch.float32, device=CPU
    )
    ranks = {name: 4 for name in load.targets}
    found, built_ = runner.gate(case, load, ranks)
    assert found.green, found.reason
    # Fused in name only: the shortcut and the layer stay separate.
    for one in built_["fused"].module.get_base_model().copies:
        one.fused = False
    assert "0 of 4 adapters" in case.parity(built_["peft"], built_["fused"]).reason


def test_dropout_on_a_cpu_is_red_because_nothing_was_fused():
    case = dataclasses.replace(cases.CASES["tiny-4x16-fp32-uniform"], dropout=0.1)
    result = runner.run_case(case, device=CPU, rounds=1)
    assert not result.green and "active dropout (p=0.1)" in result.parity.reason


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
    assert [
        c.name
        for c in cases.select(
            ["tiny-*bf16-mixed", "minilm-1*bf16-mixed", "minilm-16x64-bf16-mixed"]
        )
    ] == [
        "tiny-4x16-bf16-mixed",
        "minilm-16x64-bf16-mixed",
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
        (["report", "/nonexistent/folder"], "no such folder"),
        (["--json", "/dev/null/x.json", "--quick"], "cannot be written"),
        (["report", "--readme", "/nonexistent.md"], "cannot be read"),
    ],
)
def test_bad_requests(argv, message):
    with pytest.raises(BenchError, match=message):
        cli.run(parse(*argv), argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--html", "x.html"],
        ["run", "results"],
        ["--minutes", "3"],
        ["--tune"],
        ["report", "--tune"],
        ["gpu", "--case", "tiny"],
        ["--data", "data"],
    ],
)
def test_a_program_takes_its_own_options_only(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_options_count_before_the_program_and_behind_it():
    for argv in (
        ["--case", "a", "--rounds", "3", "run"],
        ["run", "--case", "a", "--rounds", "3"],
        ["--rounds", "3", "run", "--case", "a"],
    ):
        args = parse(*argv)
        assert (args.case, args.rounds, args.threads, args.quick) == (["a"], 3, 1, False)
    args = parse("--rounds", "3", "--out", "x", "gpu", "--threads", "2")
    assert (args.rounds, str(args.out), args.threads, args.device) == (3, "x", 2, "auto")
    for argv in (["--case", "x", "report"], ["--quick", "gpu"], ["--explain", "evidence", "main"]):
        with pytest.raises(BenchError, match="is of `bench run`"):
            cli.run(parse(*argv), argv)
