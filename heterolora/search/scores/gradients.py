"""Gradients of a model's own loss by the factors of its low-rank branches, and their statistics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from heterolora.errors import DataError, DegenerateScoreError, ModelError, ScoreError
from heterolora.kernels.spec import BranchScore
from heterolora.search.scores.backward import Scorer, fused, with_last
from heterolora.shortcuts.model import Shortcuts

__all__ = [
    "Batch",
    "Reduce",
    "batch_loss",
    "batch_output",
    "branch_factors",
    "branch_scales",
    "branch_statistics",
    "model_device",
    "on_host",
    "plain_model",
    "require_nonzero_b",
    "saliency",
    "training_mode",
]

Batch = Mapping[str, Any]
Reduce = Callable[[list[torch.Tensor]], None]

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
    for name, module in plain_model(model).named_modules():
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


def branch_scales(model: nn.Module) -> dict[str, float]:
    """alpha/r of every branch of `branch_factors`.

    Raises:
        ModelError: as `branch_factors`.
    """
    modules = dict(plain_model(model).named_modules())
    shortcuts = {shortcut.name: shortcut.scale for shortcut in Shortcuts.of(model) or ()}
    scales = {}
    for name in branch_factors(model):
        if name in shortcuts:
            scales[name] = float(shortcuts[name])
            continue
        layer: Any = modules[name]
        (active,) = (adapter for adapter in layer.active_adapters if adapter in layer.lora_A)
        scales[name] = float(layer.scaling[active])
    return scales


def batch_output(model: nn.Module, batch: Batch, index: int = 0) -> Any:
    """What `model` returns for `batch`, moved to the model's device.

    Raises:
        DataError: the batch is not a mapping, or holds keys the model does not take.
    """
    if not isinstance(batch, Mapping):
        raise DataError(
            f"batch {index} is a {type(batch).__name__}; expected a dict of the model's inputs"
        )
    _check_keys(model, batch, index)
    device = model_device(model)
    inputs = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}
    return model(**inputs)


def batch_loss(model: nn.Module, batch: Batch, index: int = 0) -> torch.Tensor:
    """The scalar loss that `model` computes for `batch`, moved to the model's device.

    Raises:
        DataError: the batch is not a mapping, holds keys the model does not take, or no labels.
        ModelError: the model returns no differentiable scalar loss although there are labels.
        ScoreError: the loss is NaN or infinite.
    """
    output = batch_output(model, batch, index)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        if not any(key in batch for key in _LABEL_KEYS):
            raise DataError(
                f"batch {index} has no labels (keys: {', '.join(map(str, batch))}), so there is no "
                "loss to score with; add 'labels'"
            )
        raise ModelError(
            f"{type(plain_model(model)).__name__} returned no loss for a batch with labels; use a "
            "model with a task head (AutoModelFor...) that returns its outputs by name"
        )
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ModelError(f"the loss of {type(plain_model(model)).__name__} is not a scalar tensor")
    if not loss.requires_grad:
        raise ModelError(
            f"the loss of {type(plain_model(model)).__name__} depends on no adapted module, so "
            "there is no gradient to score; adapt modules that the loss uses"
        )
    if not math.isfinite(float(loss.detach())):
        raise ScoreError(f"the loss of batch {index} is {float(loss.detach())}; check the data")
    return loss


def branch_statistics(
    model: nn.Module, batches: Iterable[Batch], reduce: Reduce | None = None
) -> dict[str, BranchScore]:
    """Statistics of the gradients summed over the batches, in training mode, by branch.

    Those of the last batch are measured, not written, unless `reduce` has yet to add the gradients
    of other processes.

    Raises:
        DataError, ModelError, ScoreError: as `batch_loss`; DataError also without any batch.
    """
    factors = branch_factors(model)
    scorer = Scorer(factors)
    count = 0
    with (
        training_mode(model),
        _own_gradients(model),
        torch.enable_grad(),
        fused(model) as fusion,
    ):
        for index, (batch, last) in enumerate(with_last(batches)):
            count += 1
            if reduce is not None:
                _add_gradients(factors, batch_loss(model, batch, index))
                continue
            fusion.runner = scorer if last else None
            loss = batch_loss(model, batch, index)
            scorer.backward(loss) if last else loss.backward()
        if count == 0:
            raise DataError("no batches to score with: the iterable is empty")
        if reduce is not None:
            reduce([f.grad for pair in factors.values() for f in pair if f.grad is not None])
        return scorer.scores()


def saliency(scores: Mapping[str, BranchScore]) -> dict[str, float]:
    """sum|A * dA| + sum|B * dB| of every branch."""
    return {
        name: a + b
        for name, (a, b) in on_host({n: (s.abs_a, s.abs_b) for n, s in scores.items()}).items()
    }


def on_host(tensors: Mapping[str, Sequence[torch.Tensor]]) -> dict[str, list[Any]]:
    """The values of tensors, in one transfer: a GPU is waited for once, not for each.

    Returns:
        For each tensor a float, or nested lists of them in its shape.
    """
    flat = [tensor for group in tensors.values() for tensor in group]
    values = torch.cat([tensor.reshape(-1).to(flat[0].device) for tensor in flat]).cpu()
    parts = values.split([tensor.numel() for tensor in flat])
    found = iter(part.view(t.shape).tolist() for part, t in zip(parts, flat, strict=True))
    return {name: [next(found) for _ in group] for name, group in tensors.items()}


def require_nonzero_b(model: nn.Module, proxy: str) -> None:
    """
    Raises:
        DegenerateScoreError: every B is zero.
    """
    if not any(bool(b.detach().any()) for _, b in branch_factors(model).values()):
        raise DegenerateScoreError(
            f"every LoRA B is zero, where {proxy} is zero for every module; score with a small "
            "random B (as `heterolora.allocate` does) or use grad-norm"
        )


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


def plain_model(model: nn.Module) -> Any:
    """The model that a `PeftModel` wraps, or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def _check_keys(model: nn.Module, batch: Batch, index: int) -> None:
    parameters = inspect.signature(plain_model(model).forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [str(key) for key in batch if key not in parameters]
    if unknown:
        raise DataError(
            f"batch {index} holds {', '.join(unknown)}, which {type(plain_model(model)).__name__} "
            "does not take; remove it from the batches"
        )


@contextmanager
def training_mode(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Training mode, or evaluation mode, for the duration."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
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
