"""What one run of the bench writes: results, and the machine and versions they were measured on, as
JSON.
"""

import contextlib
import dataclasses
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints

import torch

from heterolora.bench.harness.memory import MemoryUse
from heterolora.bench.harness.parity import Parity
from heterolora.bench.harness.timing import BenchError, Timing
from heterolora.bench.harness.work import Work
from heterolora.kernels.tuned.measured import cpu_name, slug

__all__ = [
    "SCHEMA_VERSION",
    "BenchRun",
    "CaseResult",
    "Training",
    "environment",
    "read_run",
    "slug",
    "write_run",
]

SCHEMA_VERSION = 2
_KIND = "heterolora.bench"
_PACKAGES = ("torch", "triton", "transformers", "peft", "heterolora")


@dataclass(frozen=True)
class Training:
    """What a train case has beside its timing, whose round i is a run with seed i and whose times
    are those of one step.

    Attributes:
        weights: of the base model.
        steps: optimizer steps of a run.
        untimed: of these, the first ones, without a time.
        rank: of the uniform allocation; the searched one is `CaseResult.ranks`.
        parameters: trained ones, by variant.
        through_op: adapters that the fused op runs in a step, by variant; dispatch can leave layers
            to PEFT's own forward.
        search_seconds: wall time of `heterolora.allocate`.
        losses: by variant, round and step.
    """

    weights: str
    steps: int
    untimed: int
    rank: int
    parameters: dict[str, int]
    through_op: dict[str, int]
    search_seconds: float
    losses: dict[str, list[list[float]]]


@dataclass(frozen=True)
class CaseResult:
    """One case. `timing` is None, and `memory` and `launches` are empty, exactly when the parity
    gate was red.

    Attributes:
        kind: "op", "group", "layer", "model", "scoring" or "train".
        ranks: by module name; of a train case the searched ones.
        tokens: rows that each adapted linear sees.
        layers: transformer layers, or copies of a group, that one step runs.
        repeats: copies of a group that one step runs, 1 for whole models: a time per group is that
            of the step divided by it.
        dropout: of the adapters' input, while timed.
        work: the least that one step's adapted linears have to do, forward and backward.
        memory: bytes, by variant.
        launches: by variant, of one step: kernels on a GPU, operator calls on a CPU.
        skipped: why a variant does not apply here, by variant.
        failed: the error of each variant that should have run.
        training: of a train case that was timed, None of all others.
    """

    case: str
    kind: str
    description: str
    shapes: dict[str, int]
    dtype: str
    ranks: dict[str, int]
    tokens: int
    layers: int
    repeats: int
    dropout: float
    work: Work
    parity: Parity
    timing: Timing | None = None
    memory: dict[str, MemoryUse] = field(default_factory=dict)
    launches: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    training: Training | None = None

    @property
    def green(self) -> bool:
        return self.parity.green


@dataclass(frozen=True)
class BenchRun:
    """Results measured together in one environment (see :func:`environment`)."""

    environment: dict[str, Any]
    results: list[CaseResult]


def environment(device: torch.device, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Versions, machine, threads, commit, date (UTC) and command; no host, user name or path."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:
        del arguments[0]
    for option in ("--out", "--json"):
        arguments = _without(option, arguments)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "versions": versions,
        "device": name,
        "device_type": device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["heterolora", "bench", *arguments]),
    }


def _without(option: str, arguments: list[str]) -> list[str]:
    """`arguments` without the option and its value."""
    kept = [word for word in arguments if not word.startswith(f"{option}=")]
    while option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept


def _commit() -> str | None:
    """Commit of the checkout this file lies in, "+" appended when it has changes, or None."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and (head + "+" if git("status", "--porcelain") else head)


def write_run(run: BenchRun, path: Path) -> None:
    content = {"kind": _KIND, "schema_version": SCHEMA_VERSION, **dataclasses.asdict(run)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_run(path: Path) -> BenchRun:
    """Reads what `write_run` wrote.

    Raises:
        BenchError: unreadable, not JSON, not ours, a newer schema, or a field that is missing or of
            the wrong type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BenchError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise BenchError(f"{path}: not a result of `heterolora bench --json`")
    version = content.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BenchError(
            f"{path}: schema version {version!r}, this heterolora reads {SCHEMA_VERSION}; "
            "measure again or upgrade"
        )
    where = f"{path}: "
    results = _get(content, "results", list, where)
    return BenchRun(
        _get(content, "environment", dict, where),
        [_result(item, f"{where}results[{index}].") for index, item in enumerate(results)],
    )


def _result(item: Any, where: str) -> CaseResult:
    if not isinstance(item, dict):
        raise BenchError(f"{where.rstrip('.')}: expected an object")
    timing = item.get("timing")
    training = item.get("training")
    used = _get(item, "memory", dict, where)
    result = CaseResult(
        case=_get(item, "case", str, where),
        kind=_get(item, "kind", str, where),
        description=_get(item, "description", str, where),
        shapes=_get(item, "shapes", dict, where),
        dtype=_get(item, "dtype", str, where),
        ranks=_get(item, "ranks", dict, where),
        tokens=_get(item, "tokens", int, where),
        layers=_get(item, "layers", int, where),
        repeats=_get(item, "repeats", int, where),
        dropout=float(_get(item, "dropout", (int, float), where)),
        work=_build(Work, _get(item, "work", dict, where), f"{where}work"),
        parity=_build(Parity, _get(item, "parity", dict, where), f"{where}parity"),
        timing=None if timing is None else _timing(timing, f"{where}timing"),
        memory={
            name: _build(MemoryUse, use, f"{where}memory.{name}") for name, use in used.items()
        },
        launches=_get(item, "launches", dict, where),
        skipped=_get(item, "skipped", dict, where),
        failed=_get(item, "failed", dict, where),
        training=None if training is None else _build(Training, training, f"{where}training"),
    )
    if result.green != (result.timing is not None):
        raise BenchError(f"{where}timing: a case has a timing exactly when its parity is green")
    _check_training(result, where)
    return result


def _check_training(result: CaseResult, where: str) -> None:
    if (result.training is not None) != (result.kind == "train" and result.green):
        raise BenchError(f"{where}training: a green train case has it, and no other")
    if result.training is None or result.timing is None:
        return
    names, rounds = result.timing.seconds.keys(), result.timing.rounds
    for key in ("parameters", "through_op", "losses"):
        if getattr(result.training, key).keys() != names:
            raise BenchError(f"{where}training.{key}: expected the variants of the timing")
    for name, runs in result.training.losses.items():
        shaped = isinstance(runs, list) and len(runs) == rounds
        if not shaped or not all(_is_curve(run, result.training.steps) for run in runs):
            raise BenchError(
                f"{where}training.losses.{name}: expected a list of {result.training.steps} losses "
                f"for each of {rounds} rounds"
            )


def _is_curve(run: Any, steps: int) -> bool:
    return isinstance(run, list) and len(run) == steps and all(map(_is_time, run))


def _timing(item: Any, where: str) -> Timing:
    timing = _build(Timing, item, where)
    for kind in ("seconds", "wall_seconds"):
        samples = getattr(timing, kind)
        if not isinstance(samples, dict) or timing.baseline not in samples:
            raise BenchError(f"{where}.{kind}: expected an object with {timing.baseline!r} in it")
        for name, values in samples.items():
            if not isinstance(values, list) or not all(_is_time(value) for value in values):
                raise BenchError(f"{where}.{kind}.{name}: expected a list of seconds")
            if len(values) != len(samples[timing.baseline]) or not values:
                raise BenchError(f"{where}.{kind}.{name}: every variant needs one value a round")
        if min(samples[timing.baseline]) <= 0:
            raise BenchError(f"{where}.{kind}.{timing.baseline}: times must be positive")
    if timing.seconds.keys() != timing.wall_seconds.keys():
        raise BenchError(f"{where}: seconds and wall_seconds name different variants")
    return timing


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _get(item: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    if key not in item:
        raise BenchError(f"{where}{key}: missing")
    value = item[key]
    if not isinstance(value, kind):
        wanted = kind.__name__ if isinstance(kind, type) else "a number"
        raise BenchError(f"{where}{key}: expected {wanted}, found {type(value).__name__}")
    return value


def _build(kind: Any, item: Any, where: str) -> Any:
    if not isinstance(item, dict):
        raise BenchError(f"{where}: expected an object")
    names = {entry.name for entry in dataclasses.fields(kind)}
    if item.keys() != names:
        odd = sorted(item.keys() ^ names)
        raise BenchError(f"{where}: missing or unknown {', '.join(odd)}")
    for name, declared in get_type_hints(kind).items():
        if not isinstance(item[name], _JSON_TYPES[declared]):
            wanted, found = getattr(declared, "__name__", declared), type(item[name]).__name__
            raise BenchError(f"{where}.{name}: expected {wanted}, found {found}")
    return kind(**item)


_JSON_TYPES: dict[Any, tuple[type, ...]] = {
    bool: (bool,),
    int: (int,),
    float: (int, float),
    str: (str,),
    dict[str, int]: (dict,),
    dict[str, list[list[float]]]: (dict,),
    float | None: (int, float, type(None)),
    dict[str, list[float]]: (dict,),
}
