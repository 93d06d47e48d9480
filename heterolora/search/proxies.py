"""Saliency proxies: one number per low-rank branch, larger meaning more worth its parameters.

Every proxy takes a model that already carries LoRA layers (one active adapter), and may carry
shortcuts, and batches with labels. It returns {name: score}, a LoRA branch going by its module's
name in the base model, a shortcut by its own, "<projection>:<kind>". Gradients are summed over the
batches, not averaged, in training mode, as in HeteroLoRA (arXiv 2406.14956 and its official code).
Modes and `.grad` are put back afterwards; what a training-mode forward itself changes (BatchNorm
statistics, RNG state) is not: `heterolora.allocate` preserves that too.

With `reduce`, which adds up a list of tensors over processes in place, the sums are over the
batches of all of them. It is called at most once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from heterolora.errors import DataError, DegenerateScoreError, ModelError, ScoreError
from heterolora.kernels.spec import BranchScore
from heterolora.search.scoring import Scorer, fused, measured, with_last
from heterolora.shortcuts import Shortcuts

__all__ = [
    "NEEDS_NONZERO_B",
    "PROXIES",
    "Batch",
    "Proxy",
    "Reduce",
    "batch_loss",
    "branch_factors",
    "constant",
    "grad_norm",
    "model_device",
    "snip",
    "synflow",
]

Batch = Mapping[str, Any]
Reduce = Callable[[list[torch.Tensor]], None]


class Proxy(Protocol):
    """A function of this module that scores."""

    def __call__(
        self, model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
    ) -> dict[str, float]: ...


_FLOAT_INPUTS = ("inputs_embeds", "decoder_inputs_embeds", "pixel_values", "input_features")
_LABEL_KEYS = ("labels", "label", "label_ids", "start_positions", "end_positions")


def model_device(model: nn.Module) -> torch.device:
    """Where the model expects its inputs: the device of its first parameter."""
    return next(model.parameters()).device


def branch_factors(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """(A [r, in], B [out, r]) of the active adapter of every LoRA layer, and of every shortcut.

    Raises:
        ModelError: the model has no LoRA layer, or not exactly one active adapter.
    """
    from peft.tuners.lora import LoraLayer

    factors = {}
    for name, module in _plain(model).named_modules():
        if not isinstance(module, LoraLayer):
            continue
        active = [adapter for adapter in module.active_adapters if adapter in module.lora_A]
        if len(active) != 1:
            raise ModelError(f"{name!r} has {len(active)} active LoRA adapters; scoring needs one")
        factors[name] = (module.lora_A[active[0]].weight, module.lora_B[active[0]].weight)
    if not factors:
        raise ModelError(f"{type(model).__name__} carries no LoRA layer to score")
    for shortcut in Shortcuts.of(model) or ():
        factors[shortcut.name] = (shortcut.a, shortcut.b)
    return factors


def constant(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """1 for every branch, so sizes and the seed decide: the control every other proxy must beat."""
    return dict.fromkeys(branch_factors(model), 1.0)


def grad_norm(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """||dL/dA||_F + ||dL/dB||_F. At B = 0 the first term is zero, and the second is not.

    Raises:
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    squares = {
        name: (score.gram_a.trace(), score.gram_b.trace())
        for name, score in _scores(model, batches, reduce).items()
    }
    return {name: math.sqrt(a) + math.sqrt(b) for name, (a, b) in _on_host(squares).items()}


def snip(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """sum|A * dL/dA| + sum|B * dL/dB|: the gradient of all-ones masks on A and B.

    Raises:
        DegenerateScoreError: every B is zero, where both terms vanish for every module
            (dL/dA = s B^T dL/dW, and B itself).
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    _require_nonzero_b(model, "snip")
    return _saliency(_scores(model, batches, reduce))


def synflow(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """sum|A * dL/dA| + sum|B * dL/dB| of the loss with all parameters replaced by their absolutes.

    `input_ids` becomes all-ones `inputs_embeds` and a floating-point input (`pixel_values`) becomes
    all ones, in the shape of the first batch, whose other entries (mask, labels) are kept; later
    batches and `reduce` are not used. As in HeteroLoRA, and unlike the original SynFlow, the loss
    is differentiated, not the summed output. In fp32, on copies: the model's tensors are not
    touched.

    Raises:
        DegenerateScoreError: every B is zero, where both terms vanish for every module.
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    _require_nonzero_b(model, "synflow")
    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("no batches to score with: the iterable is empty")
    factors = branch_factors(model)
    scored = {id(factor) for pair in factors.values() for factor in pair}
    tensors: dict[str, torch.Tensor] = {}
    leaves: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = absolute = parameter.detach().abs().float()
        if id(parameter) in scored:
            leaves[id(parameter)] = absolute.requires_grad_()
    for name, buffer in model.named_buffers():
        copy = buffer.detach().clone()
        tensors[f"model.{name}"] = copy.float() if copy.is_floating_point() else copy
    device = model_device(model)
    # Not through the fused path: the gradient of a loss this saturated is a difference of nearly
    # equal numbers, so another order of summation would change the scores in their fourth digit.
    with _training(model), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        torch.func.functional_call(_Backward(model), tensors, (_all_ones(model, batch),))
    return _saliency(
        {name: measured(leaves[id(a)], leaves[id(b)]) for name, (a, b) in factors.items()}
    )


PROXIES: dict[str, Proxy] = {
    "constant": constant,
    "grad-norm": grad_norm,
    "snip": snip,
    "synflow": synflow,
}

NEEDS_NONZERO_B = frozenset({"snip", "synflow"})


def batch_loss(model: nn.Module, batch: Batch, index: int = 0) -> torch.Tensor:
    """The scalar loss that `model` computes for `batch`, moved to the model's device.

    Raises:
        DataError: the batch is not a mapping, holds keys the model does not take, or no labels.
        ModelError: the model returns no differentiable scalar loss although there are labels.
        ScoreError: the loss is NaN or infinite.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch {index} is a {type(batch).__name__}; expected a dict of the model's inputs"
        )
    _check_keys(model, batch, index)
    device = model_device(model)
    inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    output = model(**inputs)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        if not any(key in batch for key in _LABEL_KEYS):
            raise DataError(
                f"batch {index} has no labels (keys: {', '.join(map(str, batch))}), so there is no "
                "loss to score with; add 'labels'"
            )
        raise ModelError(
            f"{type(_plain(model)).__name__} returned no loss for a batch with labels; use a model "
            "with a task head (AutoModelFor...) that returns its outputs by name"
        )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ModelError(f"the loss of {type(_plain(model)).__name__} is not a scalar tensor")
    if not loss.requires_grad:
        raise ModelError(
            f"the loss of {type(_plain(model)).__name__} depends on no adapted module, so there is "
            "no gradient to score; adapt modules that the loss uses"
        )
    if not math.isfinite(float(loss.detach())):
        raise ScoreError(f"the loss of batch {index} is {float(loss.detach())}; check the data")
    return loss


class _Backward(nn.Module):
    """Runs backward inside forward, while `functional_call` still has its tensors in place.

    Checkpointed layers recompute in backward; outside they would recompute with the real weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> None:
        batch_loss(self.model, batch).backward()


def _plain(model: nn.Module) -> Any:
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_keys(model: nn.Module, batch: Batch, index: int) -> None:
    parameters = inspect.signature(_plain(model).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [str(key) for key in batch if key not in parameters]
    if unknown:
        raise DataError(
            f"batch {index} holds {', '.join(unknown)}, which {type(_plain(model)).__name__} does "
            "not take; remove it from the batches"
        )


def _scores(
    model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None
) -> dict[str, BranchScore]:
    """Statistics of the summed gradients. Those of the last batch are measured, not written, unless
    other processes' gradients have yet to be added.
    """
    factors = branch_factors(model)
    scorer = Scorer(factors)
    count = 0
    with (
        _training(model),
        _own_gradients(model),
        torch.enable_grad(),
        fused(model) as fusion,
    ):
        for index, (batch, last) in enumerate(with_last(batches)):
            count += 1
            if reduce is not None:
                _add_gradients(factors, batch_loss(model, batch, index))
                continue
            fusion.scorer = scorer if last else None
            loss = batch_loss(model, batch, index)
            scorer.backward(loss) if last else loss.backward()
        if count == 0:
            raise DataError("no batches to score with: the iterable is empty")
        if reduce is not None:
            reduce([f.grad for pair in factors.values() for f in pair if f.grad is not None])
        return scorer.scores()


def _add_gradients(
    factors: Mapping[str, tuple[nn.Parameter, nn.Parameter]], loss: torch.Tensor
) -> None:
    """As `backward`, for the factors alone, and behind the back of DistributedDataParallel.

    Its hooks would take a layer for used in the step to come, which may then be switched off.
    """
    leaves = [factor for pair in factors.values() for factor in pair]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        # Which layers a loss reaches may differ between processes.
        found = torch.zeros_like(leaf) if gradient is None else gradient
        leaf.grad = found if leaf.grad is None else leaf.grad + found


def _saliency(scores: dict[str, BranchScore]) -> dict[str, float]:
    sums = {name: (score.abs_a, score.abs_b) for name, score in scores.items()}
    return {name: a + b for name, (a, b) in _on_host(sums).items()}


def _on_host(
    pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, tuple[float, float]]:
    """The values of 0-dim tensors, in one transfer: a GPU is waited for once, not for each."""
    values = [value for pair in pairs.values() for value in pair]
    found = iter(torch.stack([value.to(values[0].device) for value in values]).tolist())
    return {name: (next(found), next(found)) for name in pairs}


def _require_nonzero_b(model: nn.Module, proxy: str) -> None:
    if not any(bool(b.detach().any()) for _, b in branch_factors(model).values()):
        raise DegenerateScoreError(
            f"every LoRA B is zero, where {proxy} is zero for every module; score with a small "
            "random B (as `heterolora.allocate` does) or use grad-norm"
        )


def _all_ones(model: nn.Module, batch: Batch) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise DataError(f"batch 0 is a {type(batch).__name__}; expected a dict of model inputs")
    ones = dict(batch)
    for key in {*_FLOAT_INPUTS, getattr(_plain(model), "main_input_name", "")} & ones.keys():
        if ones[key].is_floating_point():
            ones[key] = torch.ones_like(ones[key], dtype=torch.float32)
    for prefix in ("", "decoder_"):
        ids = ones.pop(f"{prefix}input_ids", None)
        if ids is not None:
            # Reentrant checkpointing passes gradients on only if an input of it requires them.
            shape = (*ids.shape, _embedding_width(model))
            ones[f"{prefix}inputs_embeds"] = torch.ones(shape, requires_grad=True)
    return ones


def _embedding_width(model: nn.Module) -> int:
    embeddings = _plain(model).get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ModelError(
            f"{type(_plain(model)).__name__} has no input embedding table, which synflow needs for "
            "text; use grad-norm"
        )
    return embeddings.embedding_dim


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            # Setting an attribute of a module costs more than looking.
            if module.training != mode:
                module.training = mode


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    saved = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in saved:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in saved:
            parameter.grad = gradient
