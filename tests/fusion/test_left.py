"""`backend="auto"`: layers that PEFT runs faster are left to it, by shape, to the bit."""

import copy

import pytest
import torch
from helpers import CountOps, batch_for, build, step, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn

import heterolora
from heterolora.fusion import call as fused_call
from heterolora.kernels import dispatch
from heterolora.kernels.dispatch import Choice


class Pair(nn.Module):
    """Two layers that read one input."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x):
        return self.left(x) + self.right(x)


@pytest.fixture
def by_rows(monkeypatch):
    """A model of cost by which PEFT is faster up to 4 rows; every question is kept."""
    asked = []

    def quickest(x, sites, branches, *, captured=False):
        rows = x.numel() // x.shape[-1]
        asked.append((rows, len(sites), captured))
        return Choice("peft" if rows <= 4 and not captured else "aten", f"by {rows} rows")

    monkeypatch.setattr(fused_call, "quickest", quickest)
    return asked


def adapted():
    torch.manual_seed(0)
    return get_peft_model(Pair(), LoraConfig(r=4, target_modules=["left", "right"]))


def ops(model, x):
    """Calls of the forward op, and the result."""
    with CountOps() as counted:
        y = model(x)
    return counted.counts["heterolora::group_linear"], y


def test_a_tiny_model_runs_pefts_own_forward_to_the_bit():
    base = build("bert")
    batch = {name: value[:1] for name, value in batch_for(base).items()}
    model = with_lora(base)
    plain = copy.deepcopy(model)
    report = heterolora.fuse(model, example=batch)
    assert report.left and not report.fused and not report.declined
    assert "left to PEFT" in str(report) and "measured" in str(report)
    assert report.left.keys() == report.why.keys()
    with CountOps() as counted:
        logits, grads = step(model, batch)
    assert not any(name.startswith("heterolora::") for name in counted.counts)
    expected, expected_grads = step(plain, batch)
    assert torch.equal(logits, expected)
    for name, grad in expected_grads.items():
        assert torch.equal(grads[name], grad)


def test_every_shape_decides_for_itself_and_is_asked_about_once(by_rows):
    model = adapted()
    heterolora.fuse(model, example={"x": torch.randn(5, 16)})
    by_rows.clear()
    for rows, calls in ((5, 1), (4, 0), (5, 1), (4, 0)):
        assert ops(model, torch.randn(rows, 16))[0] == calls
    # Fused shapes ask each time, a dictionary look-up; those left to PEFT are known by their shape.
    assert by_rows == [(5, 2, False), (4, 2, False), (5, 2, False)]


def test_a_group_that_is_left_has_no_output_waiting(by_rows):
    model = adapted()
    heterolora.fuse(model, example={"x": torch.randn(5, 16)})
    x = torch.randn(3, 16)
    found = ops(model, x)[1]
    heterolora.unfuse(model)
    assert torch.equal(found, model(x))


def test_a_layer_asked_alone_is_asked_again_in_its_group(by_rows):
    model = adapted()
    heterolora.fuse(model)
    by_rows.clear()
    x = torch.randn(4, 16)
    for _ in range(3):
        assert ops(model, x)[0] == 0
    assert [sites for _, sites, _ in by_rows] == [1, 1, 2]


def test_the_report_is_of_the_examples_size(by_rows):
    for rows, fused in ((4, set()), (5, {"left", "right"})):
        model = adapted()
        report = heterolora.fuse(model, example={"x": torch.randn(rows, 16)})
        assert set(report.fused) == fused and set(report.left) == {"left", "right"} - fused
        assert set(report.why.values()) == {f"by {rows} rows"}
    report = heterolora.fuse(adapted())
    assert set(report.why.values()) == {"by 8192 rows"}


def test_the_table_has_a_line_for_each_layer(by_rows):
    model = adapted()
    model.get_base_model().right.lora_dropout["default"] = nn.Dropout(0.5)
    lines = heterolora.fuse(model).table().splitlines()
    assert lines == [
        "left   aten  by 8192 rows",
        "right  peft  declined: active dropout (p=0.5)",
    ]
    report = heterolora.fuse(adapted(), example={"x": torch.randn(2, 16)})
    assert report.table() == "left   peft  by 2 rows\nright  peft  by 2 rows"


def test_strict_is_about_what_cannot_be_fused(by_rows):
    model = adapted()
    report = heterolora.fuse(model, strict=True, example={"x": torch.randn(2, 16)})
    assert set(report.left) == {"left", "right"}


def test_a_named_backend_and_a_captured_step_leave_nothing(by_rows):
    x = torch.randn(2, 16)
    for options in ({"backend": "aten"}, {"captured": True}):
        model = adapted()
        report = heterolora.fuse(model, example={"x": x}, **options)
        assert not report.left
        assert ops(model, x)[0] == 1


def test_scoring_is_never_left_to_peft(by_rows, monkeypatch):
    model = adapted()
    heterolora.fuse(model, example={"x": torch.randn(2, 16)})
    seen = []
    group_linear = fused_call.group_linear

    class Scorer:
        def called(self, name):
            seen.append(name)

        def run(self, names, x, sites, branches, **options):
            seen.append(tuple(names))
            return group_linear(x, sites, branches, implementation="aten")

    fusion = model._heterolora
    x = torch.randn(2, 16)
    assert ops(model, x)[0] == 0
    fusion.runner = Scorer()
    assert ops(model, x)[0] == 1
    assert seen == ["left", ("left", "right"), "right"]


def test_advice_of_an_unmeasured_gpu_is_in_the_report(monkeypatch):
    monkeypatch.setattr(dispatch, "advice", lambda device: "measure it")
    report = heterolora.fuse(adapted())
    assert report.advice == "measure it" and str(report).endswith("measure it")
