"""SynFlow: saliency that does not look at the data, in two forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from heterolora.errors import DataError, ModelError
from heterolora.kernels.spec import BranchScore
from heterolora.search.scores.backward import measured
from heterolora.search.scores.gradients import (
    Batch,
    Reduce,
    batch_loss,
    batch_output,
    branch_factors,
    model_device,
    plain_model,
    require_nonzero_b,
    saliency,
    training_mode,
)

__all__ = ["synflow", "synflow_output"]

_FLOAT_INPUTS = ("inputs_embeds", "decoder_inputs_embeds", "pixel_values", "input_features")


def synflow(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """sum|A * dL/dA| + sum|B * dL/dB| of the loss with all parameters replaced by their absolutes.

    `input_ids` becomes all-ones `inputs_embeds` and a floating-point input (`pixel_values`) becomes
    all ones, in the shape of the first batch, whose other entries (mask, labels) are kept; later
    batches and `reduce` are not used. As in HeteroLoRA, and unlike the original SynFlow, the loss
    is differentiated, not the summed output. In fp32, other inputs too, on copies: the model's
    tensors are not touched.

    Raises:
        DegenerateScoreError: every B is zero, where both terms vanish for every module.
        DataError, ModelError, ScoreError: as `batch_loss`.
    """
    require_nonzero_b(model, "synflow")
    with training_mode(model):
        return saliency(_absolute_scores(_LossBackward(model), _first(batches), torch.float32))


def synflow_output(
    model: nn.Module, batches: Iterable[Batch], *, reduce: Reduce | None = None
) -> dict[str, float]:
    """sum|A * dR/dA| + sum|B * dR/dB| with R the sum of the logits, all parameters replaced by
    their absolutes: SynFlow as the zero-cost proxies have it (Abdelfattah et al., arXiv 2101.08134,
    and its code `foresight/pruners/measures/synflow.py`).

    The input is one row of ones in the shape of the first row of the first batch, whose other
    entries (the mask) are kept; labels do not matter, and later batches and `reduce` are not used.
    In fp64 on copies, 8 bytes for each of the model's parameters, and in evaluation mode, so that
    dropout leaves it without chance.

    Raises:
        DegenerateScoreError: every B is zero, where both terms vanish for every module.
        DataError: no batch, or one that the model does not take.
        ModelError: the model returns no logits or none that depend on an adapted module, or has no
            input embedding table for text.
    """
    require_nonzero_b(model, "synflow-output")
    batch = _first_row(_first(batches))
    with training_mode(model, training=False):
        return saliency(_absolute_scores(_OutputBackward(model), batch, torch.float64))


class _LossBackward(nn.Module):
    """Runs backward inside forward, while `functional_call` still has its tensors in place.

    Checkpointed layers recompute in backward; outside they would recompute with the real weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> None:
        batch_loss(self.model, batch).backward()


class _OutputBackward(_LossBackward):
    """Likewise, of the sum of the logits."""

    def forward(self, batch: Batch) -> None:
        outputs: Any = batch_output(self.model, batch)
        logits = [
            value
            for key, value in (outputs.items() if isinstance(outputs, Mapping) else ())
            if key.endswith("logits") and isinstance(value, torch.Tensor)
        ]
        if not any(value.requires_grad for value in logits):
            raise ModelError(
                f"{type(plain_model(self.model)).__name__} returns no logits that depend on an "
                "adapted module, which synflow-output sums; use another proxy"
            )
        torch.stack([value.sum() for value in logits]).sum().backward()


def _first(batches: Iterable[Batch]) -> Batch:
    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("no batches to score with: the iterable is empty")
    if not isinstance(batch, Mapping):
        raise DataError(f"batch 0 is a {type(batch).__name__}; expected a dict of model inputs")
    return batch


def _first_row(batch: Batch) -> dict[str, Any]:
    return {k: v[:1] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}


def _absolute_scores(
    backward: _LossBackward, batch: Batch, dtype: torch.dtype
) -> dict[str, BranchScore]:
    """The statistics after `backward` of all ones through absolute parameters, all in `dtype`."""
    model = backward.model
    factors = branch_factors(model)
    scored = {id(factor) for pair in factors.values() for factor in pair}
    tensors: dict[str, torch.Tensor] = {}
    leaves: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = absolute = parameter.detach().abs().to(dtype)
        if id(parameter) in scored:
            leaves[id(parameter)] = absolute.requires_grad_()
    for name, buffer in model.named_buffers():
        copy = buffer.detach().clone()
        tensors[f"model.{name}"] = copy.to(dtype) if copy.is_floating_point() else copy
    # Not through the fused path: the gradient of a loss this saturated is a difference of nearly
    # equal numbers, so another order of summation would change the scores in their fourth digit.
    with torch.enable_grad(), torch.autocast(model_device(model).type, enabled=False):
        try:
            torch.func.functional_call(backward, tensors, (_all_ones(model, batch, dtype),))
        except (NotImplementedError, ValueError) as error:
            # What classes raise that need token ids, such as BART's and T5's classification.
            raise ModelError(
                f"{type(plain_model(model)).__name__} does not run on all-ones embeddings in place "
                f"of token ids, as synflow has it ({error}); use grad-norm"
            ) from error
    return {name: measured(leaves[id(a)], leaves[id(b)]) for name, (a, b) in factors.items()}


def _all_ones(model: nn.Module, batch: Batch, dtype: torch.dtype) -> dict[str, Any]:
    ones = dict(batch)
    inputs = {*_FLOAT_INPUTS, getattr(plain_model(model), "main_input_name", "")}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and key != "labels":
            ones[key] = torch.ones_like(value, dtype=dtype) if key in inputs else value.to(dtype)
    for prefix in ("", "decoder_"):
        ids = ones.pop(f"{prefix}input_ids", None)
        if ids is not None:
            # Reentrant checkpointing passes gradients on only if an input of it requires them.
            shape = (*ids.shape, _embedding_width(model))
            ones[f"{prefix}inputs_embeds"] = torch.ones(shape, dtype=dtype, requires_grad=True)
    return ones


def _embedding_width(model: nn.Module) -> int:
    embeddings = plain_model(model).get_input_embeddings()
    if not isinstance(embeddings, nn.Embedding):
        raise ModelError(
            f"{type(plain_model(model)).__name__} has no input embedding table, which synflow "
            "needs for text; use grad-norm"
        )
    return embeddings.embedding_dim
