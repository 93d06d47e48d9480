"""`pytest bench`: the registry under pytest-benchmark, in a process of its own."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from heterolora.bench.cases import peers
from heterolora.bench.cases import registry as cases

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]
GREEN, RED = "tiny-4x16-fp32-uniform", "tiny-4x16-fp32-mixed"
EAGER = [name for name in cases.CASES[GREEN].variants if name not in peers.COMPILED]
ALWAYS = {"peft", "fused", "base-only", "peft-lowp"}

# Fuses nothing where some layer has no adapter, as in the mixed case.
PLUGIN = """
import heterolora
fuse = heterolora.fuse

def fuse_some(model, **options):
    whole = len(model.peft_config["default"].rank_pattern) == 12
    return fuse(model, **options) if whole else heterolora.FuseReport()

heterolora.fuse = fuse_some
"""


def view() -> ModuleType:
    path = ROOT / "bench" / "test_speed" / "test_cases.py"
    spec = importlib.util.spec_from_file_location("bench_view", path)
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up.
    sys.modules["bench_view"] = module
    spec.loader.exec_module(module)
    return module


def parameters(patterns: list[str] | None, compiled: bool) -> list[str]:
    """The ids that `pytest bench` would run."""
    found: list[str] = []

    def parametrize(names, pairs, **_):
        found.extend(pair.id for pair in pairs)

    options = {"--bench-case": patterns, "--bench-compile": compiled}
    config = SimpleNamespace(getoption=options.get)
    view().pytest_generate_tests(SimpleNamespace(config=config, parametrize=parametrize))
    return found


@pytest.mark.slow
def test_a_green_case_is_timed_with_what_it_was_and_a_red_one_fails(tmp_path):
    (tmp_path / "fuses_some.py").write_text(PLUGIN, encoding="utf-8")
    path = tmp_path / "out.json"
    plugins = ["-p", "fuses_some", "-p", "no:cacheprovider"]
    chosen = ["--bench-case", GREEN, "--bench-case", RED, "-k", "uniform or mixed-peft"]
    brief = ["--benchmark-min-rounds=2", "--benchmark-max-time=0.01", f"--benchmark-json={path}"]
    # A worker of pytest-xdist says so in its environment, where pytest-benchmark times nothing.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", "-rs", *plugins, *chosen, *brief],
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = {
        entry["extra_info"]["variant"]: entry
        for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    }
    assert f"{RED} is red, not timed. not fused: 11 of 11 LoRA layers" in done.stdout
    # What does not apply is skipped with its reason, and nothing gets lost.
    counts = f"2 failed, {len(found)} passed, {len(EAGER) - len(found)} skipped"
    assert ALWAYS <= set(found) <= set(EAGER) and counts in done.stdout
    if "aten" not in found:
        assert "on a CPU fused is aten" in done.stdout
    case = cases.CASES[GREEN]
    for variant, entry in found.items():
        assert entry["group"] == GREEN
        assert entry["name"] == f"test_case[{GREEN}-{variant}]"
        assert entry["stats"]["rounds"] >= 2 and entry["stats"]["min"] > 0
        info = entry["extra_info"]
        assert info["shapes"] == dict(case.shapes) and info["dtype"] == "fp32"
        assert info["ranks"] == {
            "allocation": "uniform",
            "layers": 12,
            "zeros": 0,
            "lowest": 8,
            "highest": 8,
            "sum": 96,
        }
        assert info["threads"] == 1 and info["device"] and info["versions"]["torch"]
        assert "commit" in info


def test_the_quick_cases_are_the_default_and_others_are_named():
    quick = [
        f"{case.name}-{variant}"
        for case in cases.select(None, quick=True)
        if case.kind != "train"
        for variant in case.variants
    ]
    assert parameters(["train-*"], True) == []
    assert len(quick) > len(peers.VARIANTS)
    assert parameters(None, True) == quick
    eager = [name for name in quick if not name.endswith(tuple(peers.COMPILED))]
    assert parameters(None, False) == eager != quick
    assert {name.partition("-fp32-")[0] for name in parameters(["linears-*-fp32-*"], False)} == {
        "linears-16x64"
    }


def test_a_pattern_without_a_case_is_a_usage_error():
    with pytest.raises(pytest.UsageError, match="--bench-case: no case matches 'nonesuch'"):
        parameters(["nonesuch"], False)
