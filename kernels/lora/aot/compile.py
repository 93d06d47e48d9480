"""Compile every kernel for a list of GPU architectures, with no GPU, and check what came out.

The launchers run on tensors without memory, and each launch compiles instead: so the kernels get
the options and the specialised arguments they get on a GPU. It happens in processes of its own,
where a driver that only names its target replaces Triton's.

`python -m heterolora.kernels.aot` checks; `--write-table` records registers and shared memory in
`tuned/resources.json`, which later checks compare with.
"""

import argparse
import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..gpu.launch import Launch
from ..tiles import alternatives, shipped
from .budgets import read_table, worse, write_table
from .cases import ALTERNATIVES, BUCKETED, FEATURES, QUICK, Case, run
from .read import ARCHS, Arch, Usage, faults, usage

__all__ = ["Compiled", "check", "compile_all", "main"]
# float32 is compiled for both precisions of its products.
_TYPES = (
    (torch.bfloat16, "ieee"),
    (torch.float16, "ieee"),
    (torch.float32, "ieee"),
    (torch.float32, "tf32"),
)
# These get every kernel at every block, but not the other cases: Ada and consumer Ampere compile as
# sm_80 does, with the tiles of sm_120, and nothing of AMD's has run yet.
_FEW = ("sm_86", "sm_89", "gfx942")
# Those whose tiles depend on shapes; sm_86 would compile as sm_89 does.
_CHOOSING = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
# The kernels whose tiles do.
_BY_SHAPE = ("expand", "expand_tma", "dx")
_QUICK_ARCHS = ("sm_80", "sm_90", "sm_120")
# The table is of one version of Triton; others may keep this many bytes of a thread on its stack:
# 3.6.0 keeps 8 in every kernel with tensor descriptors for sm_120, whatever the tile.
_STACK = 16


class Compiled(NamedTuple):
    """A kernel that was compiled, or a check of several.

    Attributes:
        name: "arch dtype case: kernel".
        usage: None if it did not compile.
        problem: None if all is well.
    """

    name: str
    usage: Usage | None
    problem: str | None


class _Job(NamedTuple):
    arch: str
    dtype: torch.dtype
    precision: str
    cases: tuple[Case, ...]
    # For each change, two groups that must share every compiled kernel.
    alike: tuple[tuple[str, Case, Case], ...] = ()
    stack: int = 0


def compile_all(archs: Sequence[str] | None = None, *, quick: bool = False) -> Iterator[Compiled]:
    """Compile the matrix and yield each kernel as it is known, in a fixed order.

    A kernel that several cases share is compiled once and named for each of them.

    Args:
        archs: names among `read.ARCHS`; None or empty for all that this Triton can compile for.
        quick: a few cases of bfloat16 for a few architectures.

    Raises:
        ValueError: an architecture that is not known.
        RuntimeError: Triton's interpreter is switched on in this process.
    """
    jobs = _jobs(archs, quick)
    if read_table() is None:
        jobs = [job._replace(stack=_STACK) for job in jobs]
    workers = min(len(os.sched_getaffinity(0)), len(jobs), 8)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_follow_parent) as pool:
        waiting = [(job, pool.submit(_compile, job)) for job in jobs]
        try:
            for job, future in waiting:
                try:
                    yield from future.result()
                except BrokenProcessPool:
                    problem = "the process of this compiler or of one beside it died"
                    yield Compiled(f"{job.arch} {_label(job)}", None, problem)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def check(
    archs: Sequence[str] | None = None, quick: bool = False
) -> Iterator[tuple[str, str | None]]:
    """Compile the matrix and yield (name, problem or None) for every kernel as it is decided.

    Besides what `read.faults` looks for, a kernel must not need more registers or shared memory
    than the table says, if that was made with this Triton (of the same major and minor version).
    Arguments and errors as `compile_all`.
    """
    recorded = read_table()
    for compiled in compile_all(archs, quick=quick):
        problem = compiled.problem
        if problem is None and compiled.usage is not None and recorded is not None:
            problem = worse(compiled.usage, recorded.get(compiled.name))
        yield compiled.name, problem


def _jobs(archs: Sequence[str] | None, quick: bool) -> list[_Job]:
    from ..gpu.pack import pack_kernel

    if not hasattr(pack_kernel, "warmup"):
        raise RuntimeError(
            "Triton's interpreter is on, which compiles nothing; unset TRITON_INTERPRET"
        )
    unknown = [name for name in archs or () if name not in ARCHS]
    if unknown:
        raise ValueError(f"unknown architecture {unknown[0]!r}; known are {', '.join(ARCHS)}")
    installed = _backends()
    names = [name for name in archs or ARCHS if archs or ARCHS[name].backend in installed]
    if quick:
        names = [name for name in names if archs or name in _QUICK_ARCHS]
        return [
            _Job(name, torch.bfloat16, "ieee", BUCKETED[:1])
            if name in _FEW
            else _Job(name, torch.bfloat16, "ieee", QUICK, _alike())
            for name in names
        ]
    jobs = []
    for name, (dtype, precision) in itertools.product(names, _TYPES):
        if precision == "tf32" and ARCHS[name].backend == "hip":
            continue
        if dtype == torch.bfloat16:
            for rank in BUCKETED:
                jobs.append(_Job(name, dtype, precision, (rank,)))
            if name in _CHOOSING:
                jobs.append(_Job(name, dtype, precision, ALTERNATIVES))
            if name not in _FEW:
                jobs.append(_Job(name, dtype, precision, FEATURES, _alike()))
        else:
            # What it does beside its products does not depend on their precision.
            score = (dtype, precision) == (torch.float32, "ieee") and name not in _FEW
            cases = tuple(replace(case, score=score and case.score) for case in BUCKETED)
            jobs.append(_Job(name, dtype, precision, cases))
    return jobs


def _backends() -> set[str]:
    from triton.backends import backends

    return {{"nvidia": "cuda", "amd": "hip"}.get(name, name) for name in backends}


def _alike() -> tuple[tuple[str, Case, Case], ...]:
    """Changes that must compile nothing: they happen while a model is searched or trained."""
    first = next(case for case in FEATURES if case.name == "dropout r16")
    return (
        ("rank inside a bucket", first, replace(first, ranks=(8, 12, 1))),
        ("number of rows", first, replace(first, m=8001)),
        ("scale", first, replace(first, scale=1.0)),
        ("dropout probability", first, replace(first, dropout=0.5)),
    )


def _label(job: _Job) -> str:
    dtype = str(job.dtype).removeprefix("torch.")
    return f"{dtype} {job.precision}" if job.dtype == torch.float32 else dtype


class _Target:
    """A driver that names its target and can do nothing else."""

    def __init__(self, arch: Arch) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(arch.backend, arch.target, arch.warp)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _Compiler:
    """Stands in for `launch.start`: compiles where that launches."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.arch = ARCHS[job.arch]
        self.case = job.cases[0]
        self.kernels: set[Any] = set()
        self.figures: dict[str, Usage] = {}
        self.launched: list[tuple[str, str]] = []
        self.found: list[Compiled] = []

    def run(self, case: Case) -> list[tuple[str, str]]:
        """Run a case; returns (kernel, hash of its code) of each launch."""
        self.case, self.launched = case, []
        about = (self.arch.capability, self.job.dtype.itemsize)
        tiles = dict(shipped(*about, hip=self.arch.backend == "hip"))
        if case.alternative:
            choices = alternatives(*about, hip=self.arch.backend == "hip")
            if not all(case.alternative < len(choice) for choice in choices.values()):
                return []
            tiles.update({kernel: choice[case.alternative] for kernel, choice in choices.items()})
        launch = Launch(
            tiles,
            programs=self.arch.programs,
            precision=self.job.precision,
            index64=case.index64 or None,
            tma=case.tma and _descriptors(self.job),
            start=self.start,
        )
        run(case, self.job.dtype, launch)
        return self.launched

    def start(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        name = kernel.__name__.removesuffix("_kernel")
        if self.case.alternative and name not in _BY_SHAPE:
            return
        if kernel not in self.kernels:
            # Compiled for another target, in this process, they would be taken for this one.
            kernel.device_caches.clear()
            self.kernels.add(kernel)
        try:
            compiled = kernel.warmup(*args, grid=grid, **options)
        except Exception as error:  # Whatever a compiler raises is what this reports.
            self._add(name, None, f"does not compile: {_short(error)}")
            return
        key = compiled.hash
        if key not in self.figures:
            self.figures[key] = usage(compiled)
        if (name, key) not in self.launched:
            wrong = faults(
                name,
                self.arch,
                compiled,
                self.figures[key],
                ieee=self.job.dtype == torch.float32 and self.job.precision == "ieee",
                wide=self.job.dtype.itemsize > 2,
                few=self.case.few,
                aligned=self.case.pipelined,
                stack=self.job.stack,
            )
            self._add(name, self.figures[key], "; ".join(wrong) or None)
        self.launched.append((name, key))

    def _add(self, kernel: str, figures: Usage | None, problem: str | None) -> None:
        first = f"{self.job.arch} {_label(self.job)} {self.case.name}: {kernel}"
        before = {compiled.name for compiled in self.found}
        names = itertools.chain([first], (f"{first} {i}" for i in itertools.count(2)))
        name = next(name for name in names if name not in before)
        self.found.append(Compiled(name, figures, problem))


def _descriptors(job: _Job) -> bool:
    """Whether kernels with tensor descriptors are shipped, as `launch.launch_for` decides."""
    arch = ARCHS[job.arch]
    return arch.backend == "cuda" and arch.capability >= (9, 0) and job.dtype.itemsize == 2


def _short(error: Exception) -> str:
    """The first and the last line: where, and what."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    cause = f" ({error.__cause__})" if error.__cause__ else ""
    return f"{type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}{cause}"


def _follow_parent() -> None:
    """Ends this process when its parent is killed, which the pool's workers do not notice."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _compile(job: _Job) -> list[Compiled]:
    """Run in a child: replaces this process's driver."""
    from triton.runtime import driver

    torch.set_num_threads(1)
    driver.set_active(_Target(ARCHS[job.arch]))
    compiler = _Compiler(job)
    for case in job.cases:
        # Without a backward pass, descriptors are all that such a case is for.
        if not case.tma or case.backward or _descriptors(job):
            compiler.run(case)
    found = list(compiler.found)
    for change, first, second in job.alike:
        known = set(compiler.run(first))
        anew = sorted({name for name, key in compiler.run(second) if (name, key) not in known})
        problem = f"compiled again: {', '.join(anew)}" if anew else None
        found.append(Compiled(f"{job.arch} {_label(job)} no compile per {change}", None, problem))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m heterolora.kernels.aot`; 0 if all is well, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m heterolora.kernels.aot", description=__doc__)
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this one")
    parser.add_argument("--quick", action="store_true", help="a few cases")
    parser.add_argument("--write-table", action="store_true", help="rewrite what it compares with")
    args = parser.parse_args(argv)
    if args.write_table:
        if args.arch or args.quick:
            parser.error("--write-table needs the whole matrix: without --arch and --quick")
        rows = list(compile_all())
        usages = {row.name: row.usage for row in rows if row.usage is not None}
        write_table(usages)
        decided: Iterator[tuple[str, str | None]] = ((row.name, row.problem) for row in rows)
    else:
        decided = check(args.arch, args.quick)
    total = failed = 0
    for name, problem in decided:
        total += 1
        if problem is not None:
            failed += 1
            print(f"FAILED {name}: {problem}", flush=True)
    print(f"{total} kernels and checks, {failed} failed")
    return int(failed > 0)
