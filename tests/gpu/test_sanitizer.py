"""compute-sanitizer finds nothing in one small case of each kernel."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "sanitized.py"
ROOT = SCRIPT.parents[2]
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


def _run(*prefix):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        # Each tensor an allocation of its own, so that a step outside it is one outside memory.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    return subprocess.run(
        [*prefix, sys.executable, str(SCRIPT)],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )


@pytest.fixture(scope="module")
def kernels():
    """Those that run, in a plain run that also fills Triton's cache."""
    done = _run()
    assert done.returncode == 0, done.stderr[-2000:]
    names = re.search(r"^ran: (.*)$", done.stdout, re.MULTILINE).group(1).split()
    assert {"pack_kernel", "shrink_kernel", "expand_kernel"} <= set(names)
    return names


@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_finding(tool, kernels):
    done = _run(TOOL, "--tool", tool, "--error-exitcode", "9")
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-3000:]
    assert re.search(r"ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards", text), text[-3000:]
    assert "ran: " + " ".join(kernels) in text
