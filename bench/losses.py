"""The blocks of docs/gpu.md: where the cost model expects the Triton kernels to lose to `aten`, and
by which step.

Both are split into the same five parts of a group's forward and backward pass, so that each part of
one stands against that of the other. Predictions, all of them.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from heterolora.bench.cases.shapes import GROUPS
from heterolora.bench.gpu.targets import DEVICE, TARGETS, targets_table
from heterolora.bench.harness.record import BenchRun
from heterolora.bench.report.tables import Table, markdown_of
from heterolora.kernels.chips import chip_for
from heterolora.kernels.cost import Estimate, LowRank, Problem, estimate, load_of
from heterolora.kernels.devices import Device, device_for
from heterolora.kernels.group import bucket
from heterolora.kernels.schedule import plan

__all__ = [
    "BLOCKS",
    "DEVICES",
    "PARTS",
    "Compared",
    "balance_table",
    "compare",
    "losses_table",
    "parts_table",
    "sensitivity_table",
    "sweep",
]

DEVICES = ("H100", "A100", "B200", "L4", "RTX 4090")
_ROWS = (256, 1024, 4096, 8192, 16384)
_SHAPES = (
    (1024, 1024),
    (2048, 2048),
    (4096, 4096),
    (8192, 8192),
    (4096, 1024),
    (4096, 14336),
    (14336, 4096),
)
_RANKS = (8, 16, 64, 128)
# By pass: which steps of either implementation compute a part.
PARTS: Mapping[str, tuple[str, frozenset[str]]] = {
    "S": ("forward", frozenset({"pack A, B", "shrink", "stack A", "cast A", "S"})),
    "Y": ("forward", frozenset({"expand", "cast B", "S B", "base"})),
    "dS and dB": (
        "backward",
        frozenset(
            {"pack A, B", "dY pass", "sum of dS"}
            | {"scale and cast B", "dS", "dB", "scale and cast dB"}
        ),
    ),
    "dX": ("backward", frozenset({"dX", "stack A", "cast A", "dS A"})),
    "dA": ("backward", frozenset({"dA pass", "sum of dA, dB", "dA", "copy dA"})),
}


@dataclass(frozen=True)
class Compared:
    """Triton and `aten` on one problem and device.

    Attributes:
        ratio: Triton's seconds over those of `aten`, host included.
        triton, aten: device seconds of each of `PARTS`.
    """

    problem: Problem
    ratio: float
    triton: dict[str, float]
    aten: dict[str, float]

    @property
    def lost(self) -> bool:
        return self.ratio > 1

    @property
    def worst(self) -> str:
        """The part that loses the most time; "host" where all parts together win on the device."""
        if sum(self.triton.values()) <= sum(self.aten.values()):
            return "host"
        return max(PARTS, key=lambda part: self.triton[part] - self.aten[part])


def compare(problem: Problem, device: Device) -> Compared:
    """Both implementations, part by part.

    Raises:
        ValueError: the cost model has a step that is of no part; `PARTS` has to name it.
    """
    found = estimate(problem, device)
    triton, aten = (_parts(found[path], device) for path in ("triton", "aten"))
    return Compared(problem, found["triton"].seconds / found["aten"].seconds, triton, aten)


def _parts(found: Estimate, device: Device) -> dict[str, float]:
    total = dict.fromkeys(PARTS, 0.0)
    for when, steps in (("forward", found.forward.steps), ("backward", found.backward.steps)):
        for step in steps:
            part = next(
                (p for p, (w, names) in PARTS.items() if w == when and step.name in names), ""
            )
            if not part:
                text = f"{found.implementation}, {when}: the step {step.name!r} is of no part"
                raise ValueError(text)
            total[part] += load_of([step], device).device
    return total


def sweep(device: Device) -> Iterator[Compared]:
    """Single linears in bfloat16 with PEFT's float32 adapters."""
    for m, (k, n), rank in itertools.product(_ROWS, _SHAPES, _RANKS):
        yield compare(_problem(m, k, n, rank), device)


def _problem(m: int, k: int, n: int, rank: int) -> Problem:
    return Problem(m, (k,), (n,), (LowRank(rank),), itemsize=2, factor_itemsize=4)


def losses_table() -> str:
    """A row a device, launched by the host and in a graph: how often Triton loses over the sweep,
    at which m, and by which part."""
    rows = []
    for name in DEVICES:
        launched = device_for(name)
        for how, device in (("", launched), (", in a graph", launched.captured())):
            found = list(sweep(device))
            lost = [item for item in found if item.lost]
            parts = Counter(item.worst for item in lost)
            rows.append(
                (
                    f"{name}{how}",
                    f"{len(lost)} of {len(found)}",
                    *(str(sum(item.problem.m == m for item in lost)) for m in _ROWS),
                    f"{min(item.ratio for item in found):.2f}",
                    f"{max(item.ratio for item in found):.2f}",
                    ", ".join(f"{part} {count}" for part, count in parts.most_common()),
                )
            )
    by_m = (f"m = {m:,}" for m in _ROWS)
    head = ("device", "Triton slower", *by_m, "least ratio", "greatest ratio", "lost by")
    return markdown_of(Table(head, rows))


def parts_table() -> str:
    """Triton over `aten` part by part, at m = 8192 and rank 16."""
    rows = []
    for name, (k, n) in itertools.product(DEVICES, _SHAPES):
        device = device_for(name)
        problem = _problem(8192, k, n, 16)
        found = compare(problem, device)
        cells = (f"{found.triton[part] / found.aten[part]:.2f}" for part in PARTS)
        graph = compare(problem, device.captured()).ratio
        rows.append((f"{name}, {k} to {n}", *cells, f"{graph:.2f}", f"{found.ratio:.2f}"))
    head = ("device, in to out features", *PARTS, "all", "all, launched by the host")
    return markdown_of(Table(head, rows))


def sensitivity_table() -> str:
    """What the predictions of the targets become if an assumption about the H100 is wrong; a bar
    that is missed in brackets."""
    assumed = device_for(DEVICE)
    changed = {"as assumed": assumed}
    for share in (0.80, 0.85, 0.95, 1.0):
        label = f"Triton's matmul at {share:g} of the library's, not {assumed.triton_matmul:g}"
        changed[label] = replace(assumed, triton_matmul=share)
    for us in (2.5, 10):
        label = f"{us:g} us of the host a launch, not {assumed.host * 1e6:g}"
        changed[label] = replace(assumed, host=us * 1e-6)
    for call in (0.5, 2.0):
        changed[f"Python of a call {call:g} times as long"] = replace(assumed, call=call)
    changed["all of it in graphs"] = assumed.captured()
    changed["bandwidth 10 % lower"] = replace(assumed, bandwidth=0.9 * assumed.bandwidth)
    rows = []
    for index, target in enumerate(TARGETS):
        ratios = [target.predicted(device) for device in changed.values()]
        cells = (f"{r:.2f}" if target.holds(r) else f"({r:.2f})" for r in ratios)
        rows.append((f"{index + 1}. {target.name}", *cells))
    lost = (sum(item.lost for item in sweep(device)) for device in changed.values())
    rows.append(("linears of the sweep where Triton is slower", *map(str, lost)))
    return markdown_of(Table(("target", *changed), rows))


def balance_table() -> str:
    """Simulated: how evenly a group's launch keeps the multiprocessors busy, expand and dX, and
    mixed ranks over uniform ones of the same sum, the worst of all orders and devices."""
    rows = []
    for m, (label, (k, sites)) in itertools.product((8192, 1024), GROUPS.items()):
        ns = tuple(sites.values())
        same, mixed = ((48,) * 3, (8, 128, 8)) if len(ns) == 3 else ((64,) * 2, (120, 8))
        cells, worst = [], 0.0
        for name in DEVICES:
            balances = []
            for kernel in ("expand", "dx"):
                chip = chip_for(name)
                uniform = plan(kernel, m, ns, k, (16,) * len(ns), chip)
                balances.append(f"{uniform.balance:.0%}")
                even = plan(kernel, m, ns, k, tuple(map(bucket, same)), chip).makespan
                for ranks in itertools.permutations(mixed):
                    widths = tuple(map(bucket, ranks))
                    worst = max(worst, plan(kernel, m, ns, k, widths, chip).makespan / even)
            cells.append(", ".join(balances))
        rows.append((f"{label}, m = {m:,}", *cells, f"{worst:.2f}"))
    head = ("group, tokens", *(f"{name}: Y, dX" for name in DEVICES), "mixed / uniform")
    return markdown_of(Table(head, rows))


# The blocks of docs/gpu.md, each written from all runs.
BLOCKS: dict[str, Callable[[Sequence[BenchRun]], str]] = {
    "targets": targets_table,
    "losses": lambda runs: losses_table(),
    "parts": lambda runs: parts_table(),
    "balance": lambda runs: balance_table(),
    "sensitivity": lambda runs: sensitivity_table(),
}
