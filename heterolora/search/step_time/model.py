"""What a training step costs for an allocation, before anything is trained with it.

A step is the forward pass of the frozen model, its backward pass down to the lowest adapted group,
and for each adapted group what its adapters add::

    t(ranks) = forward + sum_{i >= cut} backward_i + sum_g extra_g(ranks of g, g > cut)

The cut is the first group, in order of execution, with a rank above 0. Autograd stops there: the
group itself needs no gradient of its input, and below it there is only the forward pass. The
operations come from one traced pass (:mod:`heterolora.search.step_time.trace`), their times from
the cost model of the kernels (:mod:`heterolora.kernels.cost`), the path of a group from dispatch.
Relative to uniform LoRA most of what the model leaves out cancels; what does not is fitted to
measured steps (:mod:`heterolora.search.step_time.fit`).

Taken to be needed although it is not: gradients of operations that are executed after the cut but
depend on nothing that is adapted, such as the first self-attention of a decoder where only the
encoder is adapted, or the activation of a gate whose sibling is the cut. Left out: communication
between processes and the data loader. Reentrant checkpointing is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch
from torch import nn

from heterolora.errors import BudgetError
from heterolora.kernels.cost import LowRank, Problem, Step, estimate, load_of
from heterolora.kernels.devices import Device
from heterolora.kernels.dispatch.measured import Tuned
from heterolora.kernels.dispatch.paths import decide, known, triton_reason
from heterolora.search.scores.proxies import Batch, model_device
from heterolora.search.sites import Site, find_sites
from heterolora.search.step_time.trace import Group, Trace, trace

__all__ = ["Calibration", "StepTime"]

# Operations of torch.optim.AdamW for each parameter where it runs one after the other (a CPU); on a
# GPU it runs over all of them at once.
_ADAM_LAUNCHES = 12
# Bytes of parameter, gradient and two moments read, and all but the gradient written, in float32.
_ADAM_READ, _ADAM_WRITTEN = 16, 12


@dataclass(frozen=True)
class Calibration:
    """Measured seconds for each modelled second of the parts of a step (`StepTime.parts`).

    Attributes:
        factors: one for each part.
        error: largest relative error of a measured step, each predicted from the others.
        steps: how many allocations were measured.
    """

    factors: tuple[float, ...]
    error: float
    steps: int


@dataclass(frozen=True)
class StepTime:
    """A model of the time of a training step (forward, backward, AdamW) by allocation.

    Attributes:
        trace: operations of the frozen model.
        device: ceilings.
        tuned: what was measured on the device, for the choice of paths.
        paths: that a group can run on.
        calibration: of a fit to measured steps; None for the cost model alone.
    """

    trace: Trace
    device: Device
    tuned: Tuned | None
    paths: tuple[str, ...]
    calibration: Calibration | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Batch,
        sites: Sequence[Site] | None = None,
        *,
        device: Device | None = None,
        captured: bool = False,
    ) -> StepTime:
        """From one traced pass of `model` (without adapters), which is left as it was.

        Args:
            batch: as in training: its size is what the times are for.
            sites: the candidates; as `heterolora.search.sites.find_sites` if None.
            device: ceilings; those of the model's device if None.
            captured: whether steps will be captured in CUDA graphs.

        Raises:
            DataError, ModelError, ScoreError: the model has no loss for this batch.
        """
        sites = find_sites(model) if sites is None else sites
        where = model_device(model)
        tuned, ceilings = known(where)
        if device is not None:
            tuned, ceilings = None, device
        if captured:
            # What was measured was launched by the host.
            tuned, ceilings = None, ceilings.captured()
        paths: tuple[str, ...] = ("peft", "aten")
        if where.type != "cpu" and triton_reason(torch.empty(0, device=where)) is None:
            paths = (*paths, "triton")
        return cls(trace(model, batch, sites), ceilings, tuned, paths)

    @property
    def groups(self) -> tuple[Group, ...]:
        """In order of execution."""
        return self.trace.groups

    def seconds(self, ranks: Mapping[str, int]) -> float:
        """Of a step with these ranks; candidates that are missing have rank 0.

        Raises:
            BudgetError: every rank is 0, so there is no training step.
        """
        cut = self.cut(ranks)
        cost = self.base(cut)
        for index, group in enumerate(self.groups):
            cost = cost + self.extra(index, _ranks_of(group, ranks), at_cut=index == cut)
        return float(cost.max())

    def relative(self, ranks: Mapping[str, int], rank: int) -> float:
        """`seconds` over those of uniform LoRA of `rank` on every candidate."""
        return self.seconds(ranks) / self.seconds(self.uniform(rank))

    def uniform(self, rank: int) -> dict[str, int]:
        """That rank on every candidate."""
        return {name: rank for group in self.groups for name in group.names}

    def cut(self, ranks: Mapping[str, int]) -> int:
        """Index of the lowest adapted group.

        Raises:
            BudgetError: there is none.
        """
        for index, group in enumerate(self.groups):
            if any(_ranks_of(group, ranks)):
                return index
        raise BudgetError("every rank is 0: a step without adapters trains nothing")

    def base(self, cut: int) -> np.ndarray:
        """Costs of the frozen model, its backward pass down to group `cut`; see `extra`."""
        return self._cost(self._base_parts(cut))

    def extra(self, index: int, ranks: tuple[int, ...], *, at_cut: bool) -> np.ndarray:
        """What these ranks add to group `index`, in seconds that add up over groups.

        Returns:
            As many sums as run beside each other (the device and the host that feeds it, or one);
            a step takes as long as the largest.
        """
        return self._cost(self._extra_parts(index, ranks, at_cut))

    def input_grad(self, index: int, *, at_cut: bool) -> bool:
        """Whether group `index` is taken to need the gradient of its input."""
        above = self.groups[index].above
        return above >= index or (above >= 0 and not at_cut)

    def parts(self, ranks: Mapping[str, int]) -> np.ndarray:
        """Modelled seconds [4] of the parts of a step: the frozen forward and backward pass, calls
        of adapters, work of adapters. A calibration has a factor for each."""
        cut = self.cut(ranks)
        parts = self._base_parts(cut).max(axis=1)
        for index, group in enumerate(self.groups):
            parts += self._extra_parts(index, _ranks_of(group, ranks), index == cut).max(axis=1)
        return parts

    def _cost(self, parts: np.ndarray) -> np.ndarray:
        """Costs of parts [4, 2], whose columns are the device and the host."""
        if self.calibration is None:
            return parts.sum(axis=0)[: 2 if self.device.host else 1]
        return np.array([parts.max(axis=1) @ self.calibration.factors])

    def _base_parts(self, cut: int) -> np.ndarray:
        passes = [self.trace.forward, chain.from_iterable(self.trace.backward[cut:])]
        loads = [load_of(steps, self.device) for steps in passes]
        return np.array([*((load.device, load.host) for load in loads), (0.0, 0.0), (0.0, 0.0)])

    def _extra_parts(self, index: int, ranks: tuple[int, ...], at_cut: bool) -> np.ndarray:
        problem = self.groups[index].problem
        sites = [n for n, rank in zip(problem.sites, ranks, strict=True) if rank]
        live = tuple(LowRank(rank, i) for i, rank in enumerate(filter(None, ranks)))
        if not live:
            return np.zeros((4, 2))
        # Frozen siblings run by themselves.
        problem = replace(problem, sites=tuple(sites), branches=live)
        needed = self.input_grad(index, at_cut=at_cut)
        return _adapters(problem, self.device, self.tuned, self.paths, needed)


def _ranks_of(group: Group, ranks: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(ranks.get(name, 0) for name in group.names)


def _adapters(
    problem: Problem, device: Device, tuned: Tuned | None, paths: tuple[str, ...], input_grad: bool
) -> np.ndarray:
    """Parts [4, 2] of a group with adapters, less those of its frozen layers."""
    # Dispatch looks at shapes alone, so the path is the same at the cut.
    path = decide(problem, device, tuned, paths).path
    found = estimate(replace(problem, input_grad=input_grad), device)
    work = calls = np.zeros(2)
    for ours, frozen in (
        (found[path].forward, found["base"].forward),
        (found[path].backward, found["base"].backward),
    ):
        work = work + (ours.device_seconds - frozen.device_seconds, 0.0)
        host = ours.host_seconds - frozen.host_seconds
        # A host that does not run ahead of the device has its time added to the device's.
        calls = calls + ((0.0, host) if ours.ahead else (host, 0.0))
    work = work + (load_of(_optimizer(problem, device), device).device, 0.0)
    return np.array([(0.0, 0.0), (0.0, 0.0), calls, work])


def _optimizer(problem: Problem, device: Device) -> list[Step]:
    """AdamW on the A and B of every branch."""
    size = sum(b.rank * (problem.sources[b.source] + problem.sites[b.site]) for b in problem.live)
    launches = 2 * _ADAM_LAUNCHES * len(problem.live) if device.host == 0 else 0
    return [Step("AdamW", _ADAM_READ * size, _ADAM_WRITTEN * size, launches=launches)]
