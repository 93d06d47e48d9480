"""The scoring cases: one batch of the static search, with an adapter on every candidate.

`base-only` is one frozen forward and backward pass; `peft` the plain route: PEFT's own forward,
gradients by autograd, then one norm at a time in Python; `fused` the proxy that
`heterolora.allocate` calls, whose gradients the score op measures.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import heterolora
from heterolora.bench.cases import peers
from heterolora.bench.harness.parity import (
    FP32_LIMIT,
    LOW_PRECISION_FACTOR,
    OpCalls,
    Parity,
    verdict,
)
from heterolora.bench.harness.steps import SEED, Step, Workload, with_adapters
from heterolora.fusion.fuse import fusion_of
from heterolora.search.scores.backward import Scorer
from heterolora.search.scores.gradients import branch_factors
from heterolora.search.scores.probe import draw_b
from heterolora.search.scores.proxies import PROXIES

__all__ = ["PlainStep", "ScoringStep", "build_step", "check_parity"]


@dataclass
class PlainStep(Step):
    """The plain route.

    Args:
        proxy: "grad-norm" or "snip".
    """

    proxy: str = "grad-norm"

    def scores(self) -> dict[str, float]:
        """One number for every candidate, by name."""
        self.clear_gradients()
        torch.autograd.backward(self.forward(), self.output_grads)
        return {
            name: sum(self._measured(factor) for factor in pair)
            for name, pair in branch_factors(self.module).items()
        }

    def _measured(self, factor: Tensor) -> float:
        if factor.grad is None:
            return 0.0
        if self.proxy == "grad-norm":
            return factor.grad.norm().item()
        return (factor.detach() * factor.grad).abs().sum().item()

    def __call__(self) -> None:
        self.scores()


@dataclass
class ScoringStep(Step):
    """The score op, as the search uses it.

    Args:
        proxy: "grad-norm" or "snip".
    """

    proxy: str = "grad-norm"

    def forward(self) -> list[Tensor]:
        fusion = fusion_of(self.module)
        assert fusion is not None
        fusion.runner = Scorer(branch_factors(self.module))
        try:
            return super().forward()
        finally:
            fusion.runner = None

    def scores(self) -> dict[str, float]:
        """One number for every candidate, by name."""
        return PROXIES[self.proxy](self.module, [self.inputs])

    def __call__(self) -> None:
        self.scores()


def build_step(
    variant: str,
    workload: Workload,
    ranks: Mapping[str, int],
    dropout: float = 0.0,
    *,
    proxy: str = "grad-norm",
) -> Step:
    """A search pass over one batch. Takes over `workload.model`, as `peers.build_step`.

    Args:
        variant: "base-only", "peft" or "fused".
        workload: a transformers model whose inputs hold labels.
        ranks: of the probe adapter; `allocate` takes 8 everywhere.
        proxy: "grad-norm", with B = 0 as `allocate` has it then, or "snip", with a drawn B.
    """
    if variant == peers.FLOOR:
        return peers.build_step(variant, workload, ranks)
    model = with_adapters(workload, ranks, dropout=dropout)
    if PROXIES[proxy].nonzero_b:
        draw_b(model, SEED)
    else:
        draw_b(model, SEED, std=0.0)
    if variant == peers.BASELINE:
        return PlainStep.of(workload, model, proxy=proxy)
    report = heterolora.fuse(model, example=workload.inputs)
    return ScoringStep.of(workload, model, proxy=proxy, fuse_report=report)


def check_parity(peft: PlainStep, fused: ScoringStep) -> Parity:
    """Compares the loss and every score of `fused` with those of `peft`; same weights, batch.

    fp32: relative difference to the plain route, score by score, at most 1e-5. bf16, fp16: error
    against the plain route in float64 at most twice the plain route's own; of the scores the root
    of the mean squared relative error, since a single number can be right by luck.
    """
    calls = OpCalls()
    with calls:
        found = fused.scores()
    candidates = len(branch_factors(fused.module))
    measured = calls.adapters["group_score"]
    if measured != candidates:
        return Parity(False, f"{measured} of {candidates} candidates were measured by the op")
    theirs = peft.scores()
    if list(found) != list(theirs):
        return Parity(False, "the two routes score other modules")
    losses = [_loss(step) for step in (fused, peft)]
    dtype = next(p.dtype for p in peft.module.parameters() if not p.requires_grad)
    if dtype not in (torch.bfloat16, torch.float16):
        rule = f"relative difference to the plain route, limit {FP32_LIMIT:g}"
        errors = _errors(found, theirs)
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
        loss = _relative(*losses)
        return verdict(rule, FP32_LIMIT, ("loss", loss), (f"score of {worst}", errors[worst]))
    wide = peft.in_float64()
    exact = PlainStep(wide.module, wide.inputs, wide.run, wide.output_grads, proxy=peft.proxy)
    truth, true_loss = exact.scores(), _loss(exact)
    rule = f"error against float64 / the plain route's own, limit {LOW_PRECISION_FACTOR:g}"
    # The plain route's own error counts as at least one rounding step.
    step = torch.finfo(dtype).eps
    loss = _relative(losses[0], true_loss) / max(_relative(losses[1], true_loss), step)
    own = max(_root_mean_square(_errors(theirs, truth)), torch.finfo(torch.float32).eps)
    score = _root_mean_square(_errors(found, truth)) / own
    return verdict(rule, LOW_PRECISION_FACTOR, ("loss", loss), ("scores", score))


def _loss(step: Step) -> float:
    with torch.no_grad():
        (loss,) = step.run(step.module, step.inputs)
    return loss.item()


def _errors(scores: Mapping[str, float], truth: Mapping[str, float]) -> dict[str, float]:
    return {name: _relative(scores[name], value) for name, value in truth.items()}


def _relative(value: float, truth: float) -> float:
    if truth == 0.0:
        return 0.0 if value == 0.0 else math.inf
    return abs(value - truth) / abs(truth)


def _root_mean_square(errors: Mapping[str, float]) -> float:
    return math.sqrt(sum(error * error for error in errors.values()) / len(errors))
