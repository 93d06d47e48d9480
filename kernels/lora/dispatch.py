"""Which implementation runs a group, and why.

"auto" takes the implementation that :mod:`.cost` expects to be faster, forward and backward
together. It depends on shapes alone, not on whether gradients are enabled: a recomputed forward
pass has to repeat the first one to the bit.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .cost import LowRank, Problem, fastest
from .devices import device_for
from .layout import Branch, Site

__all__ = ["IMPLEMENTATIONS", "choose", "triton_reason"]

IMPLEMENTATIONS = ("auto", "aten", "triton")

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Rows assumed where a compiler leaves them open: a training batch.
_LARGE_M = 8192


def triton_reason(x: Tensor, factors: Sequence[Tensor] = ()) -> str | None:
    """Why the Triton kernels cannot run on these tensors, or None.

    Looks at devices and dtypes only, so fake tensors will do.

    Args:
        x: the group's input.
        factors: A and B of every branch.
    """
    return _triton_reason(x.device, x.dtype, tuple(f.dtype for f in factors))


# A compiler takes the answer as a constant and need not trace what it rests on.
@torch.compiler.assume_constant_result
def _triton_reason(
    device: torch.device, dtype: torch.dtype, factors: tuple[torch.dtype, ...]
) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    from .pack import pack_kernel

    interpreted = not isinstance(pack_kernel, triton.runtime.JITFunction)
    if device.type == "cpu":
        return None if interpreted else "CPU tensors need Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return f"no Triton kernels for {device.type} tensors"
    if dtype not in _TRITON_DTYPES:
        return f"no Triton kernels for {dtype}"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return "tensor cores of compute capability 8.0 or newer are needed"
    wrong = next((f for f in factors if f not in _TRITON_DTYPES), None)
    return None if wrong is None else f"no Triton kernels for {wrong} factors"


def choose(
    implementation: str,
    x: Tensor,
    factors: Sequence[Tensor] = (),
    sites: Sequence[Site] = (),
    branches: Sequence[Branch] = (),
) -> str:
    """The implementation that runs: "aten" or "triton".

    "auto" is "aten" on a CPU. On a GPU it is what :func:`.cost.fastest` expects, with the number of
    rows rounded up to a power of two; rows that a compiler leaves open count as many.

    Args:
        implementation: "auto", or the one that must run.
        x: the group's input.
        factors: A and B of every branch.
        sites, branches: the group. Without sites "auto" is "triton" wherever that can run.

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
    if reason is None and 0 in {x.shape[-1], *(site.weight.shape[0] for site in sites)}:
        reason = "a layer without inputs or outputs"
    if implementation == "triton" and reason is not None:
        raise ValueError(f"implementation='triton' cannot run here: {reason}")
    if reason is not None:
        return "aten"
    if implementation == "triton" or not sites:
        return "triton"
    return _expected(x, factors, sites, branches)


def _expected(
    x: Tensor, factors: Sequence[Tensor], sites: Sequence[Site], branches: Sequence[Branch]
) -> str:
    inputs: list[Tensor | None] = [x]
    columns = [operator.index(sites[0].weight.shape[1])]
    low_rank = []
    for branch in branches:
        source: Tensor | None = x if branch.source is None else branch.source
        position = next((i for i, known in enumerate(inputs) if known is source), len(inputs))
        if branch.mask is not None:
            # The product with a mask is a tensor of its own.
            position, source = len(inputs), None
        if position == len(inputs):
            inputs.append(source)
            columns.append(operator.index(branch.a.shape[1]))
        rank = operator.index(branch.a.shape[0])
        low_rank.append((rank, branch.site, position, bool(branch.dropout)))
    return _fastest(
        x.device,
        _rows(x),
        tuple(columns),
        tuple(operator.index(site.weight.shape[0]) for site in sites),
        tuple(low_rank),
        x.dtype.itemsize,
        max([f.dtype.itemsize for f in factors] or [x.dtype.itemsize]),
    )


def _rows(x: Tensor) -> int:
    """Rows of x, rounded up to a power of two so that the answer does not change every batch."""
    m = math.prod(x.shape[:-1])
    if not torch.compiler.is_compiling() and isinstance(m, int):
        return _power_of_two(m)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    # Asks without a guard: a guard on m would compile anew for every size.
    for exponent in range(24):
        if statically_known_true(m <= 2**exponent):
            return 2**exponent
    return _LARGE_M


def _power_of_two(m: int) -> int:
    return 1 << max(m - 1, 0).bit_length()


@torch.compiler.assume_constant_result
def _fastest(
    device: torch.device,
    m: int,
    columns: tuple[int, ...],
    sites: tuple[int, ...],
    branches: tuple[tuple[int, int, int, bool], ...],
    itemsize: int,
    factor_itemsize: int,
) -> str:
    return _cached_fastest(device, m, columns, sites, branches, itemsize, factor_itemsize)


@lru_cache(maxsize=4096)
def _cached_fastest(
    device: torch.device,
    m: int,
    columns: tuple[int, ...],
    sites: tuple[int, ...],
    branches: tuple[tuple[int, int, int, bool], ...],
    itemsize: int,
    factor_itemsize: int,
) -> str:
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    low_rank = tuple(LowRank(*branch) for branch in branches)
    problem = Problem(m, columns, sites, low_rank, itemsize, factor_itemsize)
    return fastest(problem, device_for(name, capability))
