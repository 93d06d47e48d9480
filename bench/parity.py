"""The gate before any timing: the fused step computes what PEFT computes, and the fused op really
ran.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.bench.models import Step, adapter_parameters

__all__ = ["Parity", "check_parity", "fusion_problem"]

FP32_LIMIT = 1e-5
LOW_PRECISION_FACTOR = 2.0


@dataclass(frozen=True)
class Parity:
    """Outcome of the gate.

    Attributes:
        green: whether the case may be timed.
        reason: why not; empty when green.
        rule: what the two numbers are and what limit they had to keep.
        loss: error of the loss, see `rule`; None when not finite or not reached.
        gradient: worst error over all adapter factors, see `rule`; None when not finite or not
            reached.
    """

    green: bool
    reason: str = ""
    rule: str = ""
    loss: float | None = None
    gradient: float | None = None


def check_parity(peft: Step, fused: Step) -> Parity:
    """Compares loss and every adapter gradient of `fused` with those of `peft`, same weights,
    batch.

    fp32: relative difference to PEFT (Frobenius norm, factor by factor) at most 1e-5. bf16, fp16:
    error against a float64 copy of the PEFT model at most twice the error that PEFT itself makes.
    """
    low_precision = _base_dtype(peft.module) in (torch.bfloat16, torch.float16)
    # Groups are learned during the first pass; what is timed, and so what is checked, comes after.
    _loss_and_gradients(fused)
    calls = _FusedCalls()
    with calls:
        fused_loss, fused_gradients = _loss_and_gradients(fused)
    problem = fusion_problem(fused, calls.adapters)
    if problem:
        return Parity(False, problem)
    peft_loss, peft_gradients = _loss_and_gradients(peft)
    if fused_gradients.keys() != peft_gradients.keys():
        odd = sorted(fused_gradients.keys() ^ peft_gradients.keys())
        return Parity(False, f"gradients on one side only: {', '.join(odd[:3])}")
    if not low_precision:
        rule = f"relative difference to PEFT, limit {FP32_LIMIT:g}"
        loss = _relative(fused_loss, peft_loss)
        worst, gradient = _worst(fused_gradients, peft_gradients)
        return _verdict(rule, FP32_LIMIT, loss, worst, gradient)

    exact_loss, exact_gradients = _loss_and_gradients(_in_float64(peft))
    rule = f"error against float64 / PEFT's own error, limit {LOW_PRECISION_FACTOR:g}"
    # One scalar can be right by luck: PEFT's own error counts as at least one rounding step of the
    # model's dtype.
    step = torch.finfo(_base_dtype(peft.module)).eps
    loss = _relative(fused_loss, exact_loss) / max(_relative(peft_loss, exact_loss), step)
    ratios = {
        name: _relative(fused_gradients[name], exact)
        / max(_relative(peft_gradients[name], exact), torch.finfo(torch.float32).eps)
        for name, exact in exact_gradients.items()
    }
    worst = _first_worst(ratios)
    return _verdict(rule, LOW_PRECISION_FACTOR, loss, worst, ratios[worst])


def fusion_problem(fused: Step, adapters_run: int) -> str:
    """Why `fused` is not fused; empty when it covers every LoRA layer and the op ran for each."""
    from peft.tuners.lora import LoraLayer

    base: nn.Module = fused.module.get_base_model()  # type: ignore[operator]
    wanted = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    report = fused.fuse_report
    covered: Mapping[str, Any] = {} if report is None else report.fused
    missing = sorted(wanted - set(covered))
    if missing:
        declined = {} if report is None else report.declined
        why = declined.get(missing[0], "the report does not name it")
        return f"not fused: {len(missing)} of {len(wanted)} LoRA layers, first {missing[0]} ({why})"
    if adapters_run != len(wanted):
        return f"not fused: {adapters_run} of {len(wanted)} adapters went through the fused op"
    return ""


class _FusedCalls(TorchDispatchMode):
    """Counts the adapters that `heterolora::group_linear` computes, whatever `fuse` reports."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.heterolora.group_linear.default:
            factors_a = args[3]
            self.adapters += len(factors_a)
        return func(*args, **(kwargs or {}))


def _loss_and_gradients(step: Step) -> tuple[Tensor, dict[str, Tensor]]:
    step.clear_gradients()
    loss = step.forward()
    loss.backward()
    gradients = {
        name: parameter.grad.double()
        for name, parameter in adapter_parameters(step.module).items()
        if parameter.grad is not None
    }
    step.clear_gradients()
    return loss.detach().double(), gradients


def _in_float64(peft: Step) -> Step:
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in peft.inputs.items()
    }
    return Step(copy.deepcopy(peft.module).double(), inputs, peft.loss)


def _base_dtype(module: nn.Module) -> torch.dtype:
    return next(p.dtype for p in module.parameters() if not p.requires_grad)


def _relative(value: Tensor, reference: Tensor) -> float:
    norm = reference.norm().item()
    difference = (value - reference).norm().item()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / norm


def _worst(values: Mapping[str, Tensor], references: Mapping[str, Tensor]) -> tuple[str, float]:
    errors = {name: _relative(values[name], reference) for name, reference in references.items()}
    worst = _first_worst(errors)
    return worst, errors[worst]


def _first_worst(errors: Mapping[str, float]) -> str:
    # NaN compares as neither larger nor smaller; it has to win.
    return max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))


def _verdict(rule: str, limit: float, loss: float, worst: str, gradient: float) -> Parity:
    problems = []
    # `not <=` rather than `>`: NaN is red.
    if not loss <= limit:
        problems.append(f"loss {loss:.3g}")
    if not gradient <= limit:
        problems.append(f"gradient of {worst} {gradient:.3g}")
    reason = f"parity: {', '.join(problems)} ({rule})" if problems else ""
    return Parity(not problems, reason, rule, _finite(loss), _finite(gradient))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
