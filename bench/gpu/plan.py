"""What `heterolora bench gpu` runs, in order of importance, and how long each should take."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from heterolora.bench.cases import peers
from heterolora.bench.cases.groups import group
from heterolora.bench.cases.registry import CASES, Case
from heterolora.bench.harness.steps import Workload
from heterolora.bench.report.targets import TARGETS

__all__ = ["Clock", "Job", "Pace", "paths_plan", "plan", "without_triton"]

# What `fused` runs is chosen by dispatch and may be Triton's.
_NOT_TRITON = frozenset(
    {"peft", "base-only", "peft-lowp", "aten", "compile-peft", "graph-peft", "graph-base-only"}
)
# What the dispatch tables hold.
_PATHS = ("peft", "base-only", "aten", "triton")
# Seconds a case takes on a large GPU, most of them to build it, to compile its kernels and for the
# gate; a guess that `Pace` corrects by what the cases took.
_SECONDS = {
    "train": 120.0, "op": 8.0, "group": 10.0, "layer": 12.0, "model": 30.0, "scoring": 20.0
}  # fmt: skip
_COMPILING = 90.0
# A round of a train case is whole runs of many steps.
_TRAIN_ROUNDS = 3


@dataclass(frozen=True)
class Job:
    """A case, with or without the variants that torch.compile makes."""

    case: Case
    compiled: bool = False

    @property
    def variants(self) -> frozenset[str]:
        """What it would time, as far as that applies."""
        return frozenset(
            name for name in self.case.variants if self.compiled or name not in peers.COMPILED
        )

    def rounds(self, asked: int) -> int:
        """How many of the rounds asked for it runs."""
        return min(asked, _TRAIN_ROUNDS) if self.case.kind == "train" else asked


class Clock:
    """Seconds that may still be spent."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()

    def share(self, part: float) -> "Clock":
        """A clock of its own for this part of what is left."""
        return Clock(part * max(0.0, self.left()), self._clock)


class Pace:
    """Expected seconds of a job, corrected by what jobs have taken so far.

    Args:
        factor: first guess of the correction.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self._factor, self._guessed, self._taken = factor, 0.0, 0.0

    def expected(self, job: Job) -> float:
        factor = self._taken / self._guessed if self._guessed else self._factor
        return factor * _guess(job)

    def ran(self, job: Job, seconds: float) -> None:
        self._guessed += _guess(job)
        self._taken += seconds


def _guess(job: Job) -> float:
    return _SECONDS.get(job.case.kind, 30.0) + _COMPILING * job.compiled


def plan(*, rehearsal: bool = False) -> list[Job]:
    """The cases behind the targets, those to be compiled last among them; then all others."""
    if rehearsal:
        return [Job(case) for case in _rehearsal()]
    named = {name: None for target in TARGETS for name in target.cases}
    compiled = {
        name
        for target in TARGETS
        for name in target.cases
        if not peers.COMPILED.keys().isdisjoint(target.variants)
    }
    first = [name for name in named if name in CASES]
    jobs = [Job(CASES[name]) for name in first if name not in compiled]
    for name in first:
        if name in compiled:
            # The second counts where compiling no longer fits.
            jobs += [Job(CASES[name], compiled=True), Job(CASES[name])]
    rest = [case for case in CASES.values() if not case.quick and case.name not in named]
    return jobs + [Job(case) for case in sorted(rest, key=_importance)]


def paths_plan(*, rehearsal: bool = False) -> list[Job]:
    """The linears and groups whose times dispatch is to know, by implementation."""
    cases = {job.case.name: job.case for job in plan(rehearsal=rehearsal)}
    uniform = [
        replace(case, variants=_PATHS)
        for case in cases.values()
        if case.kind in ("op", "group")
        and case.ranks.removeprefix("r").isdigit()
        and not case.dropout
        and not case.shapes.get("shortcut")
    ]
    return [Job(case) for case in uniform]


def without_triton(job: Job) -> Job:
    """The same without what runs, or may run, Triton's kernels."""
    names = tuple(name for name in job.case.variants if name in _NOT_TRITON)
    return replace(job, case=replace(job.case, variants=names))


def _importance(case: Case) -> tuple[int, int, int]:
    """bfloat16 before float32, kinds in the order of `_SECONDS`, uniform ranks before mixed."""
    kinds = list(_SECONDS)
    place = kinds.index(case.kind) if case.kind in kinds else len(kinds)
    return (case.dtype != "bf16", place, not case.ranks.startswith("r"))


def _rehearsal() -> Sequence[Case]:
    """One case of each of the first kinds, of sizes a CPU runs in a second."""
    return [
        _tiny(CASES["op-2048x2048-m8192-r16-bf16"], {"proj": 32}),
        _tiny(CASES["qkv-2048-m8192-r16-bf16"], {"q_proj": 32, "k_proj": 16, "v_proj": 16}),
        CASES["tiny-4x16-bf16-uniform"],
    ]


def _tiny(case: Case, sites: dict[str, int]) -> Case:
    m, k, n, repeats = 16, 32, sum(sites.values()), 2

    def build(dtype: torch.dtype, device: torch.device) -> Workload:
        return group(m=m, k=k, sites=sites, repeats=repeats, dtype=dtype, device=device)

    return replace(
        case,
        name=f"rehearsal-{case.kind}-m{m}-{case.ranks}-{case.dtype}",
        description=f"rehearsal: {k} to {n}, {m} tokens",
        build=build,
        shapes={"m": m, "k": k, "n": n, "sites": len(sites), "shortcut": 0},
        flops=4.0 * m * k * n * repeats,
    )
