"""The offline tuner: which tile is fastest for each kernel and shape.

A candidate tile has to compute what the shipped one does before it is timed, beside the shipped one
and all others, round by round. Nothing here runs in a user's step: it fills a file of
:mod:`heterolora.kernels.tuned.measured`, which is shipped.
"""

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heterolora.bench.harness import timing as harness
from heterolora.bench.harness.files import write_whole
from heterolora.bench.harness.timing import Stopwatch, stopwatch_for
from heterolora.kernels.gpu.launch import Launch, Tile, launch_for
from heterolora.kernels.tuned import measured
from heterolora.kernels.tuned.measured import MeasuredTile, Tuned
from heterolora.verify.checks import error

# Imported where they are needed: they need triton.
if TYPE_CHECKING:
    from heterolora.bench.gpu.subjects import Operands, Subject

__all__ = [
    "CANDIDATES",
    "SHAPES",
    "TileTrial",
    "fastest_tile",
    "force",
    "tune_tiles",
]

_ROUNDS, _WARMUP = 5, 1

# m, k, n and rank in order of importance: what the targets are about, then Llama-3.1-8B's layers,
# then fewer rows. A measured tile serves whatever is within a factor of two.
SHAPES = (
    (8192, 4096, 4096, 16),
    (8192, 2048, 2048, 16),
    (8192, 4096, 14336, 16),
    (8192, 14336, 4096, 16),
    (8192, 4096, 1024, 16),
    (1024, 2048, 2048, 16),
    (1024, 4096, 4096, 16),
    (8192, 4096, 4096, 64),
    (8192, 4096, 4096, 128),
    (8192, 2048, 2048, 64),
    (256, 4096, 4096, 16),
    (8192, 1024, 1024, 16),
)
_DTYPES = (torch.bfloat16,)

_MATMUL = (
    Tile(128, 256, 64, stages=3),
    Tile(128, 256, 64, stages=4),
    Tile(256, 128, 64, stages=3),
    Tile(128, 128, 64, stages=3),
    Tile(128, 128, 64, stages=4),
    Tile(128, 128, 64, warps=4, stages=4),
    Tile(128, 128, 128, stages=2),
    Tile(64, 256, 64, warps=4, stages=4),
    Tile(64, 128, 64, warps=4, stages=4),
    Tile(128, 64, 64, warps=4, stages=4),
    Tile(64, 64, 64, warps=4, stages=4),
)
# Of m, n and k, shrink has no n, dy no k, da no n.
CANDIDATES: Mapping[str, tuple[Tile, ...]] = {
    "expand": _MATMUL,
    "expand_tma": _MATMUL,
    "dx": _MATMUL,
    "shrink": (
        Tile(64, 64, 128, stages=3),
        Tile(64, 64, 128, stages=4),
        Tile(64, 64, 128, warps=4, stages=4),
        Tile(64, 64, 64, stages=4),
        Tile(64, 64, 256, stages=2),
        Tile(128, 64, 64, stages=4),
        Tile(128, 64, 128, stages=3),
        Tile(32, 64, 128, warps=4, stages=4),
    ),
    "dy": (
        Tile(64, 256, 64, stages=2),
        Tile(64, 256, 64, stages=3),
        Tile(64, 128, 64, stages=3),
        Tile(64, 128, 64, warps=4, stages=3),
        Tile(128, 128, 64, stages=2),
        Tile(64, 64, 64, stages=3),
        Tile(32, 256, 64, stages=3),
    ),
    "da": (
        Tile(64, 64, 128, stages=3),
        Tile(64, 64, 128, stages=4),
        Tile(64, 64, 128, warps=4, stages=4),
        Tile(64, 64, 256, stages=2),
        Tile(128, 64, 128, stages=3),
        Tile(64, 64, 64, stages=4),
        Tile(32, 64, 128, stages=4),
    ),
}


@dataclass(frozen=True)
class TileTrial:
    """What became of the candidates for one kernel and shape.

    Attributes:
        shipped, best: tiles; the same where none was faster.
        seconds: of one call by tile, medians of interleaved rounds.
        skipped: why a candidate was not timed.
    """

    shipped: Tile
    best: Tile
    seconds: dict[Tile, float]
    skipped: dict[Tile, str]


def force(launch: Launch, kernel: str, tile: Tile) -> Launch:
    """The same launch, with this tile for this kernel whatever the circumstances."""
    others = {name: t for name, t in launch.tiles.items() if name.split()[0] != kernel}
    return dataclasses.replace(launch, tiles={**others, kernel: tile}, alternatives={}, measured=())


def fastest_tile(
    subject: "Subject",
    sets: "Sequence[Operands]",
    launch: Launch,
    candidates: Sequence[Tile],
    *,
    stopwatch: Stopwatch,
    rounds: int = _ROUNDS,
    left: Callable[[], float] = lambda: math.inf,
) -> TileTrial:
    """Times the candidates that compute what the shipped tile does.

    Args:
        subject: a kernel, as `subjects` runs it.
        sets: operands; one call goes through all of them, so that each begins with cold caches.
        candidates: tried while `left` is above 0, after the launch's own alternatives.
        left: seconds that may still be spent.
    """
    from heterolora.bench.gpu.subjects import run_all

    first = sets[0]
    shipped = launch.tile(subject.kernel, subject.block_r(first))
    expected, _ = _watched(subject, first, force(launch, subject.kernel, shipped))
    limit = _limit(first)
    calls = {shipped: partial(run_all, subject, sets, force(launch, subject.kernel, shipped))}
    skipped: dict[Tile, str] = {}
    for tile in (*launch.alternatives.get(subject.kernel, ()), *candidates):
        if tile in calls or tile in skipped:
            continue
        if left() <= 0:
            skipped[tile] = "no time left"
            continue
        forced = force(launch, subject.kernel, tile)
        try:
            found, spills = _watched(subject, first, forced)
        except Exception as failure:  # whatever the compiler raises is why the tile is no choice
            lines = str(failure).strip().splitlines() or ["no message"]
            skipped[tile] = f"{type(failure).__name__}: {lines[0][:200]}"
            continue
        off = max(error(value, truth) for value, truth in zip(found, expected, strict=True))
        if not off <= limit:
            skipped[tile] = f"differs from the shipped tile by {off:.2g}, limit {limit:.2g}"
        elif spills:
            skipped[tile] = f"spills {spills} registers"
        else:
            calls[tile] = partial(run_all, subject, sets, forced)
    timing = harness.paired(
        {str(tile): call for tile, call in calls.items()},
        rounds=rounds,
        warmup=_WARMUP,
        baseline=str(shipped),
        stopwatch=stopwatch,
    )
    seconds = {tile: statistics.median(timing.seconds[str(tile)]) / len(sets) for tile in calls}
    return TileTrial(shipped, min(seconds, key=lambda tile: seconds[tile]), seconds, skipped)


def _limit(one: "Operands") -> float:
    """Two results of one sum differ by a rounding of each to the dtype, and by what float32 adds
    up in another order: half an eps of each kind for each of the two, sums as random walks."""
    terms = max(one.m, one.k, one.n) + one.rank
    of_dtype, of_sum = torch.finfo(one.x.dtype).eps, torch.finfo(torch.float32).eps
    return of_dtype + of_sum * math.sqrt(terms)


def _watched(subject: "Subject", one: "Operands", launch: Launch) -> tuple[list[Tensor], int]:
    """Results on memory that held NaN, and the most registers that a kernel of this name spills."""
    spills = 0

    def start(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        nonlocal spills
        compiled = kernel[grid](*args, **options)
        spills = max(spills, getattr(compiled, "n_spills", None) or 0)

    with _poisoned():
        values = subject.run(one, dataclasses.replace(launch, start=start))
    # An error of a kernel shows when the device is done with it.
    if one.x.is_cuda:
        torch.cuda.synchronize(one.x.device)
    return values, spills


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN: a tile that leaves a place unwritten must not find there what
    the tile before it wrote."""
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def tune_tiles(
    path: Path,
    tuned: Tuned,
    device: torch.device,
    left: Callable[[], float],
    say: Callable[[str], None],
    *,
    launch: Launch | None = None,
    shapes: Sequence[tuple[int, int, int, int]] = SHAPES,
    dtypes: Sequence[torch.dtype] = _DTYPES,
    candidates: Mapping[str, Sequence[Tile]] = CANDIDATES,
    stopwatch: Stopwatch | None = None,
) -> Tuned:
    """Finds the tiles `tuned` has none for, shape by shape, and writes the file after each.

    Args:
        path: of a file of `measured`. What was tried is added, a line each, to the file of the
            same name that ends in .tried.
        tuned: what is known so far.
        left: seconds that may still be spent.
        launch: default that of the device.

    Returns:
        What the file then holds. A CPU without Triton's interpreter tunes nothing, and says so.
    """
    from heterolora.kernels.dispatch import triton_reason

    reason = triton_reason(torch.empty(0, device=device))
    if reason is not None:
        say(f"no tile is tuned: {reason}")
        return tuned
    from heterolora.bench.gpu.subjects import KERNELS, operands

    watch = stopwatch or stopwatch_for(device)
    known = {_key(entry) for entry in tuned.tiles}
    for m, k, n, rank in shapes:
        for dtype in dtypes:
            sets: list[Operands] = []
            for kernel, subject in KERNELS.items():
                if left() <= 0:
                    return tuned
                sets = sets or operands(m, k, n, rank, dtype, device, launch)
                options = launch or launch_for(sets[0].x)
                block_r, sizes = subject.block_r(sets[0]), subject.sizes(sets[0])
                key = (kernel, dtype.itemsize, block_r, *sizes)
                if key in known or not subject.applies(sets[0], options):
                    continue
                found = fastest_tile(
                    subject, sets, options, candidates[kernel], stopwatch=watch, left=left
                )
                entry = MeasuredTile(*key, tile=found.best, seconds=found.seconds[found.best])
                tuned = dataclasses.replace(tuned, tiles=(*tuned.tiles, entry))
                known.add(key)
                write_whole(path, partial(measured.write, tuned))
                with path.with_suffix(".tried").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(_tried(entry, found)) + "\n")
                say(_line(entry, found))
    return tuned


def _key(entry: MeasuredTile) -> tuple[Any, ...]:
    return entry.kernel, entry.itemsize, entry.block_r, entry.m, entry.n, entry.k


def _tried(entry: MeasuredTile, found: TileTrial) -> dict[str, Any]:
    return {
        **{name: value for name, value in dataclasses.asdict(entry).items() if name != "seconds"},
        "tile": _short(entry.tile),
        "shipped": _short(found.shipped),
        "seconds": {_short(tile): seconds for tile, seconds in found.seconds.items()},
        "skipped": {_short(tile): why for tile, why in found.skipped.items()},
    }


def _line(entry: MeasuredTile, found: TileTrial) -> str:
    gain = found.seconds[found.shipped] / entry.seconds
    lines = [
        f"{entry.kernel} m {entry.m}, k {entry.k}, n {entry.n}, block {entry.block_r}: "
        f"{_short(entry.tile)}, {entry.seconds * 1e6:.1f} us; shipped {_short(found.shipped)}, "
        f"{gain:.2f} times as long"
    ]
    lines += [f"  {_short(tile)} skipped: {why}" for tile, why in found.skipped.items()]
    return "\n".join(lines)


def _short(tile: Tile) -> str:
    return f"{tile.m}x{tile.n}x{tile.k} {tile.warps} warps {tile.stages} stages"
