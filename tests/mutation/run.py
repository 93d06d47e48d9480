"""Plants each fault of `faults.py` in a copy of the checkout and runs the rungs until one fails.

    python tests/mutation/run.py                 all faults, about half an hour on two cores
    python tests/mutation/run.py --match dropout only those whose name contains "dropout"

Exit status 1 if a fault survives: then a test is missing.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[2]
KERNELS = Path("kernels/lora")
THREADS = ["env", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1"]
PYTEST = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
INTERPRETED = [*THREADS, "TRITON_INTERPRET=1", *PYTEST, "tests/interp"]
RUNGS = {
    1: [[*THREADS, *PYTEST, "tests/kernels/test_spec.py", "tests/kernels/ops/test_score.py"]],
    2: [[*THREADS, *PYTEST, "tests/kernels", "--deselect", "tests/kernels/test_spec.py"]],
    3: [[*INTERPRETED, "-m", "quick"], [*INTERPRETED, "-m", "not quick"]],
    4: [
        [*THREADS, *PYTEST, "tests/kernels/aot"],
        [*THREADS, sys.executable, "-m", "heterolora.kernels.aot", "--arch", "sm_80"],
    ],
}


def copy(folder: Path) -> None:
    """The tracked and the new files, symlinks as symlinks."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)


def caught_by(fault: Fault, parent: Path) -> tuple[str, float]:
    """The first rung that fails on the fault, or "survived"; and the seconds it took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        copy(folder)
        file = folder / KERNELS / fault.file
        text = file.read_text(encoding="utf-8")
        if text.count(fault.old) != 1:
            return f"not planted: the line occurs {text.count(fault.old)} times", 0.0
        file.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        rungs = [*fault.rungs, *(rung for rung in RUNGS if rung not in fault.rungs)]
        for rung, command in [(number, line) for number in rungs for line in RUNGS[number]]:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            if done.returncode < 0:
                return f"rung {rung}: crashed (signal {-done.returncode})", seconds
            if done.returncode == 1:
                failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
                where = failed[0].split(" - ")[0].removeprefix("FAILED ") if failed else "?"
                return f"rung {rung}: {where}", seconds
            if done.returncode != 0:
                raise RuntimeError(f"rung {rung} did not run: {done.stdout}{done.stderr}")
    return "survived", time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", default="", help="only faults whose name contains this")
    parser.add_argument("--rung", type=int, help="only faults meant for this rung first")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    chosen = [
        fault
        for fault in FAULTS
        if args.match in fault.name and args.rung in (None, fault.rungs[0])
    ]
    missed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for fault, (outcome, seconds) in zip(
            chosen, pool.map(lambda f: caught_by(f, Path(folder)), chosen), strict=True
        ):
            missed += not outcome.startswith("rung")
            print(f"{seconds:5.0f} s  {fault.name:55}  {outcome}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
