"""The faults that `mutation/run.py` plants still have their lines to replace."""

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def _faults():
    spec = importlib.util.spec_from_file_location("faults", TESTS / "mutation" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAULTS


@pytest.mark.parametrize("fault", _faults(), ids=lambda fault: fault.name)
def test_a_fault_can_be_planted(fault):
    text = (TESTS.parent / "kernels" / "lora" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1
    assert fault.old != fault.new
