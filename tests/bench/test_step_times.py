"""The bench of step times: its allocations and table, and one whole run."""

import json

import pytest

from heterolora.bench import step_times
from heterolora.bench.step_times import REFERENCE, Row, allocations, table

KINDS = ("attention.self.query", "attention.self.key", "attention.self.value",
         "attention.output.dense", "intermediate.dense", "output.dense")  # fmt: skip
NAMES = [f"bert.encoder.layer.{i}.{kind}" for i in range(4) for kind in KINDS]


def test_allocations_differ_in_depth_kind_and_rank():
    found = allocations(NAMES, 4)
    assert found[REFERENCE] == dict.fromkeys(NAMES, 8)
    sizes = {label: len(ranks) for label, ranks in found.items()}
    assert sizes["top half of the layers"] == 12 and sizes["top layer"] == 6
    assert sizes["query and value"] == sizes["feed-forward"] == 8
    assert all(".layer.3." in name for name in found["top layer"])
    # The projection out of attention ends as that of the feed-forward does, and is none of it.
    assert not any("attention" in name for name in found["feed-forward"])


def test_the_table_is_markdown():
    row = Row("x", 2, 3000, 0.5, 0.51, 0.52, 0.5, 0.54)
    assert table([row]).splitlines()[-1] == (
        "| x | 2 | 3,000 | 0.500 | 0.510 | 0.520 | 0.500 to 0.540 |"
    )


@pytest.mark.slow
def test_a_run_predicts_and_measures(tmp_path):
    out = tmp_path / "times.json"
    words = f"--rows 2 --length 8 --rounds 1 --step-times 0.9 --device cpu --out {out}"
    assert step_times.main(words.split()) == 0
    found = json.loads(out.read_text())
    assert len(found["rows"]) == 9
    assert all(row["model"] > 0 and row["measured"] > 0 for row in found["rows"])
    searched = [row for row in found["rows"] if row["name"].startswith("searched")]
    assert len(searched) == 2 and searched[0]["model"] > 0
    assert found["about"]["calibration"]["steps"] == found["about"]["fitted_steps"] == 9
