"""Fixtures for all tests: no network, no leftover random or deterministic state."""

import os

# Read by huggingface_hub when it is imported, so before anything imports it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, so reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch does not fill uninitialised memory"
    yield
    torch.use_deterministic_algorithms(before)
