"""Which implementation runs a group, and why."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["IMPLEMENTATIONS", "choose", "triton_reason"]

IMPLEMENTATIONS = ("auto", "aten", "triton")

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_reason(x: Tensor, factors: Sequence[Tensor] = ()) -> str | None:
    """Why the Triton kernels cannot run on these tensors, or None.

    Looks at devices and dtypes only, so fake tensors will do.

    Args:
        x: the group's input.
        factors: A and B of every branch.
    """
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    from .pack import pack_kernel

    interpreted = not isinstance(pack_kernel, triton.runtime.JITFunction)
    if x.device.type == "cpu":
        return None if interpreted else "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if x.device.type != "cuda":
        return f"no Triton kernels for {x.device.type} tensors"
    if x.dtype not in _TRITON_DTYPES:
        return f"no Triton kernels for {x.dtype}"
    if torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "tensor cores of compute capability 8.0 or newer are needed"
    wrong = next((f.dtype for f in factors if f.dtype not in _TRITON_DTYPES), None)
    return None if wrong is None else f"no Triton kernels for {wrong} factors"


def choose(implementation: str, x: Tensor, factors: Sequence[Tensor] = ()) -> str:
    """The implementation that runs: "aten" or "triton".

    Args:
        implementation: "auto", or the one that must run.
        x: the group's input.
        factors: A and B of every branch.

    Raises:
        ValueError: an unknown name, or "triton" where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}; choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "aten":
        return "aten"
    if implementation == "auto" and x.device.type == "cpu":
        return "aten"
    reason = triton_reason(x, factors)
    if implementation == "triton" and reason is not None:
        raise ValueError(f"implementation='triton' cannot run here: {reason}")
    return "triton" if reason is None else "aten"
