"""Which path a group takes, and why.

A path is "peft" (the layers run PEFT's own forward), "aten" or "triton". It is the quickest of
those measured on the device at this shape or at the nearest one (:mod:`.tuned.measured`); where
nothing near was measured it is "aten", or below `FEW_ROWS` rows "peft". Nothing predicts. It
depends on shapes alone, not on whether gradients are enabled: a recomputed forward pass has to
repeat the first one to the bit.
"""

import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .group import Branch, Site, bucket
from .tuned.measured import GroupShape, LowRank, MeasuredPath, Tuned, device_name, shipped_for

__all__ = [
    "FEW_ROWS",
    "IMPLEMENTATIONS",
    "Choice",
    "advice",
    "choose",
    "decide",
    "quickest",
    "triton_reason",
]

IMPLEMENTATIONS = ("auto", "aten", "triton")

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Rows assumed where a compiler leaves them open: a training batch.
_LARGE_M = 8192
# Below so many rows PEFT's own layers run where nothing near was measured. On one core of an AMD
# EPYC (tuned/amd-epyc.json; 384 to 4096 columns, one layer or q, k and v) `aten` took 0.98 to 1.72
# of PEFT's time at 64 rows, where its Python costs more than it saves, 0.80 to 1.19 at 256 and 0.76
# to 0.95 at 1,024.
FEW_ROWS = 256
# A measured shape counts as near when each of its sizes is within this factor.
_NEAR = 2.0


# A `GroupShape` as plain numbers, which are hashed at every call: m, columns of the sources,
# outputs of the sites, (rank, site, source, dropped out) of the branches, bytes of an element of x
# and of A.
_Key = tuple[
    int,
    tuple[int, ...],
    tuple[int, ...],
    tuple[tuple[int, int, int, bool], ...],
    int,
    int,
]


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
    # Triton takes seconds to import.
    from .gpu.pack import pack_kernel

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

    "auto" is "aten" on a CPU. On a GPU it is the quicker of the two, where that was measured, else
    "aten".

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
    return _looked_up(x, x.dtype, factors, sites, branches, ("aten", "triton"), False).path


def quickest(
    x: Tensor, sites: Sequence[Site], branches: Sequence[Branch], *, captured: bool = False
) -> Choice:
    """The path for a group, PEFT's own layers included, forward and backward together.

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
    return _looked_up(x, dtype, factors, sites, branches, among, captured)


def _looked_up(
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
    key = (
        _rows(x),
        tuple(columns),
        tuple(operator.index(site.weight.shape[0]) for site in sites),
        tuple(low_rank),
        dtype.itemsize,
        max([f.dtype.itemsize for f in factors] or [dtype.itemsize]),
    )
    return _decide(x.device, key, among, captured)


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
def _decide(device: torch.device, key: _Key, among: tuple[str, ...], captured: bool) -> Choice:
    return _cached(device, key, among, captured)


@lru_cache(maxsize=4096)
def _cached(device: torch.device, key: _Key, among: tuple[str, ...], captured: bool) -> Choice:
    m, columns, sites, branches, itemsize, factor_itemsize = key
    low_rank = tuple(LowRank(*branch) for branch in branches)
    shape = GroupShape(m, columns, sites, low_rank, itemsize, factor_itemsize)
    return decide(shape, shipped_for(device_name(device)), among, captured=captured)


def advice(device: torch.device) -> str | None:
    """One line for a GPU that nobody has measured, or None."""
    if device.type != "cuda" or shipped_for(device_name(device)) is not None:
        return None
    return (
        f"nothing was measured on {device_name(device)}, so groups run on aten; "
        "`python -m heterolora.bench gpu --tune --out DIR` measures paths and tiles in some minutes"
    )


def decide(
    shape: GroupShape, tuned: Tuned | None, among: Sequence[str], *, captured: bool = False
) -> Choice:
    """The path for a group: the quickest as measured, else at the nearest shape, else the default.

    Args:
        shape: of the group.
        tuned: what was measured on the device, if anything.
        among: the paths that can run.
        captured: whether a CUDA graph launches everything. What was measured then counts for
            nothing, since the host launched it, and few rows are no reason for PEFT's own layers.
    """
    if len(among) == 1:
        return Choice(among[0], "the only path that can run")
    near = None if captured or tuned is None else _nearest(shape, tuned.paths, among)
    if near is None:
        return _default(shape, among, captured)
    how = "measured"
    if _signature(near.shape) != _signature(shape):
        how = f"measured at m {near.shape.m}, n {', '.join(map(str, near.shape.sites))}"
    seconds = near.seconds
    path = min(among, key=seconds.__getitem__)
    others = ", ".join(f"{name} {seconds[name] * 1e3:.3g}" for name in among if name != path)
    return Choice(path, f"{seconds[path] * 1e3:.3g} ms {how}, {others}")


def _default(shape: GroupShape, among: Sequence[str], captured: bool) -> Choice:
    if "aten" not in among:
        return Choice("peft", "active dropout, and not measured on this device")
    if "peft" in among and shape.m < FEW_ROWS and not captured:
        return Choice("peft", f"not measured on this device, and fewer than {FEW_ROWS} rows")
    return Choice("aten", "not measured on this device")


def _nearest(
    shape: GroupShape, paths: Sequence[MeasuredPath], among: Sequence[str]
) -> MeasuredPath | None:
    """The measured group of the same kind with the least sum of |log2| of the ratios of its sizes,
    each within a factor of `_NEAR`."""
    kind, sizes = _signature(shape)
    best, least = None, math.inf
    for entry in paths:
        other, theirs = _signature(entry.shape)
        if other != kind or not set(among) <= set(entry.seconds):
            continue
        steps = [abs(math.log2(a / b)) for a, b in zip(sizes, theirs, strict=True)]
        if max(steps) <= math.log2(_NEAR) and sum(steps) < least:
            best, least = entry, sum(steps)
    return best


def _signature(shape: GroupShape) -> tuple[tuple[object, ...], tuple[int, ...]]:
    """What has to be equal for a measurement to count, and the sizes that may be near."""
    kind = (
        shape.itemsize,
        shape.factor_itemsize,
        len(shape.sources),
        len(shape.sites),
        any(branch.dropout for branch in shape.live),
    )
    columns = sum(bucket(branch.rank) for branch in shape.live)
    m = _power_of_two(shape.m)
    return kind, (max(m, 1), *shape.sources, *shape.sites, max(columns, 1))
