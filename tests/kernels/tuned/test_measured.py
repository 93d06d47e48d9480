"""Files of what was measured on a device: written and read back, and refused when malformed."""

import json

import pytest

from heterolora.kernels.gpu.launch import Tile
from heterolora.kernels.tuned import measured
from heterolora.kernels.tuned.measured import (
    GroupShape,
    LowRank,
    MeasuredPath,
    MeasuredTile,
    Tuned,
)

TUNED = Tuned(
    "NVIDIA H100 80GB HBM3",
    (9, 0),
    (
        MeasuredPath(
            GroupShape(64, (32, 48), (16,), (LowRank(8), LowRank(4, 0, 1, True)), 2, 4, bias=True),
            {"peft": 2e-4, "aten": 1e-4},
        ),
    ),
    (MeasuredTile("expand", 2, 16, 1024, 4096, 2048, Tile(128, 64, 64, 8, 3), 1e-5),),
    {"torch": "2.11.0"},
    "0123abcd",
    "2026-11-23",
)


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "deep" / "device.json"
    measured.write(TUNED, path)
    assert measured.read(path) == TUNED
    measured.write(Tuned("a CPU"), path)
    assert measured.read(path) == Tuned("a CPU")


def test_a_file_of_before_with_ceilings_is_read(tmp_path):
    path = tmp_path / "device.json"
    measured.write(TUNED, path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "ceilings": {"flops": 7e14}}))
    assert measured.read(path) == TUNED


def test_every_file_that_is_shipped_is_one_and_has_its_devices_name():
    for path in measured.FOLDER.glob("*.json"):
        if json.loads(path.read_text()).get("kind") == "heterolora.tuned":
            tuned = measured.read(path)
            assert path.stem == measured.slug(tuned.device)
            assert measured.shipped_for(tuned.device) == tuned


def test_a_device_without_a_file_has_nothing():
    assert measured.shipped_for("a device that nobody has") is None


def edited(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(kind="other"), "not a file of the tuner"),
        (lambda c: c.update(schema_version=9), "schema version 9, this heterolora reads 1"),
        (lambda c: c.pop("device"), "'device' is missing"),
        (lambda c: c["paths"][0].pop("sites"), r"paths\[0\]: 'sites' is missing"),
        (lambda c: c["paths"][0].update(m="x"), r"paths\[0\]: 'x' is not a number"),
        (lambda c: c["paths"][0]["branches"].append([4, 7, 0, False]), "no site 7"),
        (lambda c: c["paths"][0]["seconds"].update(cublas=1.0), "unknown path 'cublas'"),
        (lambda c: c["paths"][0]["seconds"].update(aten=0), "0 is no time"),
        (lambda c: c["tiles"][0].update(kernel="fold"), "unknown kernel 'fold'"),
        (lambda c: c["tiles"][0].update(tile=[128, 48, 64, 8, 3]), "powers of two"),
        (lambda c: c["tiles"][0].update(tile=[128]), "missing 2 required"),
        (lambda c: c.update(paths=3), "not iterable"),
    ],
)
def test_malformed_files_are_refused_by_name(tmp_path, change, message):
    path = tmp_path / "device.json"
    measured.write(TUNED, path)
    with pytest.raises(ValueError, match=message) as error:
        measured.read(edited(path, change))
    assert str(path) in str(error.value)


def test_what_is_no_json_is_refused(tmp_path):
    path = tmp_path / "device.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        measured.read(path)
