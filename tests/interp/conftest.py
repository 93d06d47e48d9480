"""Rung 3: these tests need Triton's interpreter, which is chosen when triton is imported.

    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m pytest tests/interp

`heterolora verify --rung 3` runs them so, after its own; elsewhere they are skipped.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch

from heterolora.kernels.dispatch import triton_reason

REASON = triton_reason(torch.empty(0))


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: part of the subset that `make test` runs")


def pytest_collection_modifyitems(items):
    for item in items:
        if REASON is not None and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"needs TRITON_INTERPRET=1: {REASON}"))


@pytest.fixture(autouse=True)
def repaired(request):
    """bfloat16 rounds as on a GPU, and what was never written is NaN."""
    if REASON is None:
        from repair import install

        install()
    request.getfixturevalue("poisoned")


@pytest.fixture
def launches(monkeypatch):
    """Counts the launches of each kernel by name."""
    from triton.runtime.interpreter import InterpretedFunction

    counts = Counter()
    run = InterpretedFunction.run

    def counted(self, *args, **options):
        counts[self.fn.__name__] += 1
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    return counts
