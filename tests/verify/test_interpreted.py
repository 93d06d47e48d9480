"""The quick part of rung 3, in a process of its own: in this one Triton may compile already."""

import argparse
import json

import pytest

from heterolora.verify import add_arguments, run
from heterolora.verify.rungs import RUNGS, Request


@pytest.mark.slow
def test_triton_interpreted_is_as_exact_as_spec(tmp_path):
    missing = RUNGS[3].missing(Request())
    if missing:
        pytest.skip(missing)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    target = tmp_path / "verify.json"
    status = run(parser.parse_args(["--rung", "3", "--quick", "--json", str(target)]))
    (rung,) = json.loads(target.read_text())["rungs"]
    assert (status, rung["status"], rung["failures"]) == (0, "passed", {})
    # Both the package's own cases and the tests with bfloat16 and guard buffers ran.
    assert rung["skipped"] == {}
    assert rung["checks"] > 50
