"""Of every measured case, dispatch takes a path that is within 2 % of the best one measured.

The results are those that are committed, of every device.
"""

import dataclasses
from pathlib import Path

import pytest

from heterolora.bench.cli import RESULTS
from heterolora.bench.gpu import calibrate
from heterolora.bench.report.measures import devices
from heterolora.bench.report.tables import read_folder
from heterolora.kernels.dispatch import decide
from heterolora.kernels.tuned import measured

RUNS = devices(read_folder(RESULTS))
# Speed of the path taken over the speed of the best.
LEAST = 0.98
PATHS = ("peft", "aten", "triton")


def results_of(device):
    return [result for run in RUNS[device] for result in run.results if result.timing]


def share(entry, tuned):
    """Speed of what dispatch takes over that of the best path measured."""
    among = tuple(path for path in PATHS if path in entry.seconds)
    taken = decide(entry.shape, tuned, among).path
    return min(entry.seconds[path] for path in among) / entry.seconds[taken]


def noise(device):
    """How far from 1 the ratio of equal variants comes, over all results of the device."""
    found = [
        abs(result.timing.summary("peft-lowp").ratio - 1)
        for result in results_of(device)
        if result.dtype == "fp32" and "peft-lowp" in result.timing.seconds
    ]
    return max(found)


@pytest.mark.parametrize("device", RUNS)
def test_every_group_takes_the_best_path_measured(device):
    tuned = measured.shipped_for(device)
    entries = calibrate.measured_paths(results_of(device))
    assert len(entries) > 40
    slow = {str(e.shape): share(e, tuned) for e in entries}
    assert {name: found for name, found in slow.items() if found < LEAST} == {}


@pytest.mark.parametrize("device", RUNS)
def test_the_shipped_table_is_that_of_the_results(device):
    """`heterolora bench report --dispatch kernels/lora/tuned` writes it."""
    tables = calibrate.path_tables(RUNS[device], measured.FOLDER)
    for path, tuned in tables.items():
        assert measured.read(path) == tuned


@pytest.mark.parametrize("device", RUNS)
def test_what_a_user_gets_is_not_slower_than_any_path(device):
    """Whole models and layers too: `fused` in the run that measured the others beside it.

    Beyond noise: in float32 PEFT with adapters in the base's dtype computes what PEFT does, so the
    furthest of those ratios from 1 says what a difference between two variants can be for nothing.
    """
    slow, limit = {}, (1 + noise(device)) / LEAST
    for result in results_of(device):
        names = result.timing.seconds.keys() & {*PATHS}
        if result.kind in ("scoring", "train") or "fused" not in result.timing.seconds:
            continue
        for name in names:
            ratio = result.timing.summary("fused", baseline=name).ratio
            if ratio > limit:
                slow[result.case, name] = ratio
    assert slow == {}


@pytest.mark.parametrize("device", RUNS)
def test_a_shape_that_was_not_measured_does_nearly_as_well(device):
    """Each entry in turn is taken out of the table: its neighbours or the rule of rows decide."""
    tuned = measured.shipped_for(device)
    assert tuned is not None
    shares = []
    for entry in tuned.paths:
        others = tuple(other for other in tuned.paths if other.shape != entry.shape)
        shares.append(share(entry, dataclasses.replace(tuned, paths=others)))
    # Nine of ten lose nothing beyond noise, and no shape a quarter of its speed.
    assert sorted(shares)[len(shares) // 10] >= LEAST / (1 + noise(device)), sorted(shares)[:8]
    assert min(shares) > 0.75, sorted(shares)[:8]


def test_the_guard_sees_a_slow_choice():
    device = next(iter(RUNS))
    entry = calibrate.measured_paths(results_of(device))[0]
    worst = {path: 1.0 if path == "peft" else 2.0 for path in entry.seconds}
    wrong = measured.Tuned(device, paths=(dataclasses.replace(entry, seconds=worst),))
    best = {path: 2.0 if path == "peft" else 1.0 for path in entry.seconds}
    assert share(dataclasses.replace(entry, seconds=best), wrong) == 0.5


def test_tables_keep_what_else_a_file_holds(tmp_path: Path):
    device = next(iter(RUNS))
    (path,) = calibrate.path_tables(RUNS[device], tmp_path)
    tile = measured.MeasuredTile("dy", 2, 16, 64, 64, 64, measured.Tile(64, 64, 64), 1.0)
    measured.write(measured.Tuned(device, tiles=(tile,)), path)
    (tuned,) = calibrate.path_tables(RUNS[device], tmp_path).values()
    assert tuned.tiles == (tile,) and tuned.paths
    path.write_text("{")
    with pytest.raises(calibrate.BenchError, match="not valid JSON"):
        calibrate.path_tables(RUNS[device], tmp_path)
