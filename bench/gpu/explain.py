"""`heterolora bench --explain`: what the cost model expects of a case's groups, and why.

Everything printed is a prediction of :mod:`heterolora.kernels.cost` from two ceilings of the
device. They are measured on the spot where the device is here, and otherwise a stated share of the
vendor's peaks. Measured steps of the same case and device are printed beside it where a result file
has them.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heterolora.bench.cases import peers
from heterolora.bench.harness import record
from heterolora.bench.harness.timing import BenchError, stopwatch_for
from heterolora.kernels.cost import Estimate, LowRank, Problem, estimate
from heterolora.kernels.devices import HOST, PEAKS, Device, cpu_name, device_for
from heterolora.kernels.dispatch.measured import shipped_for
from heterolora.kernels.dispatch.paths import Choice, decide

if TYPE_CHECKING:
    from rich.console import Console

    from heterolora.bench.cases.registry import Case

__all__ = [
    "HEADER",
    "RESULTS",
    "CaseExplained",
    "Device",
    "GroupExplained",
    "as_json",
    "ceilings",
    "device_line",
    "explain_case",
    "measure_device",
    "named_device",
    "print_explained",
]

RESULTS = Path(__file__).resolve().parents[1] / "results"
SCHEMA_VERSION = 1
_KIND = "heterolora.bench.explain"

# The variant of the bench that each row of the model predicts.
_VARIANTS = {"base": "base-only", "peft": "peft", "chosen": "fused"}


@dataclass(frozen=True)
class GroupExplained:
    """Groups of one shape.

    Attributes:
        modules: the names of each such group's layers.
        problem: their shapes.
        estimates: by implementation; Triton's only for a GPU.
        chosen: what "auto" runs.
        reason: why, with the expected times.
    """

    modules: tuple[tuple[str, ...], ...]
    problem: Problem
    estimates: dict[str, Estimate]
    chosen: str
    reason: str


@dataclass(frozen=True)
class CaseExplained:
    """One case on one device.

    Attributes:
        expected: seconds of all groups together, forward and backward, by implementation, and
            "chosen" for the chosen one of each group.
        measured: median seconds of a whole training step by variant, or empty.
    """

    case: str
    description: str
    groups: list[GroupExplained]
    expected: dict[str, float]
    measured: dict[str, float]


def explain_case(
    case: "Case", device: Device, *, on_gpu: bool, results: Path = RESULTS
) -> CaseExplained:
    """Predict every group of `case`. The model is built on the CPU and run once to find its groups.

    Args:
        on_gpu: whether `device` is one; Triton's kernels are no choice elsewhere.
        results: folder of result files, <device>/<case>.json.

    Raises:
        BenchError: a malformed result file; a case whose step the cost model does not describe.
    """
    if not case.described:
        raise BenchError(f"{case.name}: the cost model predicts training steps without shortcuts")
    names = ("base", "peft", "aten", "triton") if on_gpu else ("base", "peft", "aten")
    groups = []
    for problem, modules in _problems(case).items():
        found = estimate(problem, device)
        groups.append(
            GroupExplained(
                tuple(modules),
                problem,
                {name: found[name] for name in names},
                *_choice(problem, device, on_gpu),
            )
        )
    expected = {
        name: sum(g.estimates[name].seconds * len(g.modules) for g in groups) for name in names
    }
    expected["chosen"] = sum(g.estimates[g.chosen].seconds * len(g.modules) for g in groups)
    measured = _measured(results / record.slug(device.name) / f"{case.name}.json", case.name)
    return CaseExplained(case.name, case.description, groups, expected, measured)


def _choice(problem: Problem, device: Device, on_gpu: bool) -> Choice:
    """What `fuse` would run on the device, by what was measured on it or by the cost model."""
    if not problem.live:
        return Choice("base", "no adapter")
    among = ("peft", "aten", "triton") if on_gpu else ("peft", "aten")
    if on_gpu and any(branch.dropout for branch in problem.live):
        among = ("peft", "triton")
    return decide(problem, device, shipped_for(device.name), among)


def _problems(case: "Case") -> dict[Problem, list[tuple[str, ...]]]:
    """The distinct shapes among the case's groups, in model order, and who has them."""
    load = case.build(case.torch_dtype, torch.device("cpu"))
    ranks = case.ranks_of(load.targets)
    with_bias = {name: load.model.get_submodule(name).bias is not None for name in load.targets}
    shapes, tokens = load.targets, load.tokens
    groups = peers.build_step("fused", load, ranks).fuse_report.groups
    group_of = {name: group for group in groups for name in group}
    found: dict[Problem, list[tuple[str, ...]]] = {}
    for group in dict.fromkeys(group_of.get(name, (name,)) for name in shapes):
        problem = Problem(
            tokens,
            (shapes[group[0]][0],),
            tuple(shapes[name][1] for name in group),
            tuple(
                LowRank(ranks[name], i, dropout=case.dropout > 0) for i, name in enumerate(group)
            ),
            itemsize=case.torch_dtype.itemsize,
            # PEFT keeps adapters in float32.
            factor_itemsize=4,
            bias=any(with_bias[name] for name in group),
        )
        found.setdefault(problem, []).append(group)
    return found


def _measured(path: Path, case: str) -> dict[str, float]:
    if not path.is_file():
        return {}
    timings = [r.timing for r in record.read_run(path).results if r.case == case and r.timing]
    if not timings:
        return {}
    return {name: timings[0].summary(name).milliseconds / 1e3 for name in timings[0].seconds}


def device_line(device: Device, dtype: torch.dtype, *, on_gpu: bool) -> str:
    """The ceilings, and where they come from."""
    flops = device.flops if dtype.itemsize == 2 else device.flops32
    line = (
        f"PREDICTED from ceilings of {device.name}: {flops / 1e12:.3g} TFLOP/s in "
        f"{str(dtype).removeprefix('torch.')} and {device.bandwidth / 1e9:.4g} GB/s "
        f"({device.source}); {device.gap * 1e6:.2g} us a launch"
    )
    if not on_gpu:
        return line
    return (
        f"{line} on the device, {device.host * 1e6:.2g} us on the host; Triton's base matmul at "
        f"{device.triton_matmul:.0%} of the library's (assumed)"
    )


def named_device(name: str) -> Device:
    """A GPU by the name torch reports, or by its short name in the table.

    Raises:
        BenchError: not in the table.
    """
    device = device_for(name)
    if "unknown" in device.name:
        known = ", ".join(PEAKS)
        raise BenchError(
            f"--device {name!r}: no figures for it; auto, cpu, cuda, or one of {known}"
        )
    return device


def measure_device(device: torch.device, dtype: torch.dtype, *, scale: float = 1.0) -> Device:
    """Both ceilings of a device that is here, and what a launch costs, in a few seconds.

    FLOP/s of a square matmul in `dtype` and in float32, B/s of a copy far larger than any cache,
    each the best of five; on a CPU by the CPU time of the process, as everywhere in the bench.

    Args:
        scale: shrinks the matrices, for tests.
    """
    cuda = device.type == "cuda"
    side, megabytes = (8192, 1024) if cuda else (1024, 128)
    side, elements = max(16, int(side * scale)), max(4096, int(megabytes * 2**18 * scale))

    def flops(kind: torch.dtype) -> float:
        a = torch.randn(side, side, device=device).to(kind)
        out = torch.empty_like(a)
        return 2 * side**3 / _best(lambda: torch.mm(a, a, out=out), device)

    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    bandwidth = copied / _best(lambda: target.copy_(source), device)
    small = torch.ones(16, device=device)
    launch = _launch_seconds(lambda: small.mul_(1.0), device)
    in_dtype = flops(dtype)
    wide = in_dtype if dtype == torch.float32 else flops(torch.float32)
    if not cuda:
        # A CPU runs an operation when it is launched: its overhead is a gap, not hidden.
        return Device.measured(
            cpu_name(),
            flops=in_dtype,
            flops32=wide,
            bandwidth=bandwidth,
            gap=launch,
            host=0.0,
        )
    name = torch.cuda.get_device_name(device)
    return Device.measured(name, flops=in_dtype, flops32=wide, bandwidth=bandwidth, host=launch)


def _best(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Least seconds of one call; each repeat runs it three times, so that a clock can see it."""
    call()
    watch = stopwatch_for(device)
    best = float("inf")
    for _ in range(repeats):
        watch.start()
        for _ in range(3):
            call()
        best = min(best, watch.stop()[0] / 3)
    # A clock that saw nothing must not become an infinite ceiling.
    if best <= 0:
        raise BenchError("the clock is too coarse to measure this device")
    return best


def _launch_seconds(call: Callable[[], object], device: torch.device, count: int = 1000) -> float:
    """Seconds the host takes to launch one small operation."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = clock()
        for _ in range(count):
            call()
        best = min(best, (clock() - started) / count)
    return best if best > 0 else HOST


def ceilings(device: torch.device, *, scale: float = 1.0) -> dict[str, Any]:
    """{"bandwidth": B/s, "flops": {"fp32", "bf16": FLOP/s}}, measured by :func:`measure_device`."""
    found = measure_device(device, torch.bfloat16, scale=scale)
    return {"bandwidth": found.bandwidth, "flops": {"fp32": found.flops32, "bf16": found.flops}}


def print_explained(out: "Console", explained: CaseExplained) -> None:
    """Tables of all groups, then of the case."""
    from rich.table import Table
    from rich.text import Text

    out.print(Text(f"{explained.case}: {explained.description}", style="bold"))
    for group in explained.groups:
        p = group.problem
        ranks = ", ".join(str(b.rank) for b in p.branches)
        out.print(
            Text(
                f"{_label(group.modules)}: m {p.m}, k {p.sources[0]}, "
                f"n {', '.join(map(str, p.sites))}, r {ranks}; {group.chosen}: {group.reason}"
            )
        )
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for index, column in enumerate(HEADER):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for name, item in group.estimates.items():
            table.add_row(*_row(name, item))
        out.print(table)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(("all groups", *_TOTALS)):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in _totals(explained):
        table.add_row(*row)
    out.print(table)
    if explained.measured:
        out.print(
            Text(
                "measured: the whole training step from bench/results, with attention, loss and "
                "optimizer; only the differences to base compare"
            )
        )


HEADER = ("expected", "MB", "GFLOP", "launches", "fwd ms", "bound by", "bwd ms", "bound by", "ms")
_TOTALS = ("expected ms", "over base", "measured step", "over base")


def _row(name: str, item: Estimate) -> tuple[str, ...]:
    forward, backward = item.forward, item.backward
    return (
        name,
        f"{item.bytes / 1e6:.2f}",
        f"{item.flops / 1e9:.2f}",
        str(item.launches),
        f"{forward.seconds * 1e3:.3f}",
        forward.bound,
        f"{backward.seconds * 1e3:.3f}",
        backward.bound,
        f"{item.seconds * 1e3:.3f}",
    )


def _totals(explained: CaseExplained) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, seconds in explained.expected.items():
        over = (seconds - explained.expected["base"]) * 1e3
        step = explained.measured.get(_VARIANTS.get(name, ""))
        floor = explained.measured.get(_VARIANTS["base"])
        rows.append(
            (
                name,
                f"{seconds * 1e3:.3f}",
                f"{over:+.3f}",
                "" if step is None else f"{step * 1e3:.1f}",
                "" if step is None or floor is None else f"{(step - floor) * 1e3:+.1f}",
            )
        )
    return rows


def _label(groups: Sequence[tuple[str, ...]]) -> str:
    parent, _, first = groups[0][0].rpartition(".")
    inside = all(name.rpartition(".")[0] == parent for name in groups[0])
    others = [name.rpartition(".")[2] if inside else name for name in groups[0][1:]]
    label = " + ".join([f"{parent}.{first}" if parent else first, *others])
    return label if len(groups) == 1 else f"{label} and {len(groups) - 1} alike"


def as_json(explained: Sequence[tuple[Device, CaseExplained]]) -> dict[str, Any]:
    """All cases with the device each was predicted for; seconds, bytes and FLOPs, plain types."""

    def half(item: Any) -> dict[str, Any]:
        return {
            "seconds": item.seconds,
            "bytes": item.bytes,
            "flops": item.flops,
            "launches": item.launches,
            "bound": item.bound,
        }

    return {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "prediction": True,
        "cases": [
            {
                "case": case.case,
                "device": dataclasses.asdict(device),
                "expected_seconds": case.expected,
                "measured_step_seconds": case.measured,
                "groups": [
                    {
                        "modules": group.modules,
                        "problem": dataclasses.asdict(group.problem),
                        "chosen": group.chosen,
                        "reason": group.reason,
                        "estimates": {
                            name: {"forward": half(item.forward), "backward": half(item.backward)}
                            for name, item in group.estimates.items()
                        },
                    }
                    for group in case.groups
                ],
            }
            for device, case in explained
        ],
    }
