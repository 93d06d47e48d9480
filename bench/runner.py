"""How one case is run: gate, time, memory, launches."""

import gc
from collections.abc import Callable, Mapping

import torch

from heterolora.bench import harness, memory, peers
from heterolora.bench.cases import Case
from heterolora.bench.launches import launches
from heterolora.bench.parity import Parity, ran
from heterolora.bench.record import CaseResult
from heterolora.bench.steps import Step, Workload, twin
from heterolora.bench.work import minimum

__all__ = ["build", "gate", "run_case", "variants"]


def build(
    case: Case, variant: str, load: Workload, ranks: Mapping[str, int], *, dropout: bool = True
) -> Step:
    """The step of one variant, on a :func:`steps.twin` of `load`.

    Args:
        dropout: False leaves the case's dropout out.
    """
    return case.step(variant, twin(load), ranks, case.dropout if dropout else 0.0)


def gate(case: Case, load: Workload, ranks: Mapping[str, int]) -> tuple[Parity, dict[str, Step]]:
    """The case's parity check, and the steps it compared.

    With dropout it compares without: the masks differ by design (`heterolora verify` compares them
    with the specification's).
    """
    names = [peers.BASELINE, "fused"]
    if case.kind in ("op", "group") and case.dtype != "fp32":
        names.append(peers.LOW_PRECISION)
    steps = {name: build(case, name, load, ranks, dropout=False) for name in names}
    parity = case.parity(*steps.values())
    if parity.green and case.dropout:
        problem = ran(build(case, "fused", load, ranks))
        parity = Parity(False, problem) if problem else parity
    return parity, steps


def variants(
    case: Case,
    load: Workload,
    ranks: Mapping[str, int],
    device: torch.device,
    *,
    compiled: bool = False,
) -> tuple[list[str], dict[str, str]]:
    """The variants that apply to `case` on `device`, and why the others do not."""
    names, skipped = [], {}
    for name in case.variants:
        if name in peers.COMPILED and not compiled:
            continue
        reason = peers.unavailable(name, load, ranks, device)
        if reason is None:
            names.append(name)
        else:
            skipped[name] = reason
    return names, skipped


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
    """Gate, timing, memory and launches of one case; a red gate ends it with none of them.

    A variant that cannot run (a compiler is missing, say) is listed under `failed` with its reason;
    the others count.

    Args:
        compiled: adds the torch.compile variants.
        on_phase: told what begins.
        on_round: told how many timed rounds are done.
    """
    on_phase("parity")
    load = case.build(case.torch_dtype, device)
    ranks = case.ranks_of(load.targets)
    names, skipped = variants(case, load, ranks, device, compiled=compiled)
    parity, steps = gate(case, load, ranks)

    def result(**found: object) -> CaseResult:
        return CaseResult(
            case=case.name,
            kind=case.kind,
            description=case.description,
            shapes=dict(case.shapes),
            dtype=case.dtype,
            ranks=ranks,
            tokens=load.tokens,
            layers=load.layers,
            repeats=load.repeats,
            dropout=case.dropout,
            work=minimum(
                _groups(steps["fused"], load),
                load.targets,
                ranks,
                tokens=load.tokens,
                itemsize=case.torch_dtype.itemsize,
            ),
            parity=parity,
            skipped=skipped,
            **found,  # type: ignore[arg-type]
        )

    if not parity.green:
        return result()

    if case.dropout:
        steps = {}
    failed: dict[str, str] = {}
    for name in names:
        if name in steps:
            continue
        on_phase(f"preparing {name}")
        try:
            steps[name] = build(case, name, load, ranks)
            steps[name]()
        except Exception as error:  # whatever a peer or the compiler raises is its result
            if name in (peers.BASELINE, peers.FLOOR, "fused"):
                raise
            steps.pop(name, None)
            failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"

    on_phase("timing")
    timing = harness.paired(
        {name: steps[name] for name in names if name in steps},
        rounds=rounds,
        warmup=warmup,
        baseline=peers.BASELINE,
        stopwatch=harness.stopwatch_for(device),
        on_round=on_round,
    )
    on_phase("memory and launches")
    gc.collect()
    timed = {name: steps[name] for name in timing.seconds}
    return result(
        timing=timing,
        memory={name: _memory_of(step, device) for name, step in timed.items()},
        launches={name: launches(step, device) for name, step in timed.items()},
        failed=failed,
    )


def _groups(fused: Step, load: Workload) -> list[tuple[str, ...]]:
    """The fused groups, and every other target alone."""
    report = fused.fuse_report
    found = [] if report is None else list(report.groups)
    grouped = {name for names in found for name in names}
    return [*found, *((name,) for name in load.targets if name not in grouped)]


def _memory_of(step: Step, device: torch.device) -> memory.MemoryUse:
    step.clear_gradients()
    saved = memory.saved_bytes(step.forward, exclude=step.tensors())
    peak = memory.peak_bytes(step, device)
    step.clear_gradients()
    return memory.MemoryUse(memory.resident_bytes(step.tensors()), peak, saved)
