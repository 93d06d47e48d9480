"""`heterolora bench --explain`: the groups that `fuse` finds, what was measured, what is chosen."""

import argparse
import json

import pytest
import torch

from heterolora.bench import cli
from heterolora.bench.cases import registry as cases
from heterolora.bench.gpu import explain
from heterolora.bench.harness.timing import BenchError
from heterolora.kernels.dispatch import decide
from heterolora.kernels.tuned.measured import cpu_name, shipped_for

CPU = torch.device("cpu")
MIXED = cases.CASES["tiny-4x16-bf16-mixed"]


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture(scope="module")
def explained() -> explain.CaseExplained:
    return explain.explain_case(MIXED, CPU)


def test_every_layer_is_in_one_group_with_its_rank_and_shape(explained):
    load = MIXED.build(torch.bfloat16, CPU)
    ranks = MIXED.ranks_of(load.targets)
    seen = {}
    for group in explained.groups:
        shape = group.shape
        found = (shape.m, shape.itemsize, shape.factor_itemsize, shape.bias)
        assert found == (load.tokens, 2, 4, True)
        for names in group.modules:
            for index, name in enumerate(names):
                assert name not in seen
                seen[name] = shape.branches[index].rank
                assert load.targets[name] == (shape.sources[0], shape.sites[index])
    assert seen == ranks
    # Siblings are together; a layer without an adapter stays a plain layer of its own.
    assert any(len(names) > 1 for group in explained.groups for names in group.modules)
    for group in explained.groups:
        assert (group.choice.path == "base") == (max(b.rank for b in group.shape.branches) == 0)


def test_the_choice_is_the_one_dispatch_makes(explained):
    assert explained.device == cpu_name()
    for group in explained.groups:
        if group.shape.live:
            assert group.choice == decide(group.shape, shipped_for(cpu_name()), ("peft", "aten"))


def test_what_was_measured_on_the_device_is_said(monkeypatch):
    monkeypatch.setattr(explain, "device_name", lambda device: "AMD EPYC")
    found = explain.explain_case(cases.CASES["op-384x384-m64-r16-fp32"], CPU)
    (group,) = found.groups
    assert "ms measured, aten" in group.choice.reason and group.choice.path == "peft"
    monkeypatch.setattr(explain, "device_name", lambda device: "nobody's")
    (group,) = explain.explain_case(cases.CASES["op-384x384-m64-r16-fp32"], CPU).groups
    assert group.choice.reason == "not measured on this device, and fewer than 256 rows"


def test_command(tmp_path, capsys):
    file = tmp_path / "explained.json"
    case = "tiny-4x16-bf16-uniform"
    assert cli.run(parse("--explain", "--case", case, "--json", str(file))) == 0
    text = capsys.readouterr().out
    assert case in text and "peft: " in text
    content = json.loads(file.read_text())
    assert (content["kind"], content["schema_version"]) == ("heterolora.bench.explain", 2)
    (found,) = content["cases"]
    assert found["case"] == case
    for group in found["groups"]:
        assert group["chosen"] in ("peft", "aten") and group["reason"]
        assert group["shape"]["m"] == 64


def test_requests_that_make_no_sense():
    with pytest.raises(BenchError, match="no case matches"):
        cli.run(parse("--explain", "--case", "nothing"))
    case = next(case for case in cases.CASES.values() if not case.described)
    with pytest.raises(BenchError, match="only training steps without shortcuts"):
        explain.explain_case(case, CPU)
