"""What the kernels are to reach on a GPU: the bars, the floor under each, and what was measured.

A bar is a ratio of two times. The floor of an overhead over the frozen layers is the least time of
the work with LoRA over that without, at the two ceilings measured on the device. Measured times,
and ceilings, come from result files of a GPU, and nowhere else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heterolora.bench.harness.record import BenchRun
from heterolora.bench.report.measures import devices, field_of, ratios
from heterolora.bench.report.tables import Table, markdown_of

__all__ = ["NOT_MEASURED", "TARGETS", "Target", "targets_table"]

NOT_MEASURED = "not measured yet"

_D4096, _D2048 = "op-4096x4096-m8192-r16-bf16", "op-2048x2048-m8192-r16-bf16"
_STEP = "llama-1b-8x1024-bf16-uniform"
_SHORT = ("op-2048x2048-m1024-r16-bf16", "llama-1b-layer-2x128-bf16-uniform")


@dataclass(frozen=True)
class Target:
    """One bar.

    Attributes:
        name: what is compared.
        cases: of the registry; with two, the ratios of both are compared.
        variants: numerator and denominator of each ratio.
        must: the bar.
        goal: what would be good; None where none is set.
        least: whether the ratio has to be at least `must` (a gain), not at most (an overhead).
        expand: compares the expand kernel alone, whose times are among the ceilings of a run.
    """

    name: str
    cases: tuple[str, ...]
    variants: tuple[str, str]
    must: float
    goal: float | None = None
    least: bool = False
    expand: bool = False

    def holds(self, ratio: float) -> bool:
        return ratio >= self.must if self.least else ratio <= self.must

    def floor(self, runs: Sequence[BenchRun]) -> float | None:
        """The least that an overhead over the frozen layers could be on these runs' device."""
        if self.least or self.expand or len(self.cases) == 2:
            return None
        for run in runs:
            found = run.environment.get("ceilings")
            for result in run.results:
                if found and result.case == self.cases[0]:
                    return result.work.floor(found["flops"][result.dtype], found["bandwidth"])
        return None

    def measured(self, runs: Sequence[BenchRun]) -> float | None:
        """The ratio in the result files of one device, or None where it is not in them."""
        if self.expand:
            return _measured_expand(self.cases[0], runs)
        found = [_measured(name, self.variants, runs) for name in self.cases]
        if any(ratio is None for ratio in found):
            return None
        first, *other = [ratio for ratio in found if ratio is not None]
        return first / other[0] if other else first


TARGETS = (
    Target("expand / library's base matmul, d = 4096", (_D4096,), ("triton", "base-only"),
           1.05, 1.02, expand=True),
    Target("forward and backward / frozen, d = 4096", (_D4096,), ("fused", "base-only"),
           1.15, 1.06),
    Target("forward and backward / frozen, d = 2048", (_D2048,), ("fused", "base-only"),
           1.25, 1.12),
    Target("q, k, v in one group / three frozen layers, d = 4096",
           ("qkv-4096-m8192-r16-bf16",), ("fused", "base-only"), 1.05, 0.98),
    Target("PEFT eager / fused, d = 4096", (_D4096,), ("peft", "fused"), 1.25, 1.35, least=True),
    Target("PEFT eager / fused, d = 2048", (_D2048,), ("peft", "fused"), 1.5, 1.7, least=True),
    Target("addmm composition / fused, d = 4096", (_D4096,), ("aten", "fused"),
           1.08, 1.15, least=True),
    Target("mixed ranks / uniform at equal sum, q, k, v, d = 4096",
           ("qkv-4096-m8192-mixed16-bf16", "qkv-4096-m8192-r16-bf16"), ("fused", "base-only"),
           1.03),
    Target("PEFT eager / fused in a graph, one linear, 1,024 tokens", (_SHORT[0],),
           ("peft", "graph-fused"), 2.0, 4.0, least=True),
    Target("PEFT eager / fused in a graph, a Llama-1B layer, 256 tokens", (_SHORT[1],),
           ("peft", "graph-fused"), 2.0, 4.0, least=True),
    Target("PEFT eager / fused, whole Llama-1B step", (_STEP,), ("peft", "fused"),
           1.25, least=True),
    Target("compiled PEFT / compiled fused, whole Llama-1B step", (_STEP,),
           ("compile-peft", "compile-fused"), 1.05, least=True),
)  # fmt: skip


def targets_table(runs: Iterable[BenchRun]) -> str:
    """A Markdown table: bars, goals, and for each GPU the floor and what was measured."""
    gpus = {
        name: found
        for name, found in devices(runs).items()
        if all(field_of(run, "device_type") == "cuda" for run in found)
    }
    heads = [head for name in gpus for head in (f"floor, {name}", f"measured, {name}")]
    rows = []
    for target in TARGETS:
        sign = "≥" if target.least else "≤"
        cells = []
        for found in gpus.values():
            floor = target.floor(found)
            cells += ["" if floor is None else f"{floor:.2f}"]
            cells += [_shown(target, target.measured(found))]
        rows.append(
            (
                target.name,
                f"{sign} {target.must:.2f}",
                "" if target.goal is None else f"{target.goal:.2f}",
                *(cells or [NOT_MEASURED]),
            )
        )
    head = ("target", "must hold", "goal", *(heads or ["measured"]))
    return markdown_of(Table(head, rows))


def _shown(target: Target, ratio: float | None) -> str:
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio:.2f}, {'holds' if target.holds(ratio) else 'missed'}"


def _measured(case: str, variants: tuple[str, str], runs: Sequence[BenchRun]) -> float | None:
    results = [result for run in runs for result in run.results if result.case == case]
    found = ratios(results, *variants)
    return found[0] if found else None


def _measured_expand(case: str, runs: Sequence[BenchRun]) -> float | None:
    shape = case.removeprefix("op-").removesuffix("-bf16")
    for run in reversed(runs):
        seconds = (run.environment.get("ceilings") or {}).get("expand", {}).get(shape)
        if seconds is not None:
            library, ours = seconds
            return ours / library
    return None
