"""`heterolora verify`: green on this code, red on planted faults."""

import argparse
import json

import pytest
import torch

from heterolora.errors import HeteroLoraError
from heterolora.kernels import aten, spec
from heterolora.verify import add_arguments, run


def _run(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def test_all_rungs_hold(tmp_path, capsys):
    target = tmp_path / "verify.json"
    assert _run("--json", str(target)) == 0
    content = json.loads(target.read_text())
    assert [rung["rung"] for rung in content["rungs"]] == ["spec", "aten", "peft"]
    assert all(rung["checks"] > 0 and not rung["failures"] for rung in content["rungs"])
    assert "not run" in capsys.readouterr().out


def _lost_scale(original):
    def wrong(sources, weights, biases, a, b, scales, layout):
        return original(sources, weights, biases, a, b, [1.0] * len(scales), layout)

    return wrong


def _rounded(original):
    """An accuracy fault of two bits in float32, far below what a loose tolerance would see."""

    def wrong(*args):
        outputs, s = original(*args)
        return [y * (1 + 3e-7) for y in outputs], s

    return wrong


def _lost_gradient(original):
    def wrong(*args):
        return [torch.zeros_like(grad) for grad in original(*args)]

    return wrong


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("group_linear", _lost_scale),
        ("group_linear", _rounded),
        ("group_linear_backward", _lost_gradient),
    ],
)
def test_a_planted_fault_is_caught(monkeypatch, capsys, name, fault):
    monkeypatch.setattr(aten, name, fault(getattr(aten, name)))
    assert _run("--rung", "aten") == 1
    assert "FAILED aten" in capsys.readouterr().out


def test_a_fault_in_the_specification_is_caught(monkeypatch, capsys):
    original = spec.group_linear_backward

    def wrong(grads, x, sites, branches):
        found = original(grads, x, sites, branches)
        found.a[:] = [2 * grad for grad in found.a]
        return found

    monkeypatch.setattr(spec, "group_linear_backward", wrong)
    assert _run("--rung", "spec") == 1
    assert "off by" in capsys.readouterr().out


def test_unknown_rung():
    with pytest.raises(HeteroLoraError, match="no rung 'seven'; choose from spec, aten, peft"):
        _run("--rung", "seven")
