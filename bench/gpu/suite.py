"""`heterolora bench gpu`: parity, ceilings and cases in order of importance, within some minutes.

Every file is written when its case has run, and whole or not at all, so that a run that is cut
keeps what it has; the next one goes on from there. Needs only torch, triton, transformers, peft and
numpy.

What lies in the folder afterwards::

    parity.json                   which checks ran on this device, and what failed
    results/<device>/<case>.json  as of `heterolora bench --out`
    tuned/<device>.json           times by path and (tuner) tiles
    tuned/<device>.tried          (tuner) every tile tried, with its time or why it was skipped
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from heterolora.bench import runner
from heterolora.bench.gpu import calibrate, tuner
from heterolora.bench.gpu.plan import Clock, Job, Pace, paths_plan, plan, without_triton
from heterolora.bench.harness import record
from heterolora.bench.harness.ceilings import measure_ceilings
from heterolora.bench.harness.files import write_whole
from heterolora.bench.harness.interrupt import terminable
from heterolora.bench.harness.record import BenchRun, CaseResult
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.measures import read_folder
from heterolora.bench.report.targets import targets_table
from heterolora.errors import HeteroLoraError
from heterolora.kernels.tuned import measured

__all__ = ["ROUNDS", "Place", "check_parity", "known_result", "run", "run_jobs"]

ROUNDS = 10
# Of all minutes, the most that parity may take: beyond that the cases' own gates have to do.
_PARITY_SHARE = 1 / 3
# Of what is left then, what the tuner gives to tiles; the rest goes to the times by implementation.
_TILE_SHARE = 0.6

_NO_FAULT = (torch.OutOfMemoryError, ImportError, HeteroLoraError)

Say = Callable[[str], None]
Measure = Callable[..., CaseResult]


@dataclass(frozen=True)
class Place:
    """Where a run writes, and what it runs on.

    Attributes:
        out: the folder.
        device: a CUDA device; a CPU rehearses the same on tiny cases.
        environment: of `record.environment`, ceilings included once they are measured.
    """

    out: Path
    device: torch.device
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"

    def result(self, case: str) -> Path:
        return self.out / "results" / self.slug / f"{case}.json"

    @property
    def tuned(self) -> Path:
        return self.out / "tuned" / f"{self.slug}.json"

    @property
    def slug(self) -> str:
        return record.slug(self.environment["device"])


def run(
    out: Path,
    device: torch.device,
    *,
    minutes: float,
    tune: bool = False,
    rounds: int = ROUNDS,
    argv: Sequence[str] | None = None,
    say: Say = print,
) -> int:
    """The suite, or with `tune` the tuner. 0: all went well. 1: a red check, or a variant that
    failed. 130: it was stopped, by Ctrl-C or SIGTERM.

    Args:
        minutes: a case or tile is begun only if it is expected to end before.
        argv: arguments for the record; default those of the process.

    Raises:
        BenchError: minutes or rounds that are not positive, or a folder that cannot be written to.
    """
    if not minutes > 0 or rounds < 1:
        raise BenchError(f"--minutes must be above 0 and --rounds at least 1: {minutes}, {rounds}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"{out}: cannot be written to ({error.strerror})") from error
    clock = Clock(60 * minutes)
    place = Place(out, device, record.environment(device, argv))
    name = place.environment["device"]
    if place.rehearsal:
        say(f"REHEARSAL on {name}: tiny cases; the numbers are this CPU's and say nothing of a GPU")
    else:
        say(f"{name}: {minutes:g} minutes, results go to {out}")
    problems = 0
    stopped = False
    with terminable():
        try:
            problems = _phases(place, clock, tune, rounds, say)
        except KeyboardInterrupt:
            stopped = True
            say("stopped; what was measured is kept, and the next run goes on from there")
    _summary(place, say)
    return 130 if stopped else int(problems > 0)


def _phases(place: Place, clock: Clock, tune: bool, rounds: int, say: Say) -> int:
    green = check_parity(place, clock.share(_PARITY_SHARE), say)
    _enter_ceilings(place, say, triton=green)
    if not green:
        # Half a file of the tuner would pass for a whole one.
        say("no tuned data is written while parity fails")
        if tune:
            return 1
        jobs = [without_triton(job) for job in plan(rehearsal=place.rehearsal)]
        return 1 + run_jobs(jobs, place, clock, rounds=rounds, say=say)
    if tune:
        part = clock.share(_TILE_SHARE)
        tuner.tune_tiles(place.tuned, _tuned(place), place.device, part.left, say)
    jobs = (paths_plan if tune else plan)(rehearsal=place.rehearsal)
    write = partial(_write_tuned, place)
    problems = run_jobs(jobs, place, clock, rounds=rounds, say=say, after=write)
    write()
    say(f"tuned data: {place.tuned}")
    if not place.rehearsal:
        say(f"to use it, copy it to {measured.FOLDER}")
    return problems


def check_parity(place: Place, clock: Clock, say: Say) -> bool:
    """Whether no case of rung 5 of `heterolora verify` (the quick ones, bfloat16) fails here.

    On a CPU, where Triton does not run, `aten` is checked. What did not fit into the time is
    counted in parity.json and checked by the next run. A complete outcome of this device and commit
    is not checked again.
    """
    from heterolora.verify.cases import parity_cases

    path = place.out / "parity.json"
    head = {
        "kind": "heterolora.bench.parity",
        "schema_version": 1,
        **{key: place.environment[key] for key in ("device", "commit", "versions")},
    }
    known = _json(path)
    if known.items() >= {**head, "complete": True, "failed": {}}.items():
        say(f"parity: {known['checked']} checks were green before")
        return True
    implementation = "aten" if place.rehearsal else "triton"
    checked, failed, complete = 0, {}, True
    cases = parity_cases(implementation, str(place.device), ("bfloat16",), quick=True)
    for case in cases:
        checked += 1
        if case.problem is not None:
            failed[case.name] = case.problem
            say(f"parity: {case.name}: {case.problem}")
        # Asked after each: a check that was begun is finished.
        if clock.left() <= 0:
            complete = False
            break
    content = {**head, "checked": checked, "complete": complete, "failed": failed}
    write_whole(path, lambda to: to.write_text(json.dumps(content, indent=1) + "\n", "utf-8"))
    more = "" if complete else ", the rest did not fit into the time"
    say(f"parity of {implementation}: {checked - len(failed)} of {checked} checks green{more}")
    if failed:
        say("no speed of Triton's kernels is measured")
    return not failed


def _json(path: Path) -> dict[str, Any]:
    """What a file of this module holds; nothing where it is absent or was damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _enter_ceilings(place: Place, say: Say, *, triton: bool) -> None:
    """Measure them, into the environment that every result carries."""
    found = measure_ceilings(place.device, scale=1 / 16 if place.rehearsal else 1.0)
    entries: dict[str, Any] = {
        "bandwidth": found.bandwidth,
        "flops": {"fp32": found.flops32, "bf16": found.flops},
        "host": found.host,
    }
    say(
        f"ceilings: {found.flops / 1e12:.4g} TFLOP/s in bf16, {found.flops32 / 1e12:.4g} in fp32, "
        f"{found.bandwidth / 1e9:.4g} GB/s, {found.host * 1e6:.2g} us a launch on the host"
    )
    if not place.rehearsal:
        entries["gap"] = calibrate.launch_gap(place.device)
        say(f"{entries['gap'] * 1e6:.2g} us a launch on the device")
    # Only what was measured: absent where Triton did not run.
    if triton and not place.rehearsal:
        entries["triton_matmul"], entries["expand"] = calibrate.triton_matmul(place.device)
        for name, (library, ours) in entries["expand"].items():
            say(f"expand over the library's matmul, {name}: {ours / library:.3f}")
    place.environment["ceilings"] = entries


def known_result(path: Path, job: Job, environment: dict[str, Any]) -> CaseResult | None:
    """The result of this device and commit that has all that `job` would measure, or None.

    A file of another schema, or none that can be read, is measured anew. Where there is no commit
    (no checkout) all files count as of the same one.
    """
    if not path.is_file():
        return None
    try:
        found = record.read_run(path)
    except BenchError:
        return None
    same = all(found.environment.get(key) == environment[key] for key in ("device", "commit"))
    if not same or [result.case for result in found.results] != [job.case.name]:
        return None
    (result,) = found.results
    if result.timing is None:
        return result
    has = {*result.timing.seconds, *result.skipped, *result.failed}
    return result if job.variants <= has else None


def run_jobs(
    jobs: Sequence[Job],
    place: Place,
    time_left: Clock,
    *,
    rounds: int,
    say: Say,
    measure: Measure = runner.run_case,
    after: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Runs what is not done yet and expected to fit, in order, and writes each result at once.

    Args:
        measure: as `runner.run_case`.
        after: called after each result was written.

    Returns:
        How many cases were red, had a variant that failed, or failed themselves.
    """
    pace, problems, skipped = Pace(0.2 if place.rehearsal else 1.0), 0, []
    for job in jobs:
        path = place.result(job.case.name)
        known = known_result(path, job, place.environment)
        if known is not None:
            say(f"measured before: {_line(known)}")
            problems += _is_problem(known)
            continue
        if pace.expected(job) > time_left.left():
            skipped.append(job.case.name)
            continue
        started = clock()
        try:
            options = {"rounds": job.rounds(rounds), "compiled": job.compiled}
            result = measure(job.case, device=place.device, **options)
        except Exception as error:  # one case must not end the run
            lines = str(error).strip().splitlines() or ["no message"]
            say(f"{job.case.name}: could not run: {type(error).__name__}: {lines[0][:200]}")
            # A card too small for it, or a machine without what it needs, is no fault.
            problems += not isinstance(error, _NO_FAULT)
        else:
            single = BenchRun(place.environment, [result])
            write_whole(path, partial(record.write_run, single))
            problems += _is_problem(result)
            say(f"{_line(result)} ({clock() - started:.0f} s)")
            after()
        pace.ran(job, clock() - started)
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    if skipped:
        say(f"left out, no time: {len(set(skipped))} cases, {skipped[0]} first; run again to go on")
    return problems


def _is_problem(result: CaseResult) -> bool:
    return not result.green or bool(result.failed)


def _line(result: CaseResult) -> str:
    if result.timing is None:
        return f"{result.case}: RED, not timed. {result.parity.reason}"
    parts = [
        f"{name} {summary.milliseconds / result.repeats:.3f} ms ({summary.ratio:.2f})"
        for name in result.timing.seconds
        for summary in [result.timing.summary(name)]
    ]
    failed = [f"{name} FAILED: {why}" for name, why in result.failed.items()]
    return f"{result.case}: {', '.join([*parts, *failed])}"


def _tuned(place: Place) -> measured.Tuned:
    """All that is known here: tiles of an earlier run at this commit, times of all result files."""
    versions = place.environment["versions"]
    capability = None if place.rehearsal else torch.cuda.get_device_capability(place.device)
    fresh = measured.Tuned(
        device=place.environment["device"],
        capability=capability,
        paths=tuple(calibrate.measured_paths(_results(place))),
        versions={name: versions[name] for name in ("torch", "triton") if name in versions},
        commit=place.environment["commit"],
        date=place.environment["date"],
    )
    try:
        before = measured.read(place.tuned)
    except (OSError, ValueError):
        return fresh
    if (before.device, before.commit, before.versions) != (
        fresh.device,
        fresh.commit,
        fresh.versions,
    ):
        return fresh
    return dataclasses.replace(fresh, tiles=before.tiles)


def _write_tuned(place: Place) -> None:
    tuned = _tuned(place)
    write_whole(place.tuned, partial(measured.write, tuned))


def _runs(place: Place) -> list[BenchRun]:
    folder = place.out / "results"
    return read_folder(folder) if any(folder.rglob("*.json")) else []


def _results(place: Place) -> list[CaseResult]:
    """Those of this device and commit."""
    keys = ("device", "commit")
    return [
        result
        for run in _runs(place)
        if all(run.environment.get(key) == place.environment[key] for key in keys)
        for result in run.results
    ]


def _summary(place: Place, say: Say) -> None:
    runs = _runs(place)
    count = sum(len(run.results) for run in runs)
    say(f"\n{count} results in {place.out / 'results'}; targets:\n")
    say(targets_table(runs))
