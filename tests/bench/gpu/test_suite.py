"""`heterolora bench gpu`: order, budget, resuming and stopping; all of it rehearsed on a CPU."""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from bench_runs import environment, red, result

from heterolora.bench import __main__ as main
from heterolora.bench import cli
from heterolora.bench.cases import peers
from heterolora.bench.cases.registry import CASES
from heterolora.bench.gpu import plan, suite
from heterolora.bench.harness import record
from heterolora.bench.harness.ceilings import Ceilings
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.measures import read_folder
from heterolora.bench.report.targets import TARGETS
from heterolora.kernels.tuned import measured
from heterolora.verify import cases as checks

CPU = torch.device("cpu")
NAMES = ("op-768x768-m256-r16-bf16", "op-1024x1024-m256-r16-bf16", "op-2048x2048-m256-r16-bf16")
JOBS = [plan.Job(CASES[name]) for name in NAMES]
SECONDS = {name: [0.002, 0.002] for name in peers.VARIANTS}


@pytest.fixture
def place(tmp_path):
    return suite.Place(tmp_path, CPU, environment())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def measuring(clock: Clock | None = None, seconds: float = 1.0, ran: list | None = None):
    def measure(case, *, device, rounds, compiled):
        if ran is not None:
            ran.append(case.name)
        if clock is not None:
            clock.now += seconds
        times = {v: SECONDS[v] for v in case.variants if compiled or v not in peers.COMPILED}
        return result(case.name, case.kind, times, dtype=case.dtype)

    return measure


def run_jobs(place, jobs=JOBS, seconds=1e6, **options):
    said = []
    options.setdefault("measure", measuring())
    clock = options.get("clock", Clock())
    problems = suite.run_jobs(
        jobs, place, plan.Clock(seconds, clock), rounds=2, say=said.append, **options
    )
    return problems, "\n".join(said)


def test_what_the_targets_need_comes_first_and_what_compiles_last_among_it():
    jobs = plan.plan()
    names = [job.case.name for job in jobs]
    needed = {name for target in TARGETS for name in target.cases}
    assert needed <= CASES.keys() and set(names[: len(needed) + 1]) == needed
    assert names[0] == "op-4096x4096-m8192-r16-bf16"
    step = "llama-1b-8x1024-bf16-uniform"
    # Once compiled and, where that does not fit, once without.
    assert [job.compiled for job in jobs[len(needed) - 1 : len(needed) + 1]] == [True, False]
    assert names[len(needed) - 1 : len(needed) + 1] == [step, step]
    assert not any(job.compiled for job in jobs[len(needed) :])
    rest = names[len(needed) + 1 :]
    assert sorted(rest) == sorted(
        c.name for c in CASES.values() if not c.quick and c.name not in needed
    )
    dtypes = [CASES[name].dtype for name in rest]
    assert dtypes == sorted(dtypes)


def test_the_tuner_times_what_dispatch_chooses_from():
    jobs = plan.paths_plan()
    assert {job.case.kind for job in jobs} == {"op", "group"}
    assert all(job.variants == {"peft", "base-only", "aten", "triton"} for job in jobs)
    names = [job.case.name for job in jobs]
    assert len(set(names)) == len(names) and names[0] == "op-4096x4096-m8192-r16-bf16"
    assert not any(
        part in name for name in names for part in ("mixed", "sparse", "dropout", "short")
    )


def test_without_triton_nothing_is_left_that_runs_it():
    left = plan.without_triton(plan.Job(CASES[NAMES[0]], compiled=True)).variants
    assert {"peft", "base-only", "aten"} <= left
    assert not left & {"fused", "triton", "compile-fused", "graph-fused"}


def test_each_result_is_written_before_the_next_case_begins(place):
    written = []

    def after():
        written.append(sorted(path.stem for path in place.out.rglob("*.json")))

    problems, said = run_jobs(place, after=after)
    assert problems == 0
    assert written == [sorted(NAMES[: i + 1]) for i in range(3)]
    assert f"{NAMES[0]}: peft 2.000 ms (1.00)" in said
    assert place.result(NAMES[0]).parent.name == record.slug(environment()["device"])


def test_a_stopped_run_keeps_what_it_has_and_the_next_goes_on(place):
    ran = []
    measure = measuring(ran=ran)

    def stopped(case, **options):
        if case.name == NAMES[1]:
            raise KeyboardInterrupt
        return measure(case, **options)

    with pytest.raises(KeyboardInterrupt):
        run_jobs(place, measure=stopped)
    assert [path.stem for path in place.out.rglob("*.json")] == [NAMES[0]]
    problems, said = run_jobs(place, measure=measure)
    assert ran == list(NAMES) and problems == 0 and f"measured before: {NAMES[0]}" in said


def test_what_is_not_expected_to_fit_is_left_out(place):
    clock, ran = Clock(), []
    # A guess of 0.2 * 8 s, then what cases took: 40 s each.
    options = {"measure": measuring(clock, 40.0, ran), "clock": clock}
    problems, said = run_jobs(place, seconds=60, **options)
    assert ran == [NAMES[0]] and problems == 0
    assert f"left out, no time: 2 cases, {NAMES[1]} first" in said
    run_jobs(place, seconds=121, **options)
    assert ran == list(NAMES)


def test_a_case_that_cannot_run_does_not_end_the_run(place):
    def measure(case, **options):
        if case.name == NAMES[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        if case.name == NAMES[1]:
            return red(case.name)
        return measuring()(case, **options)

    problems, said = run_jobs(place, measure=measure)
    # A small card is no fault; a red gate is.
    assert problems == 1
    assert f"{NAMES[0]}: could not run: OutOfMemoryError: CUDA out of memory." in said
    assert f"{NAMES[1]}: RED, not timed." in said
    assert not place.result(NAMES[0]).exists() and place.result(NAMES[2]).exists()
    # Red at this commit stays red: it is not measured again, and still a problem.
    problems, _ = run_jobs(place, jobs=[JOBS[1]])
    assert problems == 1


def test_an_error_nobody_expects_is_a_problem(place):
    def measure(case, **options):
        raise RuntimeError("an illegal memory access was encountered")

    problems, said = run_jobs(place, measure=measure)
    assert problems == 3 and said.count("could not run: RuntimeError: an illegal") == 3


def test_whole_runs_get_fewer_rounds(place):
    asked = {}

    def measure(case, *, rounds, **options):
        asked[case.kind] = rounds
        return red(case.name)

    whole = dataclasses.replace(CASES[NAMES[1]], kind="train")
    jobs = [JOBS[0], plan.Job(whole)]
    suite.run_jobs(jobs, place, plan.Clock(1e6), rounds=10, say=print, measure=measure)
    assert asked == {"op": 10, "train": 3}


@pytest.mark.parametrize("change", ["device", "commit", "schema", "variants", "damaged"])
def test_only_what_holds_here_counts_as_measured(place, change):
    run_jobs(place, jobs=JOBS[:1])
    path = place.result(NAMES[0])
    assert suite.known_result(path, JOBS[0], place.environment).case == NAMES[0]
    content = json.loads(path.read_text())
    if change in ("device", "commit"):
        content["environment"][change] = "another"
    elif change == "schema":
        content["schema_version"] += 1
    elif change == "variants":
        for samples in ("seconds", "wall_seconds"):
            del content["results"][0]["timing"][samples]["aten"]
    path.write_text(json.dumps(content) if change != "damaged" else "{")
    assert suite.known_result(path, JOBS[0], place.environment) is None
    ran = []
    run_jobs(place, jobs=JOBS[:1], measure=measuring(ran=ran))
    assert ran == [NAMES[0]]


def test_a_result_without_the_compiled_variants_is_measured_again_for_them(place):
    run_jobs(place, jobs=JOBS[:1])
    path = place.result(NAMES[0])
    compiled = dataclasses.replace(JOBS[0], compiled=True)
    assert suite.known_result(path, compiled, place.environment) is None
    run_jobs(place, jobs=[compiled])
    for job in (compiled, JOBS[0]):
        assert suite.known_result(path, job, place.environment) is not None


def parity(monkeypatch, place, *cases, seconds: float = 1e6) -> tuple[bool, dict, list[str]]:
    asked, said = [], []

    def parity_cases(implementation, device, dtypes, *, quick):
        for case in cases:
            asked.append((implementation, device, dtypes, quick))
            yield case

    monkeypatch.setattr(checks, "parity_cases", parity_cases)
    green = suite.check_parity(place, plan.Clock(seconds, Clock()), said.append)
    content = json.loads((place.out / "parity.json").read_text())
    assert set(asked) <= {("aten", "cpu", ("bfloat16",), True)}
    return green, content, said


GOOD, BAD = checks.Verdict("op a bfloat16"), checks.Verdict("op b bfloat16", "y is off by 3")


def test_a_parity_failure_is_written_and_nothing_of_triton_is_timed(monkeypatch, place):
    green, content, said = parity(monkeypatch, place, GOOD, BAD, GOOD)
    assert not green and "parity: op b bfloat16: y is off by 3" in said
    assert content["checked"] == 3 and content["failed"] == {BAD.name: BAD.problem}
    timed = []

    def jobs(planned, *args, **options):
        timed.extend(planned)
        return 0

    monkeypatch.setattr(suite, "run_jobs", jobs)
    assert suite._phases(place, plan.Clock(60), False, 1, said.append) == 1
    assert timed and not any("fused" in job.variants for job in timed)
    assert not place.tuned.exists()
    timed.clear()
    # The tuner would time nothing else.
    assert suite._phases(place, plan.Clock(60), True, 1, said.append) == 1 and not timed


def test_green_parity_is_not_checked_twice_but_a_cut_one_is(monkeypatch, place):
    green, content, _ = parity(monkeypatch, place, GOOD, GOOD, seconds=0)
    assert green and (content["checked"], content["complete"]) == (1, False)
    green, content, _ = parity(monkeypatch, place, GOOD, GOOD)
    assert green and (content["checked"], content["complete"]) == (2, True)
    # BAD is never asked.
    green, _, said = parity(monkeypatch, place, BAD)
    assert green and said == ["parity: 2 checks were green before"]
    place.environment["commit"] = "another"
    green, _, _ = parity(monkeypatch, place, BAD)
    assert not green


def test_ceilings_of_a_gpu_go_into_every_result(monkeypatch, tmp_path):
    found = {"1x1-m1-r16": (1.0e-3, 1.02e-3)}
    measured = Ceilings(flops=5e14, flops32=3e13, bandwidth=2e12, host=4e-6)
    monkeypatch.setattr(suite, "measure_ceilings", lambda *args, scale: measured)
    monkeypatch.setattr(suite.calibrate, "launch_gap", lambda device: 1.5e-6)
    monkeypatch.setattr(suite.calibrate, "triton_matmul", lambda device: (0.97, found))
    place, said = suite.Place(tmp_path, torch.device("cuda"), environment()), []
    suite._enter_ceilings(place, said.append, triton=True)
    entered = place.environment["ceilings"]
    found_ones = (entered["gap"], entered["triton_matmul"], entered["bandwidth"], entered["host"])
    assert found_ones == (1.5e-6, 0.97, 2e12, 4e-6)
    assert entered["flops"] == {"fp32": 3e13, "bf16": 5e14} and entered["expand"] == found
    assert any("1x1-m1-r16: 1.020" in line for line in said)
    # With red parity nothing of Triton is timed, so that nothing of it is said to be measured.
    monkeypatch.setattr(suite.calibrate, "triton_matmul", None)
    suite._enter_ceilings(place, said.append, triton=False)
    assert not {"expand", "triton_matmul"} & place.environment["ceilings"].keys()


def test_sigterm_ends_it_as_ctrl_c_does_and_the_summary_still_comes(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    def phases(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(suite, "_phases", phases)
    said = []
    assert suite.run(tmp_path, CPU, minutes=1, say=said.append, argv=[]) == 130
    assert any("what was measured is kept" in line for line in said)
    assert "| target |" in said[-1]
    assert signal.getsignal(signal.SIGTERM) is before


# What a bare machine lacks; rich and pytest are on this one.
SCRIPT = """
import sys
for name in ("rich", "datasets", "pytest", "matplotlib", "hypothesis"):
    sys.modules[name] = None
import torch
torch.set_num_threads(1)
from heterolora.bench.__main__ import main
for _ in range(2):
    sys.argv = ["heterolora.bench", "gpu", "--device", "cpu", "--minutes", "3", "--rounds", "2",
                "--out", sys.argv[-1]]
    print("exit", main())
"""


@pytest.mark.slow
def test_a_rehearsal_needs_nothing_but_torch_transformers_and_peft(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text = done.stdout
    assert text.count("REHEARSAL") == 2 and text.count("exit 0") == 2, text
    assert "parity of aten: 32 of 32 checks green" in text
    first, second = text.split("exit 0")[:2]
    tables = [part[part.index("| target |") :] for part in (first, second)]
    assert all(len(table.splitlines()) == len(TARGETS) + 2 for table in tables)
    # A CPU's numbers are no GPU's.
    assert all(table.count("not measured yet") == len(TARGETS) for table in tables)
    measured_cases = {job.case.name for job in plan.plan(rehearsal=True)}
    assert second.count("measured before") == len(measured_cases)
    found = read_folder(tmp_path / "results")
    assert {r.case for run in found for r in run.results} == measured_cases
    assert all(r.timing is not None for run in found for r in run.results)
    (file,) = (tmp_path / "tuned").glob("*.json")
    tuned = measured.read(file)
    assert tuned.capability is None and not tuned.tiles
    # Of the linear; a rehearsed group's sizes are not in the registry.
    (path,) = tuned.paths
    assert path.shape.m == 16 and {"peft", "base"} <= set(path.seconds)


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("gpu",), "--out DIR"),
        (("gpu", "--out", "x", "--device", "cpu", "--minutes", "0"), "must be above 0"),
    ],
)
def test_requests_that_make_no_sense(argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchError, match=message):
        cli.run(parse(*argv))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_one_clear_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "gpu", "--out", str(tmp_path / "out")])
    assert main.main() == 2
    assert "no CUDA device here; --device cpu rehearses" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
