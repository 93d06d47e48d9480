"""`heterolora verify`: green on this code, red on planted faults, and its JSON as promised."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

import heterolora.verify
from heterolora.errors import HeteroLoraError
from heterolora.kernels import aten, spec
from heterolora.verify import add_arguments, run
from heterolora.verify.cases import Verdict
from heterolora.verify.child import child
from heterolora.verify.rungs import RUNGS, Rung

SCHEMA = json.loads(
    (Path(heterolora.verify.__file__).parent / "schema.json").read_text(encoding="utf-8")
)


def _run(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(words))


def _replace(monkeypatch, number, cases, missing=None):
    rung = Rung(number, "a stand-in", lambda request: iter(cases), lambda request: missing)
    monkeypatch.setitem(RUNGS, number, rung)


def test_rungs_that_need_no_triton_hold(tmp_path):
    target = tmp_path / "verify.json"
    assert _run("--rung", "1", "--rung", "2", "--json", str(target)) == 0
    content = json.loads(target.read_text())
    _validate(content, SCHEMA)
    assert [rung["rung"] for rung in content["rungs"]] == [1, 2]
    assert all(rung["status"] == "passed" and rung["checks"] > 10 for rung in content["rungs"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and rung 5 runs")
def test_rung_5_says_why_it_does_not_run(capsys):
    assert _run("--rung", "5", "--json", "-") == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    _validate(content, SCHEMA)
    (rung,) = content["rungs"]
    assert (rung["status"], rung["reason"], rung["checks"]) == ("not run", "no CUDA device", 0)
    assert "not run here: no CUDA device" in captured.err


def test_failures_and_skips_are_reported(monkeypatch, capsys, tmp_path):
    cases = [
        Verdict("good"),
        Verdict("bad", "off by one"),
        Verdict("other", skipped="no such tool"),
    ]
    _replace(monkeypatch, 3, cases)
    _replace(monkeypatch, 4, [Verdict("one", skipped="nothing to do")])
    target = tmp_path / "verify.json"
    assert _run("--rung", "3", "--rung", "4", "--json", str(target)) == 1
    content = json.loads(target.read_text())
    _validate(content, SCHEMA)
    third, fourth = content["rungs"]
    assert not content["passed"] and third["checks"] == 2
    assert third["failures"] == {"bad": "off by one"}
    assert third["skipped"] == {"other": "no such tool"}
    assert (fourth["status"], fourth["reason"]) == ("not run", "nothing to do")
    text = capsys.readouterr().out
    assert "FAILED rung 3, bad: off by one" in text
    assert "rung 3, not run here: other: no such tool" in text


def test_interruption_closes_the_cases_and_writes_no_json(monkeypatch, capsys, tmp_path):
    closed = []

    def cases(request):
        try:
            yield Verdict("first")
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    monkeypatch.setitem(RUNGS, 3, Rung(3, "a stand-in", cases, lambda request: None))
    target = tmp_path / "verify.json"
    with pytest.raises(KeyboardInterrupt):
        _run("--rung", "3", "--json", str(target))
    assert closed and not target.exists()
    assert "interrupted" in capsys.readouterr().out


def test_a_child_that_breaks_is_a_failure():
    (case,) = child("compiled", "--no-such-option")
    assert case.problem.startswith("status 2 after 0 cases")
    assert "unrecognized arguments: --no-such-option" in case.problem


def test_a_suite_without_tests_is_a_failure(tmp_path):
    (case,) = child("suite", str(tmp_path))
    assert case.problem.startswith("status 5 after 0 cases")


def test_a_suite_reports_each_test(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): print('noise')\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_skipped(): pytest.skip('no tool')\n"
    )
    cases = {case.name.split("::")[-1]: case for case in child("suite", str(tmp_path))}
    assert cases["test_good"][1:] == (None, None)
    assert cases["test_bad"].problem == "assert 1 == 2"
    assert cases["test_skipped"].skipped == "no tool"


def test_a_child_is_ended_with_its_iterator(tmp_path):
    ready, done = tmp_path / "ready", tmp_path / "done"
    (tmp_path / "test_slow.py").write_text(
        "import time, pathlib\n"
        f"def test_first(): pathlib.Path({str(ready)!r}).write_text('')\n"
        f"def test_slow(): time.sleep(3); pathlib.Path({str(done)!r}).write_text('')\n"
    )
    cases = child("suite", str(tmp_path))
    assert next(cases).problem is None and ready.exists()
    cases.close()
    import time

    time.sleep(4)
    assert not done.exists()


def _lost_scale(original):
    def wrong(sources, weights, biases, a, b, scales, layout):
        return original(sources, weights, biases, a, b, [1.0] * len(scales), layout)

    return wrong


def _rounded(original):
    """An accuracy fault of a few bits in float32, far below what a loose tolerance would see."""

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
        pytest.param("group_linear", _rounded, marks=pytest.mark.slow),
        pytest.param("group_linear_backward", _lost_gradient, marks=pytest.mark.slow),
    ],
)
def test_a_planted_fault_is_caught(monkeypatch, capsys, name, fault):
    monkeypatch.setattr(aten, name, fault(getattr(aten, name)))
    assert _run("--rung", "2") == 1
    assert "FAILED rung 2" in capsys.readouterr().out


def test_a_fault_in_the_specification_is_caught(monkeypatch, capsys):
    original = spec.group_linear_backward

    def wrong(grads, x, sites, branches, seed=None):
        found = original(grads, x, sites, branches, seed)
        found.a[:] = [2 * grad for grad in found.a]
        return found

    monkeypatch.setattr(spec, "group_linear_backward", wrong)
    assert _run("--rung", "1") == 1
    assert "written-out gradient of A of branch 0 is off by" in capsys.readouterr().out


def test_a_fault_of_the_masks_is_caught(monkeypatch):
    """The specification's forward and backward pass have to drop the same elements."""
    original = spec.dropout_mask
    calls = []

    def wrong(seed, branch, *sizes):
        calls.append(branch)
        return original(seed + len(calls), branch, *sizes)

    monkeypatch.setattr(spec, "dropout_mask", wrong)
    assert _run("--rung", "1") == 1


@pytest.mark.parametrize("word", ["0", "6", "spec"])
def test_unknown_rung(word, capsys):
    with pytest.raises(SystemExit) as left:
        _run("--rung", word)
    assert left.value.code == 2
    assert "argument --rung: invalid" in capsys.readouterr().err


def test_no_architecture():
    with pytest.raises(HeteroLoraError, match="--arch 'h100' is no architecture: give e.g. sm_90"):
        _run("--arch", "h100")


TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
NOTES = {"$schema", "title", "description"}


def _validate(value, schema, where="$"):
    """JSON Schema, as far as the file uses it: an unknown keyword is an error."""
    rest = {key: rule for key, rule in schema.items() if key not in NOTES}
    kinds = rest.pop("type", None)
    if kinds is not None:
        allowed = [TYPES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)]
        assert any(isinstance(value, kind) for kind in allowed), where
        assert not isinstance(value, bool) or bool in allowed, where
    if "const" in rest:
        assert value == rest.pop("const"), where
    if "enum" in rest:
        assert value in rest.pop("enum"), where
    if "pattern" in rest:
        assert re.search(rest.pop("pattern"), value), where
    assert value >= rest.pop("minimum", 0) if "minimum" in rest else True, where
    assert value <= rest.pop("maximum", 0) if "maximum" in rest else True, where
    for index, item in enumerate(value if "items" in rest else ()):
        _validate(item, rest["items"], f"{where}[{index}]")
    properties = rest.pop("properties", {})
    extra = rest.pop("additionalProperties", True)
    rest.pop("items", None)
    assert set(rest.pop("required", ())) <= set(value if isinstance(value, dict) else ()), where
    assert not rest, f"{where}: keywords this validator does not know: {sorted(rest)}"
    for key, item in value.items() if isinstance(value, dict) else ():
        rule = properties.get(key, extra)
        assert rule is not False, f"{where}.{key} is not in the schema"
        if isinstance(rule, dict):
            _validate(item, rule, f"{where}.{key}")


@pytest.mark.parametrize(
    "change",
    [{"schema_version": 1}, {"passed": "yes"}, {"archs": ["h100"]}, {"extra": 1}, {"device": 3}],
)
def test_the_validator_refuses(change, monkeypatch, capsys):
    _replace(monkeypatch, 3, [Verdict("good")])
    assert _run("--rung", "3", "--json", "-") == 0
    content = json.loads(capsys.readouterr().out)
    _validate(content, SCHEMA)
    with pytest.raises(AssertionError):
        _validate({**content, **change}, SCHEMA)
