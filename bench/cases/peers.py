"""What a case is compared with: the variants of one training step."""

from collections.abc import Mapping
from typing import Any

import torch

import heterolora
from heterolora.bench.cases import external
from heterolora.bench.cases.graphed import GraphedStep
from heterolora.bench.harness.steps import Step, Workload, adapter_parameters, with_adapters

__all__ = [
    "BASELINE",
    "COMPILED",
    "FLOOR",
    "GRAPHED",
    "LOW_PRECISION",
    "VARIANTS",
    "build_step",
    "unavailable",
]

BASELINE = "peft"
FLOOR = "base-only"
LOW_PRECISION = "peft-lowp"
COMPILED = {"compile-peft": "peft", "compile-fused": "fused"}
GRAPHED = {"graph-peft": "peft", "graph-fused": "fused", "graph-base-only": "base-only"}
VARIANTS = {
    "peft": "PEFT, eager: the baseline",
    "fused": "the same PeftModel after heterolora.fuse, implementations by dispatch",
    "base-only": "no adapters: forward, and gradients of activations only; the floor",
    "peft-lowp": "PEFT, autocast_adapter_dtype=False; in fp32 the same computation as the baseline",
    "aten": "fused with backend='aten': matmul and addmm",
    "triton": "fused with backend='triton'",
    "graph-peft": "PEFT, the whole step replayed as one CUDA graph",
    "graph-fused": "the fused model, the whole step replayed as one CUDA graph",
    "graph-base-only": "the floor, replayed as one CUDA graph",
    "compile-peft": "torch.compile of PEFT",
    "compile-fused": "torch.compile of the fused model",
    "unsloth": "Unsloth's LoRA autograd functions on the PEFT layers",
    "liger-peft": "PEFT with Liger's kernels for the rest of the layer",
}
_BACKENDS = {"fused": "auto", "aten": "aten", "triton": "triton"}


def unavailable(
    variant: str, workload: Workload, ranks: Mapping[str, int], device: torch.device
) -> str | None:
    """Why `variant` does not apply to this workload and allocation here, or None."""
    if variant == "aten" and device.type == "cpu":
        return "on a CPU fused is aten"
    if variant == "triton" and device.type == "cpu":
        return "Triton's kernels need a GPU"
    if variant in GRAPHED and device.type != "cuda":
        return "CUDA graphs need a GPU"
    if variant in external.PEERS:
        return external.unavailable(variant, workload, ranks, device)
    return None


def build_step(
    variant: str, workload: Workload, ranks: Mapping[str, int], *, dropout: float = 0.0
) -> Step:
    """The training step of `variant`. Takes over `workload.model`: each needs its own
    :func:`steps.twin`.
    """
    kind = GraphedStep if variant in GRAPHED else Step
    plain = {**COMPILED, **GRAPHED}.get(variant, variant)
    if plain == FLOOR:
        return kind(workload.model, workload.floor_inputs, workload.run, workload.output_grads)
    model = with_adapters(
        workload, ranks, dropout=dropout, autocast_adapter_dtype=plain != LOW_PRECISION
    )
    report = None
    if plain in _BACKENDS:
        # With an example, because a compiler sees only the groups that were found before it.
        report = heterolora.fuse(
            model,
            example=workload.inputs,
            backend=_BACKENDS[plain],
            captured=variant in GRAPHED,
        )
    if variant in external.PEERS:
        external.PEERS[variant].apply(model)
    optimizer = None
    if workload.trains:
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4, fused=True)
    module: Any = torch.compile(model) if variant in COMPILED else model
    return kind.of(workload, module, optimizer=optimizer, fuse_report=report)
