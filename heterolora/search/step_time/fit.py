"""Fit the model of the step's time to measured training steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from heterolora.fusion.fuse import fuse
from heterolora.search.preserve import preserved, seeded
from heterolora.search.scores.probe import attach, progress, timed_step
from heterolora.search.scores.proxies import Batch, model_device
from heterolora.search.step_time.model import Calibration, StepTime

if TYPE_CHECKING:
    from heterolora.search.allocation import Allocation

__all__ = ["calibrated", "fit", "samples"]

logger = logging.getLogger("heterolora")


def calibrated(
    step: StepTime, model: nn.Module, batch: Batch, everywhere: Allocation, *, rounds: int = 3
) -> StepTime:
    """`step` with factors fitted to measured steps of `model`, which is left as it was.

    Each of `samples` is put on the model and fused, runs two steps of which the second is timed,
    and is taken off again; the rounds go through them forwards and backwards, and of the times of
    each the least counts.

    Args:
        batch: the one that `step` was traced with.
        everywhere: an allocation on this model whose ranks are all above 0.

    Raises:
        ModelError, DataError, ScoreError: the model cannot be trained on the batch.
    """
    tried = samples(step, max(everywhere.ranks.values()))
    times = np.full(len(tried), np.inf)
    there = list(range(len(tried)))
    order = [i for turn in range(rounds) for i in (there, there[::-1])[turn % 2]]
    with seeded(0), torch.enable_grad(), progress() as bar:
        for index in bar.track(order, description="measuring steps"):
            times[index] = min(times[index], _measured(model, batch, everywhere, tried[index]))
    found = fit(np.array([step.parts(ranks) for ranks in tried]), times)
    logger.info(
        "step time fitted to %d measured steps: factors %s, largest error %.1f %%",
        found.steps,
        ", ".join(f"{factor:.2f}" for factor in found.factors),
        100 * found.error,
    )
    return replace(step, calibration=found)


def samples(step: StepTime, rank: int) -> list[dict[str, int]]:
    """Allocations that differ in the depth of the backward pass, in the number of adapters and in
    their rank; fewer where two are the same."""
    names = [group.names for group in step.groups]
    count = len(names)
    picked = {
        "uniform": names,
        "top half": names[count // 2 :],
        "top quarter": names[count - max(1, count // 4) :],
        "top": names[-1:],
        "lowest": names[:1],
        "every third": names[::3],
        "first of each group": [members[:1] for members in names],
    }
    found = [{n: rank for members in some for n in members} for some in picked.values()]
    found += [dict.fromkeys(step.uniform(1), r) for r in (1, 4 * rank)]
    return [ranks for i, ranks in enumerate(found) if ranks and ranks not in found[:i]]


def fit(parts: np.ndarray, seconds: np.ndarray) -> Calibration:
    """Factors >= 0 of the least squared relative error, and the error of leaving each step out.

    Args:
        parts: [steps, parts] of `StepTime.parts`.
        seconds: [steps] as measured.
    """
    factors = _least_squares(parts, seconds)
    errors = []
    for left in range(len(seconds)):
        others = np.arange(len(seconds)) != left
        guess = parts[left] @ _least_squares(parts[others], seconds[others])
        errors.append(abs(guess / seconds[left] - 1))
    return Calibration(tuple(float(f) for f in factors), float(max(errors)), len(seconds))


def _least_squares(parts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """By trying every set of factors above 0: there are few."""
    rows, count = parts / seconds[:, None], parts.shape[1]
    best, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for used in map(list, combinations(range(count), size)):
            factors = np.zeros(count)
            factors[used] = np.linalg.lstsq(rows[:, used], np.ones(len(rows)), rcond=None)[0]
            error = float(((rows @ factors - 1) ** 2).sum())
            if factors.min() >= 0 and error < least:
                best, least = factors, error
    return best


def _measured(
    model: nn.Module, batch: Batch, everywhere: Allocation, ranks: Mapping[str, int]
) -> float:
    full = {name: ranks.get(name, 0) for name in everywhere.ranks}
    with preserved(model):
        probe = attach(model, replace(everywhere, ranks=full).lora_config)
        fuse(probe)
        return timed_step(probe, batch, _clock(model_device(model)))


def _clock(device: torch.device) -> Callable[[], float]:
    """Of one thread on a CPU its own time, which other processes disturb less than wall time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter
