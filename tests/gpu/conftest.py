"""Rung 5: what only a CUDA device can show.

    python -m pytest tests/gpu

needs torch, triton and pytest, and the test of a fused model peft too. Without a device every test
is collected and skipped.
"""

import os
from pathlib import Path

# cuBLAS reads it when it starts; without, torch refuses deterministic products.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from heterolora.kernels.dispatch import triton_reason

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    reason = "no CUDA device"
    if torch.cuda.is_available():
        reason = triton_reason(torch.empty(0, device="cuda"))
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def room():
    """Skips where fewer bytes of device memory are free than a test needs."""

    def need(size):
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        if free < size:
            pytest.skip(f"needs {size / 2**30:.0f} GiB of device memory, {free / 2**30:.0f} free")

    yield need
    torch.cuda.empty_cache()
