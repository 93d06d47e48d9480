"""The gate before any timing: the fused step computes what PEFT computes, and the fused op really
ran.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.bench.harness.steps import Step, adapter_parameters

__all__ = ["OpCalls", "Parity", "check_parity", "fusion_problem", "ran", "verdict"]

FP32_LIMIT = 1e-5
LOW_PRECISION_FACTOR = 2.0
DRAWS = 8

# (ours, PEFT's) by the name of the tensor.
_Squares = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Parity:
    """Outcome of the gate.

    Attributes:
        green: whether the case may be timed.
        reason: why not; empty when green.
        rule: what the two numbers are and what limit they had to keep.
        output: worst error of the outputs (for a model, the loss), see `rule`; None when not finite
            or not reached.
        gradient: worst error over all adapter factors and inputs that get a gradient, see `rule`;
            None when not finite or not reached.
    """

    green: bool
    reason: str = ""
    rule: str = ""
    output: float | None = None
    gradient: float | None = None


def check_parity(
    peft: Step, fused: Step, lowp: Step | None = None, *, covers_all: bool = True
) -> Parity:
    """Compares outputs and every gradient of `fused` with those of `peft`, same weights, batch.

    fp32: relative difference to PEFT (Frobenius norm, tensor by tensor) at most 1e-5. bf16, fp16:
    error against a float64 copy of the PEFT model at most twice the error that PEFT itself makes, a
    miss judged again by the root mean square over eight batches.

    Args:
        lowp: PEFT with adapters in the base dtype, whose error then is the measure in bf16 and
            fp16. For a layer alone: with exact x and dY, as no model ever has them, float32
            adapters make the factors' gradients exact to float32.
        covers_all: `fused` comes from `heterolora.fuse`, whose report has to name every layer;
            otherwise it is only counted that every adapter went through the op.
    """
    low_precision = _base_dtype(peft.module) in (torch.bfloat16, torch.float16)
    # Groups are learned during the first pass; what is timed, and so what is checked, comes after.
    _outputs_and_gradients(fused)
    calls = OpCalls()
    with calls:
        found, found_gradients = _outputs_and_gradients(fused)
    problem = fusion_problem(fused, calls.adapters["group_linear"], covers_all=covers_all)
    if problem:
        return Parity(False, problem)
    theirs, their_gradients = _outputs_and_gradients(peft)
    if found_gradients.keys() != their_gradients.keys():
        odd = sorted(found_gradients.keys() ^ their_gradients.keys())
        return Parity(False, f"gradients on one side only: {', '.join(odd[:3])}")
    if not low_precision:
        rule = f"relative difference to PEFT, limit {FP32_LIMIT:g}"
        _, output = _worst(found, theirs)
        worst, gradient = _worst(found_gradients, their_gradients)
        return verdict(rule, FP32_LIMIT, ("output", output), (f"gradient of {worst}", gradient))

    whose = "PEFT's own error" if lowp is None else "PEFT's with bf16 adapters"
    rule = f"error against float64 / {whose}, limit {LOW_PRECISION_FACTOR:g}"
    steps = fused, peft if lowp is None else lowp, peft.in_float64()
    squares = _squared_errors(*steps)
    if _exceeds(squares):
        # One batch can be a lucky one for PEFT, of 2 x 36 tensors especially: the mean decides.
        rule += f", root mean square over {DRAWS} batches"
        squares = _pooled(*steps)
    (_, output), (worst, gradient) = map(_worst_ratio, squares)
    return verdict(
        rule, LOW_PRECISION_FACTOR, ("output", output), (f"gradient of {worst}", gradient)
    )


def _squared_errors(fused: Step, theirs: Step, exact: Step) -> tuple[_Squares, _Squares]:
    """Squared relative errors (ours, PEFT's) of every output, and of every gradient.

    One scalar can be right by luck: PEFT's error counts as at least one rounding step, for an
    output of the model's dtype and for a gradient of float32.
    """
    found, reference, truth = map(_outputs_and_gradients, (fused, theirs, exact))
    least = torch.finfo(_base_dtype(fused.module)).eps, torch.finfo(torch.float32).eps
    outputs, gradients = (
        {
            name: (
                _relative(found[part][name], value) ** 2,
                max(_relative(reference[part][name], value), least[part]) ** 2,
            )
            for name, value in truth[part].items()
        }
        for part in (0, 1)
    )
    return outputs, gradients


def _exceeds(squares: tuple[_Squares, _Squares]) -> bool:
    # `not <=` rather than `>`: NaN is red.
    return any(not _worst_ratio(part)[1] <= LOW_PRECISION_FACTOR for part in squares)


def _pooled(*steps: Step) -> tuple[_Squares, _Squares]:
    """The same, summed over batches of the same numbers in other orders."""
    given = [dict(step.inputs) for step in steps]
    sums: tuple[_Squares, _Squares] = ({}, {})
    try:
        for draw in range(DRAWS):
            for step, inputs in zip(steps, given, strict=True):
                generator = torch.Generator().manual_seed(draw)
                step.inputs.update({k: _permuted(v, generator) for k, v in inputs.items()})
            for total, part in zip(sums, _squared_errors(*steps), strict=True):
                for name, (ours, theirs) in part.items():
                    before = total.get(name, (0.0, 0.0))
                    total[name] = before[0] + ours, before[1] + theirs
    finally:
        for step, inputs in zip(steps, given, strict=True):
            step.inputs.update(inputs)
    return sums


def _permuted(value: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(value.numel(), generator=generator).to(value.device)
    other = value.detach().flatten()[order].view(value.shape)
    return other.requires_grad_(value.requires_grad)


def ran(fused: Step) -> str:
    """As :func:`fusion_problem`, of a step that is run to see."""
    _outputs_and_gradients(fused)
    calls = OpCalls()
    with calls:
        _outputs_and_gradients(fused)
    return fusion_problem(fused, calls.adapters["group_linear"])


def fusion_problem(fused: Step, adapters_run: int, *, covers_all: bool = True) -> str:
    """Why `fused` is not fused; empty when it covers every LoRA layer and the op ran for each."""
    from peft.tuners.lora import LoraLayer

    base: nn.Module = fused.module.get_base_model()  # type: ignore[operator]
    wanted = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    # A shortcut's pair is an adapter without a layer of PEFT's.
    factors = [n for n, p in adapter_parameters(base).items() if "lora_shortcut" in n]
    adapters = len(wanted) + len(factors) // 2
    report = fused.fuse_report
    # Whether one that is left to PEFT for its speed ran all the same is counted below.
    covered: Mapping[str, Any] = {} if report is None else {**report.fused, **report.left}
    missing = sorted(wanted - set(covered)) if covers_all else []
    if missing:
        declined = {} if report is None else report.declined
        why = declined.get(missing[0], "the report does not name it")
        return f"not fused: {len(missing)} of {len(wanted)} LoRA layers, first {missing[0]} ({why})"
    if adapters_run != adapters:
        return f"not fused: {adapters_run} of {adapters} adapters went through the fused op"
    return ""


class OpCalls(TorchDispatchMode):
    """Counts the calls of our ops, and the adapters they computed, whatever `fuse` reports.

    Attributes:
        calls: by name, without "heterolora::".
        adapters: over all calls, by name of the op.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.adapters: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space == "heterolora":
            self.calls[name] += 1
            if name in ("group_linear", "group_score"):
                names = [argument.name for argument in func._schema.arguments]
                self.adapters[name] += len(args[names.index("a")])
        return func(*args, **(kwargs or {}))


def _outputs_and_gradients(step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    step.clear_gradients()
    outputs = step.forward()
    torch.autograd.backward(outputs, step.output_grads)
    leaves = {**adapter_parameters(step.module), **step.inputs}
    gradients = {name: leaf.grad.double() for name, leaf in leaves.items() if leaf.grad is not None}
    step.clear_gradients()
    return {str(i): out.detach().double() for i, out in enumerate(outputs)}, gradients


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


def _worst_ratio(squares: _Squares) -> tuple[str, float]:
    ratios = {name: math.sqrt(ours / theirs) for name, (ours, theirs) in squares.items()}
    worst = _first_worst(ratios)
    return worst, ratios[worst]


def _first_worst(errors: Mapping[str, float]) -> str:
    # NaN compares as neither larger nor smaller; it has to win.
    return max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))


def verdict(rule: str, limit: float, output: tuple[str, float], worst: tuple[str, float]) -> Parity:
    """Green if both errors keep the limit; each comes with what it is the error of."""
    # `not <=` rather than `>`: NaN is red.
    problems = [f"{what} {error:.3g}" for what, error in (output, worst) if not error <= limit]
    reason = f"parity: {', '.join(problems)} ({rule})" if problems else ""
    return Parity(not problems, reason, rule, _finite(output[1]), _finite(worst[1]))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
