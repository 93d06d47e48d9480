"""How one case is run: gate, time, memory, launches."""

import gc
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from heterolora.bench.cases import follow, peers, training
from heterolora.bench.cases.registry import Case
from heterolora.bench.cases.reviews import TrainingLoad
from heterolora.bench.harness import memory
from heterolora.bench.harness import timing as harness
from heterolora.bench.harness.launches import launches
from heterolora.bench.harness.parity import Parity, ran
from heterolora.bench.harness.record import CaseResult
from heterolora.bench.harness.steps import Step, Workload, twin
from heterolora.bench.harness.work import minimum

__all__ = ["build", "gate", "run_case", "variants"]

_BASE = peers.BASELINE


def build(
    case: Case, variant: str, load: Workload, ranks: Mapping[str, int], *, dropout: bool = True
) -> Step:
    """The step of one variant, on a :func:`steps.twin` of `load`.

    Args:
        dropout: False leaves the case's dropout out.
    """
    return case.step(variant, twin(load), ranks, case.dropout if dropout else 0.0)


def gate(
    case: Case, load: Workload, ranks: Mapping[str, int], names: Sequence[str] = ()
) -> tuple[Parity, dict[str, Step]]:
    """The case's parity check, and the steps it compared.

    Each implementation among `names` is judged by itself; the dispatch takes one of them, or PEFT's
    own layers, which prove nothing. With dropout it compares without: the masks differ by design
    (`heterolora verify` compares them with the specification's).

    Args:
        names: of the variants to be timed; without any the fused one is judged as a whole.
    """
    steps = {name: build(case, name, load, ranks, dropout=False) for name in (_BASE, "fused")}
    others = []
    if case.kind in ("op", "group") and case.dtype != "fp32":
        steps[peers.LOW_PRECISION] = build(case, peers.LOW_PRECISION, load, ranks, dropout=False)
        others.append(steps[peers.LOW_PRECISION])
    judged = [name for name in ("aten", "triton") if name in names]
    report = steps["fused"].fuse_report
    if not judged and report is not None and report.left and "aten" in case.variants:
        judged = ["aten"]
    for name in judged:
        steps[name] = build(case, name, load, ranks, dropout=False)
    judged = judged or ["fused"]
    for name in judged:
        parity = case.parity(steps[_BASE], steps[name], *others)
        if parity.green and case.dropout and name == judged[-1]:
            problem = ran(build(case, name, load, ranks))
            parity = Parity(False, problem) if problem else parity
        if not parity.green:
            break
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
    if case.recipe is not None:
        return _run_training(case, case.recipe, device, rounds, on_phase, on_round)
    on_phase("parity")
    load = case.build(case.torch_dtype, device)
    ranks = case.ranks_of(load.targets)
    names, skipped = variants(case, load, ranks, device, compiled=compiled)
    judged = follow.gate_load(load) if case.kind == "model" else load
    parity, steps = gate(case, judged, ranks, names)
    if "aten" in steps and "aten" not in names:
        # On a CPU it is what is fused, unless the dispatch left some of it to PEFT.
        names.append("aten")
        skipped.pop("aten", None)
    if judged.tokens < load.tokens:
        steps = {"fused": build(case, "fused", load, ranks)}
    result = partial(_result, case, load, ranks, parity, steps["fused"], skipped=skipped)
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


def _run_training(
    case: Case,
    recipe: training.TrainRecipe,
    device: torch.device,
    rounds: int,
    on_phase: Callable[[str], None],
    on_round: Callable[[int], None] | None,
) -> CaseResult:
    """As `run_case`, of whole runs. The gate compares one step of the searched ranks, every
    gradient, and then the losses of runs.
    """
    training.check_device(device)
    on_phase("search")
    load = case.build(case.torch_dtype, device)
    assert isinstance(load, TrainingLoad)
    plan = training.search(load, recipe)
    on_phase("parity")
    ranks = plan.searched.ranks
    judged = ["aten", *(["triton"] if device.type == "cuda" else [])]
    parity, steps = gate(case, follow.gate_load(plan.load), ranks, judged)
    if parity.green:
        parity = follow.losses_follow(plan, parity)
    result = partial(_result, case, plan.load, ranks, parity, steps.pop("fused"))
    steps.clear()
    gc.collect()
    if not parity.green:
        return result()
    on_phase("timing")
    timing, trained = training.measure_time(plan, rounds, device, on_round)
    on_phase("memory and launches")
    used, counted = training.measure_memory(plan, device)
    return result(timing=timing, training=trained, memory=used, launches=counted)


def _result(
    case: Case,
    load: Workload,
    ranks: Mapping[str, int],
    parity: Parity,
    fused: Step,
    **found: Any,
) -> CaseResult:
    return CaseResult(
        case=case.name,
        kind=case.kind,
        description=case.description,
        shapes=dict(case.shapes),
        dtype=case.dtype,
        ranks=dict(ranks),
        tokens=load.tokens,
        layers=load.layers,
        repeats=load.repeats,
        dropout=case.dropout,
        work=minimum(
            _groups(fused, load),
            load.targets,
            ranks,
            tokens=load.tokens,
            itemsize=case.torch_dtype.itemsize,
        ),
        parity=parity,
        **found,
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
    # Launched one by one: a replay allocates nothing, its memory was taken by the capture.
    peak = memory.peak_bytes(partial(Step.__call__, step), device)
    step.clear_gradients()
    return memory.MemoryUse(memory.resident_bytes(step.tensors()), peak, saved)
