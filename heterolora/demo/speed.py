"""The demo's speed table: one forward and backward pass of each arm, fused and not, interleaved."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.bench.harness.memory import peak_bytes
from heterolora.bench.harness.timing import cpu_threads, paired, stopwatch_for
from heterolora.fusion.fuse import fuse, unfuse

__all__ = ["measure"]

_BASELINE = "PEFT, uniform"


def measure(
    fresh: Callable[[], nn.Module],
    allocations: Mapping[str, Any],
    batch: Mapping[str, Tensor],
    rounds: int,
) -> dict[str, Any]:
    """Time each allocation on PEFT's path and on the fused one, and the frozen base as the floor.

    Args:
        fresh: builds the base model.
        allocations: by arm; each is timed twice.
        batch: one padded batch with labels.
        rounds: timed rounds.
    """
    from heterolora.search import adapt

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: value.to(device) for name, value in batch.items()}
    steps: dict[str, Callable[[], None]] = {}
    for arm, allocation in allocations.items():
        for path in ("PEFT", "fused"):
            torch.manual_seed(0)
            model = adapt(fresh(), allocation).to(device).train()
            unfuse(model)
            if path == "fused":
                fuse(model, strict=True, example=batch)
            steps[f"{path}, {arm}"] = _step(model, batch)
    steps["frozen base (floor)"] = _floor(fresh().to(device).train(), batch)
    with cpu_threads(1):
        timing = paired(
            steps, rounds=rounds, warmup=2, baseline=_BASELINE, stopwatch=stopwatch_for(device)
        )
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    rows = []
    for name in steps:
        summary = timing.summary(name)
        rows.append(
            {
                "variant": name,
                "milliseconds": summary.milliseconds,
                "ratio": summary.ratio,
                "ratio_low": summary.ratio_low,
                "ratio_high": summary.ratio_high,
                "peak_megabytes": peaks[name] / 1e6,
            }
        )
    shape = " x ".join(str(size) for size in batch["input_ids"].shape)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    return {
        "rows": rows,
        "note": f"Forward and backward of one batch of {shape} tokens, {where}, "
        f"{timing.clock}, median of {rounds} interleaved rounds; ratios are to {_BASELINE}, with "
        "quartiles. The floor is the frozen model alone, forward and input gradient.",
    }


def _step(model: nn.Module, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    def step() -> None:
        model.zero_grad()
        model(**batch).loss.backward()
        model.zero_grad()

    return step


def _floor(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], None]:
    model.requires_grad_(False)
    inputs = dict(batch)
    ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def step() -> None:
        embedded.grad = None
        model(inputs_embeds=embedded, **inputs).loss.backward()
        embedded.grad = None

    return step
