"""Every kernel compiles as it should for GPUs that are not here: the quick form of rung 4."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from heterolora.kernels.aot import budgets as aot_tables
from heterolora.kernels.aot import compile as aot
from heterolora.kernels.aot import read as aot_read
from heterolora.kernels.aot.cases import ALTERNATIVES, BUCKETED, FEATURES
from heterolora.kernels.aot.read import ARCHS, Usage, faults

KERNELS = {"pack", "shrink", "expand", "expand_tma", "dy", "dx", "da", "reduce", "score"}


@pytest.mark.slow
def test_every_kernel_compiles_as_it_should():
    found = dict(aot.check(quick=True))
    assert {name: problem for name, problem in found.items() if problem is not None} == {}
    kernels = {name.split(": ")[1].split()[0] for name in found if ": " in name}
    assert kernels == KERNELS
    assert {name.split()[0] for name in found} == {"sm_80", "sm_90", "sm_120"}
    # Nor has Triton's own driver been replaced in this process.
    from triton.runtime import driver

    assert not isinstance(driver._active, aot._Target)


def test_what_is_too_large_is_found():
    script = Path(__file__).with_name("spilling.py")
    said = subprocess.run(
        [sys.executable, str(script), "sm_80"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    ).stdout.splitlines()
    assert [line.split(" ", 1)[1] for line in said] == [
        "bytes a thread spilled",
        "bytes of shared memory, 166912 are there",
    ]


def code(text, **metadata):
    return SimpleNamespace(asm={"ptx": text}, metadata=SimpleNamespace(**metadata))


WGMMA = "wgmma.mma_async.sync\n"
COPY = "cp.async.cg.shared.global [%r1], [%r2], 0x10\n"
NARROW = "ld.global.b16 %rs1, [%rd1];\n"
FITS = Usage(registers=128, shared=1024, spilled=0)


@pytest.mark.parametrize(
    ("text", "figures", "options", "expected"),
    [
        (WGMMA + COPY, FITS, {}, []),
        (WGMMA + COPY, FITS._replace(spilled=8), {}, ["8 bytes a thread spilled"]),
        (WGMMA + COPY, FITS._replace(shared=1 << 20), {}, ["1048576 bytes of shared memory"]),
        ("mma.sync\n" + COPY, FITS, {}, ["no wgmma"]),
        (WGMMA, FITS, {}, ["no asynchronous copies"]),
        (WGMMA, FITS, {"aligned": False}, []),
        (WGMMA + COPY + 5 * NARROW, FITS, {}, ["5 loads of single elements"]),
        (WGMMA + COPY, FITS, {"ieee": True, "wide": True}, ["tensor cores are used"]),
    ],
)
def test_faults_are_found(text, figures, options, expected):
    how = {"ieee": False, "wide": False, "aligned": True, **options}
    found = faults("expand", ARCHS["sm_90"], code(text), figures, **how)
    assert len(found) == len(expected)
    assert all(said.startswith(start) for said, start in zip(found, expected, strict=True))


def test_tensor_memory_has_an_end():
    compiled = code("tcgen05.mma\n" + COPY, tmem_size=768)
    how = {"ieee": False, "wide": False, "aligned": True}
    found = faults("expand", ARCHS["sm_100"], compiled, FITS, **how)
    assert found == ["768 columns of tensor memory, 512 are there"]


def test_worse_than_the_table_fails():
    assert aot_tables.worse(Usage(128, 1024, 0), (128, 1024)) is None
    assert aot_tables.worse(Usage(96, 512, 0), (128, 1024)) is None
    assert "registers" in aot_tables.worse(Usage(137, 1024, 0), (128, 1024))
    assert "shared" in aot_tables.worse(Usage(128, 1040, 0), (128, 1024))
    assert "--write-table" in aot_tables.worse(Usage(128, 1024, 0), None)


def test_another_triton_is_not_compared_with(monkeypatch):
    assert aot_tables.read_table() is not None
    monkeypatch.setattr("triton.__version__", "9.9.0")
    assert aot_tables.read_table() is None


def test_the_table_covers_the_matrix():
    table = json.loads(aot_tables.RESOURCES.read_text())["kernels"]
    assert list(table) == sorted(table)
    for arch in ARCHS:
        found = {name.split(": ")[1].split()[0] for name in table if name.startswith(f"{arch} ")}
        assert found >= KERNELS - {"expand_tma"}, arch
    cases = {name.split(": ")[0] for name in table}
    for case in (*BUCKETED[:4], *FEATURES, *ALTERNATIVES):
        assert f"sm_90 bfloat16 {case.name}" in cases


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="unknown architecture 'sm_75'; known are sm_80"):
        next(aot.compile_all(["sm_75"]))


def test_no_two_cases_share_a_name():
    names = [case.name for case in (*BUCKETED, *FEATURES, *ALTERNATIVES)]
    assert len(names) == len(set(names))


def test_figures_that_are_missing_are_an_error():
    with pytest.raises(ValueError, match="STACK"):
        aot_read._field("REG:5", "STACK:")
