"""`heterolora train`: trains a searched or a uniform adapter with transformers' Trainer."""

import argparse
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from heterolora.cli import inputs
from heterolora.console import add_json, emit

if TYPE_CHECKING:
    from heterolora.search import Allocation
    from heterolora.train.run import TrainResult

__all__ = ["EPILOG", "add_arguments", "run"]

EPILOG = """\
examples:
  heterolora train --data reviews.csv --rank 8 --out runs/uniform
  heterolora train --data reviews.csv --allocation allocation.json --out runs/searched
  heterolora train --data reviews.csv --rank 8 --out runs/uniform --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs.add_arguments(parser)
    train = parser.add_argument_group("training")
    adapter = train.add_mutually_exclusive_group()
    adapter.add_argument("--allocation", metavar="FILE", help="what search wrote")
    adapter.add_argument("--rank", type=int, default=8, help="uniform rank on every module")
    train.add_argument("--out", default="runs/heterolora", help="folder of checkpoints and adapter")
    train.add_argument("--epochs", type=float, default=3.0, help="passes over the train split")
    train.add_argument("--max-steps", type=int, help="steps, in place of epochs")
    train.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    train.add_argument("--batch-size", type=int, default=32, help="rows a batch")
    train.add_argument(
        "--save-steps",
        type=int,
        help="checkpoint and evaluate every N steps instead of every epoch",
    )
    train.add_argument(
        "--no-dropout",
        action="store_true",
        help="the model's own dropout off, for few steps (docs/evidence.md); less time on a CPU, "
        "with --bf16 and rows below 128 tokens if --attn-implementation eager is given too",
    )
    train.add_argument("--no-fuse", action="store_true", help="train with PEFT's own forward")
    train.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    train.add_argument("--overwrite", action="store_true", help="delete the earlier run in --out")
    train.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, more time"
    )
    train.add_argument("--bf16", action="store_true", help="forward pass in bf16 autocast")
    train.add_argument(
        "--cuda-graph",
        action="store_true",
        help="replay steps as CUDA graphs, batches padded to one length; pays at up to about 1,000 "
        "tokens a batch",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and leave the adapter in the output folder.

    Returns:
        0.

    Raises:
        HeteroLoraError: what was asked for cannot be done, or training cannot go on.
        TrainingInterrupted: Ctrl-C or SIGTERM, after a checkpoint was saved.
    """
    from heterolora.search import Allocation, SearchSpace, uniform

    path = args.allocation
    allocation = Allocation.load(path) if path is not None else None
    space = SearchSpace(target_modules=inputs.targets(args.target_modules))
    inputs.quiet_libraries()
    data, model = inputs.load(args)
    if allocation is None:
        allocation = uniform(model, args.rank, space)
    result = _train(args, allocation, data, model)
    emit(args.json, _result(args, allocation, result), _lines(allocation, result))
    return 0


def _train(
    args: argparse.Namespace, allocation: "Allocation", data: Any, model: Any
) -> "TrainResult":
    import torch

    from heterolora.data.models import disable_dropout
    from heterolora.search import adapt
    from heterolora.train.run import train

    if args.no_dropout:
        disable_dropout(model)
    # PEFT draws A from the global random state.
    torch.manual_seed(args.seed)
    return train(
        adapt(model, allocation),
        data,
        output_dir=args.out,
        epochs=args.epochs,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        batch_size=args.batch_size,
        seed=args.seed,
        fused=not args.no_fuse,
        resume=args.resume,
        overwrite=args.overwrite,
        save_steps=args.save_steps,
        gradient_checkpointing=args.gradient_checkpointing,
        bf16=args.bf16,
        cuda_graph=args.cuda_graph,
        progress=sys.stderr.isatty(),
    )


def _result(
    args: argparse.Namespace, allocation: "Allocation", result: "TrainResult"
) -> dict[str, Any]:
    report = result.report
    return {
        "model": args.model,
        "data": args.data,
        "adapter": str(result.adapter),
        "parameters": allocation.parameters,
        "counts": asdict(allocation.counts),
        "metrics": result.metrics,
        "steps": result.steps,
        "seconds": result.seconds,
        "seconds_per_step": result.seconds_per_step,
        "tokens_per_second": result.tokens_per_second,
        "fused": report.fused if report else {},
        "left": report.left if report else {},
        "why": report.why if report else {},
        "declined": report.declined if report else {},
        "cuda_graph": result.cuda_graph,
        "log_history": result.log_history,
    }


def _lines(allocation: "Allocation", result: "TrainResult") -> list[str]:
    time = f"{result.steps} steps in {result.seconds:.1f} s"
    if result.seconds_per_step:
        time += f", {result.seconds_per_step:.3f} s a step"
    path = str(result.report) if result.report else "PEFT's own forward"
    return [
        *(f"{name.replace('_', ' ')}: {value:.4f}" for name, value in result.metrics.items()),
        time,
        f"{allocation.parameters:,} LoRA parameters, enabled, trained and stored; {path}",
        *([f"CUDA graphs: {result.cuda_graph}"] if result.cuda_graph else []),
        f"adapter: {result.adapter}",
    ]
