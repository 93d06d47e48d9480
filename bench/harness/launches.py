"""Launches per step: what a launch-bound step is made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from heterolora.bench.harness.memory import without_profiler_marks

__all__ = ["launches"]

# Operators that move no data: views, allocations, the bookkeeping around them, and operators that
# only call others. `aten::to` that changes nothing calls none; one that casts runs `aten::copy_`.
_FREE_NAMES = """
    _local_scalar_dense _reshape_alias _unsafe_view alias as_strided contiguous detach detach_
    dropout empty empty_like empty_strided expand expand_as flatten is_nonzero item lift_fresh
    narrow new_empty new_empty_strided permute requires_grad_ reshape resize_ resolve_conj
    resolve_neg result_type select set_ slice split split_with_sizes squeeze squeeze_ t to
    transpose transpose_ unbind unflatten unsafe_split unsqueeze unsqueeze_ view view_as
"""
_FREE = frozenset(f"aten::{name}" for name in _FREE_NAMES.split())


def launches(step: Callable[[], object], device: torch.device) -> int:
    """Kernels that one step launches; on a CPU, operators that touch data.

    On a CPU an operator counts when nothing below it does (`aten::linear` runs `aten::addmm`, which
    is the one counted), so that the number is one for each pass over memory.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with without_profiler_marks(), profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = profiler.events() or []
    if device.type == "cuda":
        return sum(event.device_type == DeviceType.CUDA for event in events)
    return sum(_lowest(event) for event in events if event.cpu_parent is None)


def _lowest(event: Any) -> int:
    below = sum(_lowest(child) for child in event.cpu_children)
    return below or int(event.name.startswith("aten::") and event.name not in _FREE)
