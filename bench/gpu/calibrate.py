"""What launches and Triton's matmul cost on a device; the times by path that dispatch looks up."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from heterolora.bench.cases.shapes import GROUPS
from heterolora.bench.harness import timing as harness
from heterolora.bench.harness.record import BenchRun, CaseResult
from heterolora.bench.harness.timing import BenchError, Stopwatch, stopwatch_for
from heterolora.bench.report.measures import devices
from heterolora.kernels.gpu.launch import Launch, launch_for
from heterolora.kernels.tuned import measured
from heterolora.kernels.tuned.measured import GroupShape, LowRank, MeasuredPath, Tuned

# Imported where it is needed: it needs triton.
if TYPE_CHECKING:
    from heterolora.bench.gpu.subjects import Operands

__all__ = ["launch_gap", "measured_paths", "path_tables", "triton_matmul"]


def triton_matmul(
    device: torch.device,
    shapes: Sequence[tuple[int, int, int]] = (
        (8192, 4096, 4096),
        (8192, 2048, 2048),
        (8192, 4096, 14336),
    ),
    *,
    rank: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    launch: Launch | None = None,
    stopwatch: Stopwatch | None = None,
) -> tuple[float, dict[str, tuple[float, float]]]:
    """Throughput of the expand kernel that runs here over that of torch's matmul.

    Both per FLOP: expand does 2 m n (k + rank), the library 2 m n k. With a rank and not without,
    because at rank 0 the variant by tensor descriptors does not run.

    Args:
        shapes: m, k and n of each.

    Returns:
        The median over the shapes; and for each, "KxN-mM-rR", seconds of the library's matmul and
        of expand.
    """
    from heterolora.bench.gpu.subjects import KERNELS, operands, run_all

    watch = stopwatch or stopwatch_for(device)
    found, ratios = {}, []
    for m, k, n in shapes:
        sets = operands(m, k, n, rank, dtype, device, launch)
        options = launch or launch_for(sets[0].x)
        tma = KERNELS["expand_tma"]
        subject = tma if tma.applies(sets[0], options) else KERNELS["expand"]
        out = torch.empty(m, n, dtype=dtype, device=device)

        def library(sets: "Sequence[Operands]" = sets, out: Tensor = out) -> None:
            for one in sets:
                torch.mm(one.x, one.w.t(), out=out)

        calls: dict[str, Callable[[], object]] = {
            "library": library,
            "expand": partial(run_all, subject, sets, options),
        }
        timing = harness.paired(calls, rounds=10, warmup=3, baseline="library", stopwatch=watch)
        ratio = timing.summary("expand").ratio
        ratios.append((k + rank) / k / ratio)
        seconds = statistics.median(timing.seconds["library"]) / len(sets)
        found[f"{k}x{n}-m{m}-r{rank}"] = (seconds, seconds * ratio)
    return statistics.median(ratios), found


def launch_gap(device: torch.device, count: int = 200) -> float:
    """Seconds a launch takes on a CUDA device beside its work: small operations in a graph, which
    the host does not slow down."""
    small = torch.ones(16, device=device)
    small.mul_(1.0)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            small.mul_(1.0)
    graph.replay()
    watch = stopwatch_for(device)
    best = math.inf
    for _ in range(5):
        watch.start()
        graph.replay()
        best = min(best, watch.stop()[0] / count)
    return best


def measured_paths(results: Iterable[CaseResult]) -> list[MeasuredPath]:
    """The times that dispatch can look up, out of results of the bench.

    Of linears and groups alone whose copies all have the same ranks, without shortcut: a step of
    such a case divided by its copies is one group's forward and backward.
    """
    found = []
    for result in results:
        shape = _shape(result)
        if shape is None or result.timing is None:
            continue
        # On a CPU "fused" is "aten", which is measured apart only where that is not so.
        aten = "aten" if "aten" in result.timing.seconds else "fused"
        names = {"peft": "peft", "aten": aten, "triton": "triton", "base": "base-only"}
        seconds = {
            path: result.timing.summary(name).milliseconds / 1e3 / result.repeats
            for path, name in names.items()
            if name in result.timing.seconds
        }
        found.append(MeasuredPath(shape, {k: v for k, v in seconds.items() if v > 0}))
    return found


def path_tables(runs: Iterable[BenchRun], folder: Path) -> dict[Path, Tuned]:
    """What dispatch is to look up, out of the results of each device, by the file it belongs in.

    Args:
        folder: of such files; tiles that one of a device holds are kept.

    Raises:
        BenchError: a file that is there cannot be read.
    """
    found = {}
    for name, group in devices(runs).items():
        path = folder / f"{measured.slug(name)}.json"
        try:
            before = measured.read(path) if path.is_file() else Tuned(name)
        except ValueError as error:
            raise BenchError(str(error)) from error
        newest = max((run.environment for run in group), key=lambda e: str(e.get("date")))
        versions = newest.get("versions") or {}
        results = (result for run in group for result in run.results)
        found[path] = dataclasses.replace(
            before,
            paths=tuple(measured_paths(sorted(results, key=lambda result: result.case))),
            versions={key: versions[key] for key in ("torch", "triton") if key in versions},
            commit=newest.get("commit"),
            date=str(newest.get("date", "")),
        )
    return found


def _shape(result: CaseResult) -> GroupShape | None:
    """The one shape of every copy, or None."""
    shapes = result.shapes
    if result.kind not in ("op", "group") or shapes.get("shortcut"):
        return None
    label = result.case.rpartition(f"-m{shapes['m']}-")[0]
    sites = GROUPS[label][1] if label in GROUPS else {"proj": shapes["n"]}
    if len(sites) != shapes["sites"]:
        return None
    ranks = {
        tuple(result.ranks.get(f"copies.{i}.{name}", 0) for name in sites)
        for i in range(result.repeats)
    }
    if len(ranks) != 1:
        return None
    branches = (LowRank(r, i, 0, result.dropout > 0) for i, r in enumerate(ranks.pop()))
    return GroupShape(
        shapes["m"],
        (shapes["k"],),
        tuple(sites.values()),
        tuple(branches),
        itemsize={"fp32": 4, "bf16": 2}[result.dtype],
        # PEFT keeps adapters in float32.
        factor_itemsize=4,
    )
