"""bitsandbytes and torchao on a CPU, where they are installed: PEFT's own classes, fused."""

import pytest
import torch
from packages import PACKAGES, check


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_is_peft(package, dtype):
    check(package, dtype, "cpu")
