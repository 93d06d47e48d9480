"""The base matmul by oneDNN, where that beats the BLAS that torch calls.

torch computes float32 matmuls on x86 with MKL, which on an AMD processor leaves a tenth of the
speed behind: oneDNN's took 0.87 to 0.96 of the time on an EPYC with AVX-512 (docs/ledger.md). The
op is the one that torch's own compiler emits for frozen linear layers.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["add_matmul", "linear", "matmul", "preferred"]

# Below this many multiply-adds oneDNN's set-up of some 10 us outweighs what it saves.
_SMALLEST = 2**22


def preferred(x: Tensor, weight: Tensor) -> bool:
    """Whether the products of rows x [m, k] or [m, n] with weight [n, k] should go through here."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[0] * weight.numel() >= _SMALLEST
        and (weight.is_contiguous() or weight.t().is_contiguous())
        and _faster_here()
    )


@cache
def _faster_here() -> bool:
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() == "AuthenticAMD"
    )


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    vendors = (line.partition(":")[2] for line in lines if line.startswith("vendor_id"))
    return next(vendors, "").strip()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b [m, n], for x [m, k] and weight [n, k]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """x W [m, k], for x [m, n] and weight [n, k]."""
    return torch.ops.mkldnn._linear_pointwise(x, weight.t(), None, "none", [], "")


def add_matmul(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total + x W [m, k], a new tensor, for x [m, n] and weight [n, k]."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight.t(), None, "add")
