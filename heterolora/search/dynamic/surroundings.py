"""What a dynamic search finds around it: the trainer's settings and wrappers."""

from __future__ import annotations

from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

__all__ = ["dynamic_reason", "unwrapped"]

_SHARDED = {"DTensor", "FlatParameter", "FullyShardedDataParallel"}


def dynamic_reason(args: TrainingArguments, model: Any) -> str | None:
    """The setting under which this cannot be right, and what to do, or None."""
    if args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
        return "nn.DataParallel over several GPUs: start with torchrun or accelerate launch"
    if getattr(args, "deepspeed", None) or any(hasattr(p, "ds_id") for p in model.parameters()):
        return "DeepSpeed, which owns the parameters and the optimizer's state: use DDP"
    kinds = {type(part).__name__ for part in (*model.modules(), *model.parameters())}
    kinds |= {type(p.data).__name__ for p in model.parameters()}
    if getattr(args, "fsdp", None) or kinds & _SHARDED:
        return "FSDP or tensor parallelism, which shard the parameters: use DDP"
    compiled = any(m._compiled_call_impl is not None for m in model.modules())
    if args.torch_compile or compiled or "OptimizedModule" in kinds:
        return "torch.compile, whose code is of one choice of ranks: leave it out"
    if args.fp16:
        return "fp16, where a loss that is not scaled loses gradients: use bf16"
    optimizer = str(getattr(args.optim, "value", args.optim))
    if "lomo" in optimizer or "layerwise" in optimizer:
        return f"the optimizer {optimizer}, which works during the backward pass: use AdamW"
    if args.parallel_mode is ParallelMode.DISTRIBUTED:
        if args.ddp_find_unused_parameters is False:
            return "ddp_find_unused_parameters=False, as DDP waits for switched-off modules: set it"
        if getattr(args, "ddp_static_graph", None):
            return "ddp_static_graph, as what is used changes: leave it out"
        new = getattr(args, "activation_checkpointing_kwargs", None)
        old = getattr(args, "gradient_checkpointing_kwargs", None)
        if (new or old or {}).get("use_reentrant"):
            return "reentrant checkpointing with DDP: set use_reentrant=False"
    elif args.parallel_mode is not ParallelMode.NOT_PARALLEL:
        return f"parallel mode {args.parallel_mode.value}: use DDP"
    return None


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel; one that torch.compile made stays as it is."""
    return extract_model_from_parallel(model, keep_torch_compile=True)
