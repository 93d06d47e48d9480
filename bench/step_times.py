"""The model of a step's time against measured steps: `python -m heterolora.bench.step_times`.

MiniLM on the bundled reviews, fused, with allocations that differ in depth, kind and rank, and with
what `heterolora.allocate` finds for budgets of time. Each is predicted relative to uniform rank 8
by the cost model and by a fit to measured steps of other allocations, then all are timed
interleaved.
"""

import argparse
import contextlib
import json
import platform
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.bench.cases.peers import build_step
from heterolora.bench.cases.reviews import TrainingLoad, minilm
from heterolora.bench.harness.parity import check_parity
from heterolora.bench.harness.steps import Inputs, twin
from heterolora.bench.harness.timing import BenchError, cpu_threads, paired, stopwatch_for
from heterolora.errors import HeteroLoraError
from heterolora.search import Budget, SearchSpace, allocate, uniform
from heterolora.search.sites import find_sites
from heterolora.search.step_time.fit import calibrated, samples
from heterolora.search.step_time.model import StepTime
from heterolora.search.step_time.spend import TimeBudget

__all__ = ["Row", "allocations", "main", "table"]

MODES = ("fp32", "bf16", "autocast")
REFERENCE = "uniform, rank 8"
_TARGETS = r"bert\.encoder\..*(query|key|value|dense)"
_RANK = 8


@dataclass(frozen=True)
class Row:
    """One allocation; times are relative to uniform rank 8.

    Attributes:
        adapters, parameters: how many.
        model, fitted: as predicted by the cost model alone, and fitted to measured steps.
        measured, low, high: median and quartiles over rounds.
    """

    name: str
    adapters: int
    parameters: int
    model: float
    fitted: float
    measured: float
    low: float
    high: float


def allocations(names: Sequence[str], layers: int) -> dict[str, dict[str, int]]:
    """{label: {name: rank}} of MiniLM's linears."""
    draw = random.Random(0)

    def some(rank: int, kinds: Sequence[str], lowest: int = 0) -> dict[str, int]:
        return {
            name: rank
            for name in names
            if int(name.split(".layer.")[1].split(".")[0]) >= lowest
            and any(name.partition(".layer.")[2].partition(".")[2] == kind for kind in kinds)
        }

    attention = [f"attention.self.{kind}" for kind in ("query", "key", "value")]
    ffn = ["intermediate.dense", "output.dense"]
    every = [*attention, "attention.output.dense", *ffn]
    return {
        REFERENCE: some(_RANK, every),
        "uniform, rank 2": some(2, every),
        "top half of the layers": some(_RANK, every, layers // 2),
        "top layer": some(_RANK, every, layers - 1),
        "query and value": some(_RANK, [attention[0], attention[2]]),
        "feed-forward": some(_RANK, ffn),
        "a third of the modules at rank 32": dict.fromkeys(
            sorted(draw.sample(list(names), len(names) // 3)), 32
        ),
    }


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = [
        "| allocation | adapters | parameters | cost model | fitted | measured | quartiles |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.name} | {r.adapters} | {r.parameters:,} | {r.model:.3f} | {r.fitted:.3f} "
        f"| {r.measured:.3f} | {r.low:.3f} to {r.high:.3f} |"
        for r in rows
    ]
    return "\n".join(lines)


def measure(
    load: TrainingLoad, mode: str, *, rounds: int, shares: Sequence[float] = ()
) -> tuple[list[Row], dict[str, Any]]:
    """Rows by measured time, and {what the times came from}.

    Raises:
        BenchError: the fused step does not compute what PEFT's computes.
    """
    model, batch = load.model, load.inputs
    space = SearchSpace(target_modules=_TARGETS)
    sites = find_sites(model, _TARGETS)
    cost = {site.name: site.unit_cost for site in sites}
    tried = allocations(list(cost), load.layers)
    _gate(load, tried[REFERENCE])
    with _precision(mode):
        step = StepTime.of(model, batch, sites)
        fitted = calibrated(step, model, batch, uniform(model, _RANK, space))
        scores = allocate(model, [batch], budget=Budget(rank=_RANK), space=space).scores
        for share, (how, known) in product(shares, (("model", step), ("fit", fitted))):
            clock = TimeBudget(Budget(step_time=share, rank=_RANK), known, sites, space.ranks)
            ranks, _ = clock.choose(scores)
            tried[f"searched, step_time={share}, by the {how}"] = {
                name: rank for name, rank in ranks.items() if rank
            }
    timed = replace(load, run=_under(mode, load.run))
    steps = {name: build_step("fused", twin(timed), ranks) for name, ranks in tried.items()}
    watch = stopwatch_for(next(model.parameters()).device)
    timing = paired(steps, rounds=rounds, warmup=2, baseline=REFERENCE, stopwatch=watch)
    rows = []
    for name, ranks in tried.items():
        summary = timing.summary(name)
        rows.append(
            Row(
                name,
                len(ranks),
                sum(rank * cost[site] for site, rank in ranks.items()),
                step.relative(ranks, _RANK),
                fitted.relative(ranks, _RANK),
                summary.ratio,
                summary.ratio_low,
                summary.ratio_high,
            )
        )
    assert fitted.calibration is not None
    about = {
        "mode": mode,
        "weights": load.weights,
        "rows": len(batch["input_ids"]),
        "length": batch["input_ids"].shape[1],
        "rounds": rounds,
        "clock": timing.clock,
        "reference_ms": timing.summary(REFERENCE).milliseconds,
        "fitted_steps": len(samples(step, _RANK)),
        "calibration": asdict(fitted.calibration),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    return sorted(rows, key=lambda row: -row.measured), about


def _gate(load: TrainingLoad, ranks: Mapping[str, int]) -> None:
    # All through the op; what dispatch leaves to PEFT besides needs no check.
    steps = {name: build_step(name, twin(load), ranks) for name in ("peft", "aten", "peft-lowp")}
    parity = check_parity(steps["peft"], steps["aten"], steps["peft-lowp"])
    if not parity.green:
        raise BenchError(f"no times on a red gate: {parity.reason}")


def _precision(mode: str) -> contextlib.AbstractContextManager[Any]:
    if mode == "autocast":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.autocast(kind, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _under(mode: str, run: Any) -> Any:
    def wrapped(module: nn.Module, inputs: Inputs) -> list[Tensor]:
        with _precision(mode):
            return run(module, inputs)

    return wrapped


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=MODES, default="fp32")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--step-times", default="0.6,0.8", help="budgets to search for")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    shares = [float(share) for share in args.step_times.split(",") if share]
    dtype = torch.bfloat16 if args.mode == "bf16" else torch.float32
    try:
        with cpu_threads(args.threads):
            load = minilm(batch=args.rows, length=args.length, dtype=dtype, device=args.device)
            rows, about = measure(load, args.mode, rounds=args.rounds, shares=shares)
    except HeteroLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(json.dumps(about, indent=2))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"about": about, "rows": [asdict(row) for row in rows]}
        args.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
