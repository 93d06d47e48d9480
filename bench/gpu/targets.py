"""What the kernels are to reach on an H100: the bars, what bounds them, what is expected, measured.

A bar is a ratio of two times. "Floor" is the best that the ratio could be: the least work LoRA
needs (:func:`predict.ideal_steps`) in place of ours, all at the same two ceilings. "Predicted" is
the cost model's expectation of the code as it is. Both are for the device named in the table, from
the vendor's figures. "Measured" comes from result files of a GPU, and nowhere else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heterolora.bench.cases.registry import CASES
from heterolora.bench.harness.record import BenchRun
from heterolora.bench.predict import case_seconds, ideal_steps, problems
from heterolora.bench.report.measures import devices, field_of, ratios
from heterolora.bench.report.tables import Table, markdown_of
from heterolora.kernels.cost import estimate, load_of
from heterolora.kernels.devices import Device, device_for

__all__ = ["DEVICE", "NOT_MEASURED", "TARGETS", "Target", "targets_table"]

DEVICE = "NVIDIA H100 80GB HBM3"
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

    def predicted(self, device: Device) -> float:
        """The cost model's ratio on `device`."""
        return self._ratio(device, *self.variants)

    def floor(self, device: Device) -> float:
        """The ratio with the least work LoRA needs in place of what is ours."""
        above, below = self.variants
        if self.least:
            return self._ratio(device, above, _ideal(below))
        return self._ratio(device, _ideal(above), below)

    def _ratio(self, device: Device, above: str, below: str) -> float:
        if self.expand:
            return _expand_ratio(self.cases[0], device, above)
        found = [
            case_seconds(CASES[name], device, above) / case_seconds(CASES[name], device, below)
            for name in self.cases
        ]
        return found[0] / found[1] if len(found) == 2 else found[0]

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
    """A Markdown table: bars, goals, floors, predictions, and a column for each GPU measured."""
    gpus = {
        name: found
        for name, found in devices(runs).items()
        if all(field_of(run, "device_type") == "cuda" for run in found)
    }
    device = device_for(DEVICE)
    heads = [f"measured, {name}" for name in gpus] or ["measured"]
    rows = []
    for target in TARGETS:
        sign = "≥" if target.least else "≤"
        rows.append(
            (
                target.name,
                f"{sign} {target.must:.2f}",
                "" if target.goal is None else f"{target.goal:.2f}",
                f"{target.floor(device):.2f}",
                f"{target.predicted(device):.2f}",
                *(_shown(target, target.measured(found)) for found in gpus.values()),
                *([] if gpus else [NOT_MEASURED]),
            )
        )
    head = ("target", "must hold", "goal", "floor (model)", "predicted (model)", *heads)
    return markdown_of(Table(head, rows))


def _shown(target: Target, ratio: float | None) -> str:
    if ratio is None:
        return NOT_MEASURED
    return f"{ratio:.2f}, {'holds' if target.holds(ratio) else 'missed'}"


def _ideal(variant: str) -> str:
    """What bounds a variant from below: the least work, run as the variant is."""
    prefix, dash, _ = variant.rpartition("-")
    return f"{prefix}-ideal" if prefix in ("compile", "graph") and dash else "ideal"


def _expand_ratio(case: str, device: Device, variant: str) -> float:
    """The forward matmul with the low-rank product inside over the frozen one."""
    problem = problems(CASES[case])[0]
    found = estimate(problem, device)
    steps = ideal_steps(problem) if variant == "ideal" else found["triton"].forward.steps
    ours = [step for step in steps if step.name in ("expand", "forward")]
    return load_of(ours, device).device / load_of(found["base"].forward.steps, device).device


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
