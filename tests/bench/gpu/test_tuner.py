"""The offline tuner: no tile is timed that is wrong, and the fastest of the others is kept."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bench_runs import result

from heterolora.bench.gpu import calibrate, tuner
from heterolora.bench.harness.files import write_whole
from heterolora.kernels.gpu.launch import KERNELS, Launch, Tile, shipped
from heterolora.kernels.tuned import measured
from heterolora.kernels.tuned.measured import GroupShape, LowRank

SHIPPED, FAST, SLOW = Tile(64, 64, 64), Tile(32, 32, 32), Tile(128, 128, 128)
WRONG, BROKEN, SPILLS, HOLES = (Tile(16, 16, 16, warps=w) for w in (1, 2, 4, 8))
SECONDS = {SHIPPED: 2.0, FAST: 1.0, SLOW: 3.0}


class Watch:
    clock = "made up"

    def __init__(self) -> None:
        self.now = self.begun = 0.0

    def start(self) -> None:
        self.begun = self.now

    def stop(self) -> tuple[float, float]:
        return self.now - self.begun, self.now - self.begun


class Kernel:
    """Launched as kernel[grid](...); gives what the compiler would."""

    def __init__(self, spills: int) -> None:
        self.spills = spills

    def __getitem__(self, grid):
        return lambda *args, **options: SimpleNamespace(n_spills=self.spills)


def one(m: int = 8, k: int = 8, n: int = 8):
    x = torch.ones(m, k, dtype=torch.bfloat16)
    return SimpleNamespace(x=x, m=m, k=k, n=n, rank=16)


def subject(watch: Watch, ran: list[Tile]):
    def run(one, launch: Launch):
        tile = launch.tiles["expand"]
        ran.append(tile)
        if tile == BROKEN:
            raise RuntimeError("out of resource: shared memory\nRequired: 999")
        launch.start(Kernel(12 if tile == SPILLS else 0), (1,))
        watch.now += SECONDS.get(tile, 0.1)
        if tile == HOLES:
            # Without poison this memory could hold what the tile before wrote.
            out = torch.empty_like(one.x)
            out[:4] = 1.0
            return [out]
        return [one.x * (1.02 if tile == WRONG else 1.0)]

    return SimpleNamespace(kernel="expand", run=run, block_r=lambda one: 16)


def launch(**options) -> Launch:
    return Launch(dict.fromkeys(KERNELS, SHIPPED), programs=3, **options)


def test_only_right_tiles_are_timed_and_the_fastest_wins():
    watch, ran = Watch(), []
    sets = [one(), one()]
    candidates = (WRONG, BROKEN, SLOW, SPILLS, HOLES, FAST)
    found = tuner.fastest_tile(subject(watch, ran), sets, launch(), candidates, stopwatch=watch)
    assert (found.shipped, found.best) == (SHIPPED, FAST)
    # Per set of operands.
    assert found.seconds == {SHIPPED: 2.0, SLOW: 3.0, FAST: 1.0}
    reasons = {
        WRONG: "differs",
        BROKEN: "RuntimeError: out of",
        SPILLS: "spills 12",
        HOLES: "by inf",
    }
    assert found.skipped.keys() == reasons.keys()
    for tile, reason in reasons.items():
        assert reason in found.skipped[tile]
    # Once to be compared, never to be timed.
    assert [ran.count(tile) for tile in reasons] == [1, 1, 1, 1]


def test_the_shipped_tile_stays_where_nothing_is_faster():
    watch = Watch()
    found = tuner.fastest_tile(subject(watch, []), [one()], launch(), (SLOW,), stopwatch=watch)
    assert found.best == SHIPPED


def test_alternatives_of_the_launch_are_candidates_too():
    watch = Watch()
    options = launch(alternatives={"expand": (FAST,)})
    found = tuner.fastest_tile(subject(watch, []), [one()], options, (), stopwatch=watch)
    assert found.best == FAST


def test_candidates_stop_with_the_time():
    watch, ran = Watch(), []
    seconds = iter((1.0, 0.0))
    found = tuner.fastest_tile(
        subject(watch, ran),
        [one()],
        launch(),
        (SLOW, FAST),
        stopwatch=watch,
        left=lambda: next(seconds),
    )
    assert found.skipped == {FAST: "no time left"} and SLOW in found.seconds


def test_a_forced_tile_is_taken_whatever_the_circumstances():
    entry = measured.MeasuredTile("expand", 2, 16, 64, 64, 64, SLOW, 1e-6)
    before = Launch(
        {**shipped((9, 0), 2)}, programs=3, measured=(entry,), alternatives={"expand": (SLOW,)}
    )
    forced = tuner.force(before, "expand", FAST)
    for block in (16, 64, 128):
        assert forced.tile("expand", block, odd=True) == FAST
        assert forced.tile("expand", block, m=64, ns=(64,), k=64) == FAST
        for other in set(KERNELS) - {"expand"}:
            assert forced.tile(other, block) == before.tile(other, block)


def test_every_candidate_is_a_tile_and_every_kernel_has_some():
    assert set(tuner.CANDIDATES) == set(KERNELS) - {"score"}
    for tiles in tuner.CANDIDATES.values():
        assert len(set(tiles)) == len(tiles) >= 5
        for tile in tiles:
            assert all(size >= 16 and not size & (size - 1) for size in (tile.m, tile.n, tile.k))


SCRIPT = """
import itertools, pathlib, sys
import torch
from heterolora.bench.cases import groups
from heterolora.bench.gpu import calibrate, tuner
from heterolora.bench.harness.timing import CpuStopwatch
from heterolora.kernels.gpu.launch import Launch
from heterolora.kernels.tiles import KERNELS, Tile
from heterolora.kernels.tuned import measured

torch.set_num_threads(1)
# The interpreter is slow: one set of operands, not as many as exceed a cache.
groups.COLD_BYTES = 1
path, small = pathlib.Path(sys.argv[1]), Tile(32, 32, 32, warps=1, stages=1)
launch = Launch(dict.fromkeys(KERNELS, small), programs=3, tma=True)
candidates = dict.fromkeys(tuner.CANDIDATES, (Tile(16, 16, 16, warps=1, stages=1),))
cpu = torch.device("cpu")

def tune(left):
    known = measured.read(path) if path.exists() else measured.Tuned("A CPU")
    before = len(known.tiles)
    tuner.tune_tiles(
        path, known, cpu, left, print, launch=launch, shapes=[(48, 64, 32, 16)],
        dtypes=[torch.float32], candidates=candidates, stopwatch=CpuStopwatch(),
    )
    return len(measured.read(path).tiles) - before

spent = itertools.count()
print("new", tune(lambda: 3 - next(spent)))
print("new", tune(lambda: 1.0))
print("new", tune(lambda: 1.0))
share, found = calibrate.triton_matmul(
    cpu, [(16, 32, 32)], dtype=torch.float32, launch=launch, stopwatch=CpuStopwatch()
)
library, ours = found["32x32-m16-r16"]
assert abs(share - 48 / 32 * library / ours) < 1e-9 * share, (share, library, ours)
"""


@pytest.mark.slow
def test_kernels_are_tuned_in_the_interpreter_and_a_cut_run_goes_on(tmp_path):
    path = tmp_path / "a-cpu.json"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    new = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("new")]
    # All six kernels, the first of them before the time was up, and none a second time.
    assert sum(new) == 6 and new[0] in range(1, 6) and new[2] == 0, done.stdout
    tiles = measured.read(path).tiles
    assert {entry.kernel for entry in tiles} == set(KERNELS) - {"score"}
    for entry in tiles:
        assert (entry.m, entry.block_r, entry.itemsize) == (48, 16, 4)
        # A pass over x does not depend on n, one over dY not on k.
        n, k = {"shrink": (64, 64), "da": (64, 64), "dy": (32, 32)}.get(entry.kernel, (32, 64))
        assert (entry.n, entry.k) == (n, k), entry
        assert entry.seconds > 0
    log = [json.loads(line) for line in path.with_suffix(".tried").read_text().splitlines()]
    assert [line["kernel"] for line in log] == [entry.kernel for entry in tiles]
    timed = [line for line in log if len(line["seconds"]) == 2]
    # The other tile computes the same, so that it is timed wherever there was time.
    assert len(timed) >= 5, log


def timing(kind: str, case: str, **fields):
    seconds = {"peft": [0.012], "aten": [0.006], "triton": [0.004], "base-only": [0.003]}
    return result(case, kind, {**seconds, "fused": [0.004]}, **fields)


def test_times_of_linears_and_groups_become_entries_of_dispatch():
    shapes = {"m": 8192, "k": 4096, "n": 4096, "sites": 1, "shortcut": 0}
    op = timing(
        "op", "op-4096x4096-m8192-r16-bf16", dtype="bf16", shapes=shapes, repeats=2,
        ranks={"copies.0.proj": 16, "copies.1.proj": 16},
    )  # fmt: skip
    names = ("q_proj", "k_proj", "v_proj")
    gqa = timing(
        "group", "qkv-4096-gqa-m256-r16-fp32", dtype="fp32", repeats=1,
        shapes={"m": 256, "k": 4096, "n": 6144, "sites": 3, "shortcut": 0},
        ranks={f"copies.0.{name}": rank for name, rank in zip(names, (0, 64, 4), strict=True)},
    )  # fmt: skip
    first, second = calibrate.measured_paths([op, gqa])
    assert first.shape == GroupShape(8192, (4096,), (4096,), (LowRank(16),), 2, 4)
    assert first.seconds == pytest.approx(
        {"peft": 0.006, "aten": 0.003, "triton": 0.002, "base": 0.0015}
    )
    branches = (LowRank(0, 0), LowRank(64, 1), LowRank(4, 2))
    assert second.shape == GroupShape(256, (4096,), (4096, 1024, 1024), branches, 4, 4)

    unlike = dataclasses.replace(op, ranks={"copies.0.proj": 16, "copies.1.proj": 4})
    shortcut = dataclasses.replace(op, shapes={**shapes, "shortcut": 1})
    model = timing("model", "llama-1b-8x1024-bf16-uniform")
    assert calibrate.measured_paths([unlike, shortcut, model]) == []


def test_entries_survive_their_file(tmp_path):
    shapes = {"m": 64, "k": 32, "n": 32, "sites": 1, "shortcut": 0}
    op = timing("op", "op-32x32-m64-r16-bf16", dtype="bf16", shapes=shapes,
                ranks={"copies.0.proj": 16})  # fmt: skip
    paths = tuple(calibrate.measured_paths([op]))
    written = measured.Tuned("A GPU", capability=(9, 0), paths=paths)
    write_whole(tmp_path / "a.json", lambda to: measured.write(written, to))
    assert measured.read(tmp_path / "a.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    def broken(to):
        to.write_text("half")
        raise KeyboardInterrupt

    path = tmp_path / "a.json"
    path.write_text("whole")
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, broken)
    assert path.read_text() == "whole" and not list(tmp_path.glob("*.json.json"))
