"""The gate of a train case beyond one step: fused runs have the losses of PEFT's."""

import math
from dataclasses import replace
from typing import TypeVar

import torch

from heterolora.bench.cases.training import ARMS, ArmRun, Plan, through_op, train_arm
from heterolora.bench.harness.parity import FP32_LIMIT, LOW_PRECISION_FACTOR, Parity, verdict
from heterolora.bench.harness.steps import Workload

__all__ = ["gate_load", "losses_follow"]

AnyLoad = TypeVar("AnyLoad", bound=Workload)

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
# Rows times length of the batch whose gradients the gate compares, in float64 too.
_GATE_TOKENS = 1024


def gate_load(load: AnyLoad) -> AnyLoad:
    """`load` with as many rows of its batch as a gate in float64 can take: there attention keeps
    every score. Only of models that are called with tokens."""
    if "input_ids" not in load.inputs:
        return load
    batch, length = load.inputs["input_ids"].shape
    rows = max(1, _GATE_TOKENS // length)
    if rows >= batch:
        return load
    return replace(
        load,
        inputs={name: value[:rows] for name, value in load.inputs.items()},
        floor_inputs={name: value[:rows] for name, value in load.floor_inputs.items()},
        tokens=load.tokens * rows // batch,
    )


def losses_follow(plan: Plan, gradients: Parity) -> Parity:
    """The second half of the gate: fused runs follow the losses of PEFT's, step for step, and every
    layer that is not left to PEFT for its speed goes through the fused op in every step.

    Uniform ranks, seed 0. float32: relative difference to PEFT at most 1e-5 in every step.
    bfloat16: the error against the same run in float32, from the same first weights, is at most
    twice PEFT's own; root mean squares over the steps, PEFT's at least one rounding step of the
    loss. A short fused run of the searched ranks is counted too.

    Args:
        gradients: outcome of the first half, green.
    """
    steps, counted = plan.recipe.gate_steps, []
    fused = None
    for name in ("fused", "fused-uniform"):
        fused = train_arm(plan, name, steps=steps if name == "fused-uniform" else 3, counted=True)
        through, adapters = through_op(plan, name), _adapters(plan, name)
        if set(fused.adapters_run) != {through}:
            return Parity(
                False,
                f"not fused: {min(fused.adapters_run)} of {through} adapters went through the "
                f"fused op in a step of {name}",
            )
        counted.append(f"{through} of {adapters} adapters of {name} through the op")
    assert fused is not None
    rule, limit, error = _deviation(plan, fused)
    rule = f"losses of {steps} steps: {rule}, limit {limit:g}; {', '.join(counted)}"
    found = verdict(rule, limit, ("losses", error), ("losses", error))
    if not found.green:
        return found
    return replace(found, rule=f"{rule}; {gradients.rule}", gradient=gradients.gradient)


def _deviation(plan: Plan, fused: ArmRun) -> tuple[str, float, float]:
    """What the error of the losses is, its limit, and the error."""
    steps, dtype = len(fused.losses), _base_dtype(plan.load)
    theirs = train_arm(plan, "peft", steps=steps)
    if dtype == torch.float32:
        errors = [abs(error) for error in _relative(fused.losses, theirs.losses)]
        return "relative difference to PEFT", FP32_LIMIT, max(errors)
    wide = _WIDER[dtype]
    exact = train_arm(plan, "peft", steps=steps, dtype=wide).losses
    ours, own = (_root_mean_square(_relative(run.losses, exact)) for run in (fused, theirs))
    rule = f"error against {str(wide).removeprefix('torch.')} / PEFT's own"
    return rule, LOW_PRECISION_FACTOR, ours / max(own, torch.finfo(theirs.loss_dtype).eps)


def _base_dtype(load: Workload) -> torch.dtype:
    return next(load.model.parameters()).dtype


def _adapters(plan: Plan, name: str) -> int:
    return sum(rank > 0 for rank in plan.allocations[ARMS[name].allocation].ranks.values())


def _relative(values: list[float], references: list[float]) -> list[float]:
    return [(a - b) / b for a, b in zip(values, references, strict=True)]


def _root_mean_square(values: list[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
