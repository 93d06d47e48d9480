"""The registry of cases, and how one case is run: gate, time, memory."""

import fnmatch
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from heterolora.bench import harness, memory, models
from heterolora.bench.harness import BenchError
from heterolora.bench.models import BASELINE, Step, Workload
from heterolora.bench.parity import Parity, check_parity
from heterolora.bench.record import CaseResult

__all__ = ["CASES", "Case", "run_case", "select"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_RANKS = {"uniform": models.uniform_ranks, "mixed": models.mixed_ranks}


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: a training step of one model, dtype and allocation.

    Attributes:
        name: unique, also the name of the result file.
        description: one line for `--list`.
        build: (dtype, device) -> a fresh workload, the same weights and batch on every call.
        shapes: sizes for the record.
        dtype: "fp32" or "bf16", of the base model; adapters are as PEFT makes them (fp32).
        ranks: "uniform" (8 everywhere) or "mixed" (0 to 32, equal parameters).
        quick: small enough for `--quick`.
        parity: the gate, (PEFT step, fused step) -> outcome.
    """

    name: str
    description: str
    build: Callable[[torch.dtype, torch.device], Workload]
    shapes: Mapping[str, int]
    dtype: str
    ranks: str
    quick: bool = False
    parity: Callable[[Step, Step], Parity] = check_parity


def _family(
    name: str, what: str, builder: Callable[..., Workload], *, quick: bool = False, **shapes: int
) -> list[Case]:
    def build(dtype: torch.dtype, device: torch.device) -> Workload:
        return builder(dtype=dtype, device=device, **shapes)

    return [
        Case(
            name=f"{name}-{dtype}-{ranks}",
            description=f"{what}, {dtype}, {'r=8' if ranks == 'uniform' else 'mixed ranks'}",
            build=build,
            shapes=shapes,
            dtype=dtype,
            ranks=ranks,
            quick=quick,
        )
        for dtype in _DTYPES
        for ranks in _RANKS
    ]


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        *_family(
            "tiny-4x16",
            "2-layer BERT, hidden 64, 4x16 tokens (a check of the bench, not a result)",
            models.bert,
            quick=True,
            layers=2,
            hidden=64,
            ffn=256,
            heads=2,
            batch=4,
            length=16,
        ),
        *_family(
            "minilm-16x64",
            "MiniLM-L6 shapes (vocabulary 1000), 16x64 tokens, training step",
            models.bert,
            layers=6,
            hidden=384,
            ffn=1536,
            heads=12,
            batch=16,
            length=64,
        ),
        *_family(
            "llama-8x64",
            "12-layer Llama, hidden 576 (vocabulary 1000), 8x64 tokens, training step",
            models.llama,
            layers=12,
            hidden=576,
            ffn=1536,
            heads=9,
            kv_heads=3,
            batch=8,
            length=64,
        ),
        *_family(
            "linears-16x64",
            "the linears of MiniLM-L6 without attention, 16x64 tokens, training step",
            models.linear_stack,
            layers=6,
            hidden=384,
            ffn=1536,
            batch=16,
            length=64,
        ),
    ]
}


def select(patterns: list[str] | None, *, quick: bool = False) -> list[Case]:
    """Cases whose name matches any of the shell patterns; without patterns all, or the quick ones.

    Raises:
        BenchError: a pattern matches nothing.
    """
    if not patterns:
        # The quick cases check the bench itself; among real results they would only be noise.
        return [case for case in CASES.values() if case.quick == quick]
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        matched = fnmatch.filter(CASES, pattern)
        if not matched:
            raise BenchError(f"no case matches {pattern!r}; --list shows all {len(CASES)}")
        chosen.update((name, CASES[name]) for name in matched)
    return list(chosen.values())


def run_case(
    case: Case,
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    compiled: bool = False,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_round: Callable[[int], None] | None = None,
) -> CaseResult:
    """Gate, timing and memory of one case; a red gate ends it, with neither timing nor memory.

    A variant that cannot run (a compiler is missing, say) is listed under `failed` with its reason;
    the others count.
    """
    dtype = _DTYPES[case.dtype]
    build = partial(case.build, dtype, device)
    shape_of = build()
    ranks = _RANKS[case.ranks](shape_of.targets)
    tokens = shape_of.tokens
    del shape_of

    def result(parity: Parity, **found: object) -> CaseResult:
        return CaseResult(
            case=case.name,
            description=case.description,
            shapes=dict(case.shapes),
            dtype=case.dtype,
            ranks=ranks,
            tokens=tokens,
            parity=parity,
            **found,  # type: ignore[arg-type]
        )

    on_phase("parity")
    steps = {name: models.build_step(name, build(), ranks) for name in (BASELINE, "fused")}
    parity = case.parity(steps[BASELINE], steps["fused"])
    if not parity.green:
        return result(parity)

    failed: dict[str, str] = {}
    for name in models.VARIANTS:
        if name in steps or (name in models.COMPILED and not compiled):
            continue
        on_phase(f"preparing {name}")
        step = models.build_step(name, build(), ranks)
        if name in models.COMPILED:
            try:
                step()
            except Exception as error:  # whatever the compiler raises is this variant's result
                failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                continue
        steps[name] = step

    on_phase("timing")
    timing = harness.paired(
        steps,
        rounds=rounds,
        warmup=warmup,
        baseline=BASELINE,
        stopwatch=harness.stopwatch_for(device),
        on_round=on_round,
    )
    on_phase("memory")
    gc.collect()
    used = {name: _memory_of(step, device) for name, step in steps.items()}
    return result(parity, timing=timing, memory=used, failed=failed)


def _memory_of(step: Step, device: torch.device) -> memory.MemoryUse:
    step.clear_gradients()
    saved = memory.saved_bytes(step.forward, exclude=step.tensors())
    peak = memory.peak_bytes(step, device)
    step.clear_gradients()
    return memory.MemoryUse(memory.resident_bytes(step.tensors()), peak, saved)
