"""The score op: what one backward pass launches."""

import pytest
import torch

from heterolora.verify.checks import check_parity
from heterolora.verify.groups import GROUPS


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources"])
def test_nothing_is_launched_twice(name, launches):
    problem = check_parity(GROUPS[name], torch.float32, "triton", operation="group_score")
    assert problem is None
    # Forward and backward pack; dY is read for dS, and again for the statistics of dB.
    expected = {"pack": 2, "shrink": 1, "expand": 1, "dy": 1, "dx": 1, "score": 2}
    once = {kernel: count for kernel, count in launches.items() if kernel != "reduce_kernel"}
    assert once == {f"{kernel}_kernel": count for kernel, count in expected.items()}
