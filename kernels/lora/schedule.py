"""The tile schedule of expand and dx, simulated in plain Python: who computes what, and how long.

Both are persistent: programs 0 .. P - 1, one a multiprocessor, take every P-th tile. A program's
load is the sum of its tiles, the launch takes as long as the largest load (the makespan). With the
loads equal it would take their mean (the ideal); balance = ideal / makespan.

A tile costs, in clocks of a multiprocessor::

    step = max(FLOPs / tensor cores, bytes loaded / its share of L2, bytes read / shared memory,
               instructions of all warps / 4 schedulers)
    tile = sum over its loops of (latency + steps * step) + rest / 4 + store

with the instructions of a step and of the rest read from the compiled kernel (:mod:`.mixes`). Tiles
overhang the edges and cost as much there. DRAM, clocks that a power limit lowers, and programs that
wait for each other are left out.

For a cost model::

    efficiency(kernel, m, ns, k, widths, chip, *, itemsize=2) -> float in (0, 1]

is by how much these shapes fall short of a long square matmul (`REFERENCE`), with the tile that
:func:`choose` takes: `Device.triton_matmul` times it is the throughput to expect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .chips import Chip
from .gpu.tiles import Tile, alternatives, shipped
from .mixes import Mix, mix_name, shipped_mixes

__all__ = [
    "REFERENCE",
    "Costs",
    "Problem",
    "Schedule",
    "choose",
    "costs",
    "dx_problems",
    "efficiency",
    "expand_problems",
    "owners",
    "plan",
    "simulate",
]

_GROUP_M = 8  # as in the kernels
# m, n and k of the matmul that `Device.triton_matmul` is about.
REFERENCE = (8192, 4096, 4096)
# Seconds until the first operands of a loop are there, assumed: between an L2 hit, some 0.2 us, and
# DRAM under load, 0.8 us.
LATENCY = 0.5e-6
# Bytes a multiprocessor reads from its shared memory in a clock: 32 banks of 4 bytes.
_SHARED = 128
_SCHEDULERS = 4
# Nobody has checked the constants on a GPU: what they say must be more than a few percent.
_CLEARLY = 0.9
# Whose compiled code stands for a GPU's; sm_86 compiles as sm_89 does, with the same tiles.
_ARCHS = {
    (8, 0): "sm_80",
    (8, 6): "sm_89",
    (8, 9): "sm_89",
    (9, 0): "sm_90",
    (10, 0): "sm_100",
    (12, 0): "sm_120",
}


@dataclass(frozen=True)
class Problem:
    """One output matrix [m, columns].

    Attributes:
        columns: its columns.
        sums: length of each sum that a tile of it adds up: k of a site; n of each site for dX.
        widths: columns of S of each run that follows.
    """

    columns: int
    sums: tuple[int, ...]
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class Costs:
    """Of a compiled kernel with one tile, in clocks of a multiprocessor.

    Attributes:
        step, low: a step of k, and of the columns of S.
        loop: until a loop has its first operands.
        rest: what a tile costs besides.
        bound: what a step waits for: "tensor cores", "L2", "shared memory" or "instructions".
    """

    step: float
    low: float
    loop: float
    rest: float
    bound: str


@dataclass(frozen=True)
class Schedule:
    """A launch.

    Attributes:
        loads: clocks of each program, idle multiprocessors included with 0.
        tiles: how many there are.
    """

    loads: tuple[float, ...]
    tiles: int

    @property
    def total(self) -> float:
        return sum(self.loads)

    @property
    def makespan(self) -> float:
        return max(self.loads, default=0.0)

    @property
    def ideal(self) -> float:
        return self.total / len(self.loads)

    @property
    def balance(self) -> float:
        """ideal / makespan; 1 for nothing to do."""
        return self.ideal / self.makespan if self.makespan else 1.0

    @property
    def waves(self) -> float:
        """Tiles for each program; whole if none idles."""
        return self.tiles / len(self.loads)


def expand_problems(ns: Sequence[int], k: int, widths: Sequence[int]) -> tuple[Problem, ...]:
    """Of expand and expand_tma: a problem for each site.

    Args:
        ns: n of each site.
        k: columns of x; 0 where the base layers compute their own part.
        widths: columns of S of each site, 0 included.
    """
    return tuple(
        Problem(n, (k,) if k else (), (width,) if width else ())
        for n, width in zip(ns, widths, strict=True)
    )


def dx_problems(
    ks: Sequence[int], ns: Sequence[int], segments: Sequence[tuple[int, int]]
) -> tuple[Problem, ...]:
    """Of dx: a problem for each source.

    Args:
        ks: columns of each source; the first is x.
        ns: n of each site, whose dY are summed into the gradient of x.
        segments: (source, columns of S) of each run of S.
    """
    return tuple(
        Problem(
            k,
            tuple(ns) if source == 0 else (),
            tuple(width for of, width in segments if of == source),
        )
        for source, k in enumerate(ks)
    )


def owners(
    kernel: str, m: int, problems: Sequence[Problem], tile: Tile
) -> Iterator[tuple[int, int]]:
    """(problem, tiles) for every run of tiles of one problem, in the order they are dealt out.

    expand and dx go down a strip of eight rows of tiles, through the columns of all problems;
    expand_tma finishes a site before it begins the next.
    """
    rows = -(-m // tile.m)
    columns = [-(-problem.columns // tile.n) for problem in problems]
    strips = [rows] if kernel == "expand_tma" else _strips(rows)
    for height in strips:
        for index, wide in enumerate(columns):
            yield index, height * wide


def _strips(rows: int) -> list[int]:
    return [min(_GROUP_M, rows - first) for first in range(0, rows, _GROUP_M)]


def costs(
    kernel: str,
    tile: Tile,
    block_r: int,
    chip: Chip,
    *,
    itemsize: int = 2,
    running: int | None = None,
    mix: Mix | None = None,
) -> Costs:
    """Clocks that the parts of a tile take.

    Args:
        running: programs that run at once and share L2; None for one on every multiprocessor.
        mix: of the compiled kernel; None takes the shipped one, of a block of S's columns near
            `block_r` if need be. Without one only tensor cores and L2 count.
    """
    found = mix or _shipped_mix(kernel, tile, block_r, chip)
    share = chip.l2_share(running)
    flops = chip.flops if itemsize <= 2 else chip.flops32
    warps = tile.warps

    def step(length: int, shared: int, issued: int) -> tuple[float, str]:
        return max(
            (2 * tile.m * tile.n * length / flops, "tensor cores"),
            ((tile.m + tile.n) * length * itemsize / share, "L2"),
            (shared * warps / _SHARED, "shared memory"),
            (issued * warps / _SCHEDULERS, "instructions"),
        )

    base, bound = (
        step(tile.k, found.base.shared, found.base.issued) if found else step(tile.k, 0, 0)
    )
    low, _ = step(block_r, found.low.shared, found.low.issued) if found else step(block_r, 0, 0)
    store = tile.m * tile.n * itemsize / share
    rest = found.rest * warps / _SCHEDULERS if found else 0.0
    return Costs(base, low, LATENCY * chip.clock, rest + store, bound)


def simulate(
    kernel: str,
    m: int,
    problems: Sequence[Problem],
    tile: Tile,
    block_r: int,
    programs: int,
    clocks: Costs,
) -> Schedule:
    """Deal the tiles out as the kernel does and add up what each program gets.

    Args:
        kernel: "expand", "expand_tma" or "dx"; they differ in the order of tiles.
        programs: that the launch may start.
        clocks: of :func:`costs`.
    """
    each = [
        sum(clocks.loop + -(-length // tile.k) * clocks.step for length in problem.sums if length)
        + sum(clocks.loop + -(-width // block_r) * clocks.low for width in problem.widths if width)
        + clocks.rest
        for problem in problems
    ]
    # Of a run of tiles every program gets as many whole turns; the programs that get one more are
    # neighbours, so that two entries say who they are.
    everyone, change, dealt = 0.0, [0.0] * (programs + 1), 0
    for index, tiles in owners(kernel, m, problems, tile):
        turns, more = divmod(tiles, programs)
        everyone += turns * each[index]
        first = dealt % programs
        last = first + more
        change[first] += each[index]
        change[min(last, programs)] -= each[index]
        if last > programs:
            change[0] += each[index]
            change[last - programs] -= each[index]
        dealt += tiles
    loads, extra = [], 0.0
    for difference in change[:programs]:
        extra += difference
        loads.append(everyone + extra)
    return Schedule(tuple(loads), dealt)


@lru_cache(maxsize=4096)
def choose(
    kernel: str,
    tiles: tuple[Tile, ...],
    block_r: int,
    m: int,
    ns: tuple[int, ...],
    k: int,
    chip: Chip,
    programs: int,
    itemsize: int = 2,
) -> Tile:
    """The tile with the least makespan if it beats the first one by a tenth, else the first.

    Every site counts as having one block of columns of S: the choice must not change with ranks,
    which change while a model is searched.

    Args:
        kernel: "expand", "expand_tma" or "dx".
        tiles: to choose from, the one for large shapes first.
        m, k: of x. n of each site: ns.
    """
    widths = (block_r,) * len(ns)

    def makespan(tile: Tile) -> float:
        return _run(kernel, m, ns, k, widths, tile, block_r, chip, programs, itemsize).makespan

    best = min(tiles, key=makespan)
    return best if makespan(best) < _CLEARLY * makespan(tiles[0]) else tiles[0]


def efficiency(
    kernel: str,
    m: int,
    ns: Sequence[int],
    k: int,
    widths: Sequence[int],
    chip: Chip,
    *,
    itemsize: int = 2,
) -> float:
    """Throughput at these shapes over that of a long square matmul, at most 1.

    Both are FLOPs of the result, without what overhangs, over the makespan; so it holds idle
    programs of the last wave, edges, the latency of short sums, and tiles that are smaller because
    there are few.

    Args:
        kernel: "expand", "expand_tma" or "dx".
        ns: n of each site.
        m, k: of x.
        widths: columns of S of each site.
        chip: of :func:`.chips.chip_for`.
        itemsize: bytes of an element of x.
    """
    rows, n, depth = REFERENCE
    best = _throughput(kernel, rows, (n,), depth, (16,), chip, itemsize)
    found = _throughput(kernel, m, tuple(ns), k, tuple(widths), chip, itemsize)
    return min(1.0, found / best) if found else 1.0


@lru_cache(maxsize=4096)
def _throughput(
    kernel: str,
    m: int,
    ns: tuple[int, ...],
    k: int,
    widths: tuple[int, ...],
    chip: Chip,
    itemsize: int,
) -> float:
    found = plan(kernel, m, ns, k, widths, chip, itemsize=itemsize)
    flops = sum(2 * m * n * (k + width) for n, width in zip(ns, widths, strict=True))
    return flops / found.makespan if found.makespan else 0.0


def plan(
    kernel: str,
    m: int,
    ns: tuple[int, ...],
    k: int,
    widths: tuple[int, ...],
    chip: Chip,
    *,
    itemsize: int = 2,
) -> Schedule:
    """The schedule of a group's launch, with the tile it takes; arguments as :func:`efficiency`."""
    # Siblings' columns are one run of dx, for they read the same source.
    runs = (sum(widths),) if kernel == "dx" else widths
    block_r = next(size for size in (64, 32, 16) if all(width % size == 0 for width in runs))
    tiles = alternatives(chip.capability, itemsize).get(kernel) or (
        shipped(chip.capability, itemsize)[kernel],
    )
    programs = chip.multiprocessors
    tile = choose(kernel, tuple(tiles), block_r, m, ns, k, chip, programs, itemsize)
    return _run(kernel, m, ns, k, widths, tile, block_r, chip, programs, itemsize)


def _run(
    kernel: str,
    m: int,
    ns: tuple[int, ...],
    k: int,
    widths: tuple[int, ...],
    tile: Tile,
    block_r: int,
    chip: Chip,
    programs: int,
    itemsize: int,
) -> Schedule:
    if kernel == "dx":
        problems = dx_problems((k,), ns, [(0, sum(widths))])
    else:
        problems = expand_problems(ns, k, widths)
    running = sum(tiles for _, tiles in owners(kernel, m, problems, tile))
    clocks = costs(
        kernel, tile, block_r, chip, itemsize=itemsize, running=max(1, min(running, programs))
    )
    return simulate(kernel, m, problems, tile, block_r, programs, clocks)


def _shipped_mix(kernel: str, tile: Tile, block_r: int, chip: Chip) -> Mix | None:
    mixes, arch = shipped_mixes(), _ARCHS.get(chip.capability, "sm_120")
    near = sorted((16, 64), key=lambda block: abs(block - block_r))
    names = (mix_name(arch, kernel, tile, block) for block in near)
    return next((mixes[name] for name in names if name in mixes), None)
