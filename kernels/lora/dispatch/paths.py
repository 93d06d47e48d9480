"""Which path a group takes, and why.

A path is "peft" (the layers run PEFT's own forward), "aten" or "triton". It is looked up among what
was measured on the device (:mod:`.measured`), else taken from the nearest shape that was, else from
the cost model (:mod:`.cost`). It depends on shapes alone, not on whether gradients are enabled: a
recomputed forward pass has to repeat the first one to the bit.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..cost import LowRank, Problem, estimate
from ..devices import CPU, Device, cpu_name, device_for
from ..group import Branch, Site, bucket
from .measured import MeasuredPath, Tuned, shipped_for

__all__ = [
    "IMPLEMENTATIONS",
    "Choice",
    "advice",
    "choose",
    "decide",
    "known",
    "quickest",
    "triton_reason",
]

IMPLEMENTATIONS = ("auto", "aten", "triton")

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Rows assumed where a compiler leaves them open: a training batch.
_LARGE_M = 8192
# A measured shape counts as near when each of its sizes is within this factor.
_NEAR = 2.0


class Choice(NamedTuple):
    """A path and the reason for it, in words."""

    path: str
    reason: str


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
    from ..gpu.pack import pack_kernel

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

    "auto" is "aten" on a CPU. On a GPU it is the better of the two by :func:`expected`.

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
    return _expected(x, x.dtype, factors, sites, branches, ("aten", "triton"), False).path


def quickest(
    x: Tensor, sites: Sequence[Site], branches: Sequence[Branch], *, captured: bool = False
) -> Choice:
    """The path expected to take the least time, forward and backward together, PEFT's own included.

    The number of rows counts rounded up to a power of two, so that the answer does not change with
    every batch; rows that a compiler leaves open count as many.

    Args:
        x, sites, branches: of a group, as :func:`choose`; under autocast as they come.
        captured: whether a CUDA graph launches everything, so that the host's time counts nothing.
    """
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    factors = [f for branch in branches for f in (branch.a, branch.b)]
    among: tuple[str, ...] = ("peft", "aten")
    runs = 0 not in {x.shape[-1], *(site.weight.shape[0] for site in sites)} and kind != "cpu"
    if runs and _triton_reason(x.device, dtype, tuple(f.dtype for f in factors)) is None:
        # `aten` makes dropout's masks one operation at a time.
        among = ("peft", "triton") if any(b.dropout for b in branches) else (*among, "triton")
    return _expected(x, dtype, factors, sites, branches, among, captured)


def _expected(
    x: Tensor,
    dtype: torch.dtype,
    factors: Sequence[Tensor],
    sites: Sequence[Site],
    branches: Sequence[Branch],
    among: tuple[str, ...],
    captured: bool,
) -> Choice:
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
    return _decide(
        x.device,
        _rows(x),
        tuple(columns),
        tuple(operator.index(site.weight.shape[0]) for site in sites),
        tuple(low_rank),
        dtype.itemsize,
        max([f.dtype.itemsize for f in factors] or [dtype.itemsize]),
        among,
        captured,
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


# A compiler takes the answer as a constant and need not trace what it rests on.
@torch.compiler.assume_constant_result
def _decide(
    device: torch.device,
    m: int,
    columns: tuple[int, ...],
    sites: tuple[int, ...],
    branches: tuple[tuple[int, int, int, bool], ...],
    itemsize: int,
    factor_itemsize: int,
    among: tuple[str, ...],
    captured: bool,
) -> Choice:
    return _cached(device, m, columns, sites, branches, itemsize, factor_itemsize, among, captured)


@lru_cache(maxsize=4096)
def _cached(
    device: torch.device,
    m: int,
    columns: tuple[int, ...],
    sites: tuple[int, ...],
    branches: tuple[tuple[int, int, int, bool], ...],
    itemsize: int,
    factor_itemsize: int,
    among: tuple[str, ...],
    captured: bool,
) -> Choice:
    low_rank = tuple(LowRank(*branch) for branch in branches)
    problem = Problem(m, columns, sites, low_rank, itemsize, factor_itemsize)
    tuned, ceilings = known(device)
    return decide(problem, ceilings, tuned, among, captured=captured)


def known(device: torch.device) -> tuple[Tuned | None, Device]:
    """What was measured on a device that is here, and the ceilings that :func:`decide` takes."""
    if device.type != "cuda":
        return shipped_for(cpu_name()), CPU
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    tuned = shipped_for(name)
    if tuned is not None and tuned.ceilings is not None:
        return tuned, tuned.ceilings
    return tuned, device_for(name, capability)


def advice(device: torch.device) -> str | None:
    """One line for a GPU that nobody has measured, or None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if shipped_for(name) is not None:
        return None
    return (
        f"nothing was measured on {name}: paths come from a cost model, tiles are defaults; "
        "`python -m heterolora.bench gpu --tune --out DIR` measures both in some minutes"
    )


def decide(
    problem: Problem,
    device: Device,
    tuned: Tuned | None,
    among: Sequence[str],
    *,
    captured: bool = False,
) -> Choice:
    """The path for a group: as measured, else as at the nearest shape measured, else as modelled.

    Args:
        problem: shapes of the group.
        device: ceilings for the cost model.
        tuned: what was measured on the device, if anything.
        among: the paths that can run; of equals the first.
        captured: of :func:`expected`. What was measured then counts for nothing: it was launched by
            the host.
    """
    if len(among) == 1:
        return Choice(among[0], "the only path that can run")
    near = None if captured or tuned is None else _nearest(problem, tuned.paths, among)
    if near is not None:
        seconds, how = near.seconds, "measured"
        if _signature(near.problem) != _signature(problem):
            how = f"measured at m {near.problem.m}, n {', '.join(map(str, near.problem.sites))}"
    else:
        found = estimate(problem, device.captured() if captured else device)
        seconds, how = {name: found[name].seconds for name in among}, "by the cost model"
    path = min(among, key=seconds.__getitem__)
    others = ", ".join(f"{name} {seconds[name] * 1e3:.3g}" for name in among if name != path)
    return Choice(path, f"{seconds[path] * 1e3:.3g} ms {how}, {others}")


def _nearest(
    problem: Problem, paths: Sequence[MeasuredPath], among: Sequence[str]
) -> MeasuredPath | None:
    """The measured group of the same kind with the least sum of |log2| of the ratios of its sizes,
    each within a factor of `_NEAR`."""
    kind, sizes = _signature(problem)
    best, least = None, math.inf
    for entry in paths:
        other, theirs = _signature(entry.problem)
        if other != kind or not set(among) <= set(entry.seconds):
            continue
        steps = [abs(math.log2(a / b)) for a, b in zip(sizes, theirs, strict=True)]
        if max(steps) <= math.log2(_NEAR) and sum(steps) < least:
            best, least = entry, sum(steps)
    return best


def _signature(problem: Problem) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """What has to be equal for a measurement to count, and the sizes that may be near."""
    kind = (
        problem.itemsize,
        problem.factor_itemsize,
        len(problem.sources),
        len(problem.sites),
        any(branch.dropout for branch in problem.live),
    )
    columns = sum(bucket(branch.rank) for branch in problem.live)
    m = _power_of_two(problem.m)
    return kind, (max(m, 1), *problem.sources, *problem.sites, max(columns, 1))
