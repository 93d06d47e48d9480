"""Trainers whose steps are replayed as CUDA graphs, or watched."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import ParallelMode

from heterolora.data.text import TokenizedData
from heterolora.train.cuda_graphs import CudaRecorder, Recorder, StepGraphs

__all__ = [
    "GraphedTrainer",
    "WatchedGraphedTrainer",
    "WatchedTrainer",
    "constant_length",
    "graph_reason",
]

logger = logging.getLogger("heterolora")

_ITEMS = "num_items_in_batch"
_CHECKPOINTING = "activation checkpointing reads the random state, which a capture forbids"


class GraphedTrainer(Trainer):
    """Trainer that replays forward and backward of a step as one CUDA graph.

    Arguments are Trainer's. A shape of batch runs eagerly three times, is captured, and replayed
    from then on; up to four shapes are captured. Losses and gradients are those of the eager step.
    The graph is `Trainer.training_step` itself: the forward pass with `compute_loss` (a
    subclass may override it), the loss and the backward pass, accumulation of gradients included.

    Outside the graph stay clipping, the optimizer, the scheduler and what callbacks do, as Trainer
    runs them: with its default, fused AdamW, these are multi-tensor launches, one for a few dozen
    parameters, against dozens for each layer inside the graph.

    A step runs eagerly, and the log says why once, where a graph cannot be had or would be wrong:
    no CUDA device, several GPUs or processes, weights on several devices, fp16 gradient scaling,
    activation checkpointing (it reads the random state), torch.compile, an optimizer that works
    during backward, a callback that changes the model between steps (`DynamicSearchCallback`), a
    fifth shape, or a step that reads a tensor on the host.

    In a replay no Python runs: forward hooks do not, and what Python computes for a step (a
    schedule inside `compute_loss`, say) stays as it was in the captured one. After a change to the
    model other than to its weights' values call :meth:`reset_graphs`.

    During a capture transformers builds every attention mask, while an eager step may find that a
    batch has no padding, skip the mask and take flash attention. Encoders skip it in a capture too
    where batches carry no `attention_mask`; causal models without a cache never do.

    Args:
        recorder: captures; by default CUDA graphs on the Trainer's device.
    """

    def __init__(self, *args: Any, recorder: Recorder | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recorder = recorder
        self._graphs: StepGraphs | None = None
        self._trained: list[nn.Parameter] = []
        self._why_eager: str | None = None
        self._flops: dict[int, int] = {}

    @property
    def graph_summary(self) -> str:
        """What became of the steps: "2 shapes captured, 480 of 500 steps replayed", or why no step
        was replayed.
        """
        if self._graphs is not None:
            return self._graphs.summary()
        return self._why_eager or "no step yet"

    def reset_graphs(self) -> None:
        """Capture anew, after a change to the model that is not one of its weights' values."""
        if self._graphs is not None:
            self._graphs.reset()
            self._trained = _trained(self.model)
        self._flops.clear()

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Add to the gradients and return the detached loss, as Trainer does."""
        eager = super().training_step
        if self._graphs is None and self._why_eager is None:
            self._begin(model)
        if self._graphs is None:
            return eager(model, inputs, num_items_in_batch)
        if not model.training:
            model.train()
        optimizer_mode = getattr(self.optimizer, "train", None)
        if callable(optimizer_mode):
            optimizer_mode()
        kind = type(inputs)

        def step(values: dict[str, Any]) -> Tensor:
            items = values.pop(_ITEMS)
            return eager(model, kind(values), items)

        inputs = self._prepare_inputs(inputs)
        context = (id(model), getattr(self, "current_gradient_accumulation_steps", None))
        return self._graphs.run(
            step, {**inputs, _ITEMS: num_items_in_batch}, self._trained, context
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate, which walks all modules in every step; here once for each size."""
        name = getattr(self.model, "main_input_name", "input_ids")
        size = inputs[name].numel() if name in inputs else 0
        if size not in self._flops:
            self._flops[size] = super().floating_point_ops(inputs)
        return self._flops[size]

    def _begin(self, model: nn.Module) -> None:
        device = self.args.device
        reason = _settings_reason(self.args) or _model_reason(model, device)
        if any(getattr(c, "changes_model", False) for c in self.callback_handler.callbacks):
            reason = "a callback changes the model between steps (DynamicSearchCallback)"
        if self._recorder is None:
            reason = _device_reason(device) or reason
        if reason is not None:
            self._why_eager = reason
            logger.warning("steps run without a CUDA graph: %s", reason)
            return
        self._trained = _trained(model)
        self._graphs = StepGraphs(self._recorder or CudaRecorder(device))


class WatchedTrainer(Trainer):
    """Trainer that shows each batch and its loss to `watchers`, callables of (inputs, loss).

    For what a forward hook cannot see, because no hook runs where a CUDA graph is replayed.
    """

    def __init__(
        self,
        *args: Any,
        watchers: Sequence[Callable[[Mapping[str, Any], Tensor], None]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._watchers = watchers

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run the step as Trainer does, and show its batch and loss to the watchers."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        for watch in self._watchers:
            watch(inputs, loss)
        return loss


class WatchedGraphedTrainer(WatchedTrainer, GraphedTrainer):
    """A trainer whose steps are replayed as CUDA graphs, and whose losses are shown to watchers."""


def graph_reason(args: TrainingArguments) -> str | None:
    """Why no step can be replayed with these settings, or None."""
    return _device_reason(args.device) or _settings_reason(args)


def constant_length(data: TokenizedData) -> Callable[[list[Any]], Mapping[str, Any]]:
    """The collator of `data`, padding every batch to the longest row there is and a multiple of 8.

    A collator that cannot be told a length comes back as it is.
    """
    collator: Any = data.collator
    named = {field.name for field in fields(collator)} if is_dataclass(collator) else set()
    if not named >= {"padding", "max_length"}:
        return data.collator
    longest = max(len(row) for split in data.splits.values() for row in split["input_ids"])
    length = min(-(-longest // 8) * 8, data.tokenizer.model_max_length)
    logger.info("every batch is padded to %d tokens, so that one CUDA graph serves all", length)
    padded: Callable[[list[Any]], Mapping[str, Any]] = replace(
        collator, padding="max_length", max_length=length
    )
    return padded


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _device_reason(device: torch.device) -> str | None:
    return None if device.type == "cuda" else "no CUDA device"


def _settings_reason(args: TrainingArguments) -> str | None:
    if args.parallel_mode is not ParallelMode.NOT_PARALLEL:
        return "several GPUs or processes: a graph holds no communication"
    if args.fp16:
        return "fp16 scales the loss by what it reads from the device; bf16 needs no scaling"
    if getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing:
        return _CHECKPOINTING
    if args.torch_compile:
        return 'torch.compile has graphs of its own: torch_compile_mode="reduce-overhead"'
    if args.torch_empty_cache_steps is not None:
        return "torch_empty_cache_steps frees memory between steps"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        return f"the optimizer {optimizer} works during the backward pass"
    return None


def _model_reason(model: nn.Module, device: torch.device) -> str | None:
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return _CHECKPOINTING
    elsewhere = {parameter.device for parameter in model.parameters()} - {device}
    if elsewhere:
        return f"weights are on {', '.join(sorted(map(str, elsewhere)))} as well as {device}"
    return None
