"""What was measured on a device: ceilings, the time of each path, tiles. Plain data in `tuned/`.

One JSON file a device, written by the offline tuner and shipped. Nothing here measures anything,
and nothing is shipped for a device that nobody measured.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..cost_steps import LowRank, Problem
from ..devices import Device
from ..gpu.launch import KERNELS, Tile

__all__ = [
    "FOLDER",
    "SCHEMA_VERSION",
    "MeasuredPath",
    "MeasuredTile",
    "Tuned",
    "read",
    "shipped_for",
    "slug",
    "write",
]

FOLDER = Path(__file__).parents[1] / "tuned"
SCHEMA_VERSION = 1
_KIND = "heterolora.tuned"
_PATHS = ("peft", "aten", "triton", "base")
_CEILINGS = ("flops", "flops32", "bandwidth", "gap", "host", "call", "triton_matmul")


@dataclass(frozen=True)
class MeasuredPath:
    """Times of one group.

    Attributes:
        problem: its shapes.
        seconds: of forward and backward together, by path: "peft" (PEFT's own layers), "aten" and
            "triton"; "base" (the frozen layers alone) for comparison.
    """

    problem: Problem
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class MeasuredTile:
    """The fastest tile found for one kernel at one shape.

    Attributes:
        kernel: one of `configs.KERNELS`.
        itemsize: bytes of an element of x.
        block_r: columns of S that it takes at a time.
        m, n, k: rows of x; outputs of all sites together; columns of x.
        tile: block sizes.
        seconds: of one launch.
    """

    kernel: str
    itemsize: int
    block_r: int
    m: int
    n: int
    k: int
    tile: Tile
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """All that was measured on one device.

    Attributes:
        device: the name torch reports.
        capability: compute capability of a GPU, None for a CPU.
        ceilings: measured, or None where only paths were.
        versions: of torch and triton.
        commit, date: of the code, and UTC.
    """

    device: str
    capability: tuple[int, int] | None = None
    ceilings: Device | None = None
    paths: tuple[MeasuredPath, ...] = ()
    tiles: tuple[MeasuredTile, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""


def slug(device: str) -> str:
    """A device name as a file name: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


@lru_cache
def shipped_for(device: str) -> Tuned | None:
    """What is shipped for a device by the name torch reports, or None."""
    path = FOLDER / f"{slug(device)}.json"
    return read(path) if path.is_file() else None


def write(tuned: Tuned, path: Path) -> None:
    """Write a file that `read` takes, one entry a line."""
    ceilings = tuned.ceilings
    head = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "device": tuned.device,
        "capability": tuned.capability,
        "versions": dict(tuned.versions),
        "commit": tuned.commit,
        "date": tuned.date,
        "ceilings": ceilings and {name: getattr(ceilings, name) for name in _CEILINGS},
    }
    paths = [
        {**dataclasses.asdict(entry.problem), "seconds": dict(entry.seconds)}
        for entry in tuned.paths
    ]
    tiles = [
        {**dataclasses.asdict(entry), "tile": list(dataclasses.astuple(entry.tile))}
        for entry in tuned.tiles
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines += [
        f" {json.dumps(key)}: {_rows(rows)}" for key, rows in (("paths", paths), ("tiles", tiles))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _rows(entries: Iterable[Mapping[str, Any]]) -> str:
    rows = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f"[\n{rows}\n ]" if rows else "[]"


def read(path: Path) -> Tuned:
    """Read what `write` wrote.

    Raises:
        ValueError: not such a file, another schema version, or an entry that is missing, of the
            wrong type or out of range; the message names it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ValueError(f"{path}: not a file of the tuner")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{path}: schema version {content.get('schema_version')!r}, this heterolora reads "
            f"{SCHEMA_VERSION}; tune again"
        )
    try:
        return Tuned(
            device=_text(content["device"]),
            capability=_capability(content["capability"]),
            ceilings=_ceilings(content["device"], content["ceilings"]),
            paths=tuple(_entries(content, "paths", _path)),
            tiles=tuple(_entries(content, "tiles", _tile)),
            versions={str(k): _text(v) for k, v in content["versions"].items()},
            commit=content["commit"],
            date=_text(content["date"]),
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _entries(content: Mapping[str, Any], key: str, build: Any) -> Iterable[Any]:
    for index, entry in enumerate(content[key]):
        try:
            yield build(entry)
        except KeyError as error:
            raise ValueError(f"{key}[{index}]: {error.args[0]!r} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{key}[{index}]: {error}") from error


def _path(entry: Mapping[str, Any]) -> MeasuredPath:
    problem = Problem(
        m=_count(entry["m"], "m"),
        sources=tuple(_count(k, "sources") for k in entry["sources"]),
        sites=tuple(_count(n, "sites") for n in entry["sites"]),
        branches=tuple(
            LowRank(_count(r, "rank"), _count(i, "site"), _count(j, "source"), bool(dropped))
            for r, i, j, dropped in entry["branches"]
        ),
        itemsize=_count(entry["itemsize"], "itemsize"),
        factor_itemsize=_count(entry["factor_itemsize"], "factor_itemsize"),
        bias=bool(entry["bias"]),
        input_grad=bool(entry["input_grad"]),
    )
    unknown = sorted(set(entry["seconds"]) - set(_PATHS))
    if unknown:
        raise ValueError(f"unknown path {unknown[0]!r}; known are {', '.join(_PATHS)}")
    return MeasuredPath(problem, {k: _seconds(v) for k, v in entry["seconds"].items()})


def _tile(entry: Mapping[str, Any]) -> MeasuredTile:
    if entry["kernel"] not in KERNELS:
        raise ValueError(f"unknown kernel {entry['kernel']!r}; known are {', '.join(KERNELS)}")
    sizes = [_count(size, "tile") for size in entry["tile"]]
    if len(sizes) != 5 or any(size < 16 or size & (size - 1) for size in sizes[:3]):
        raise ValueError(f"tile {entry['tile']}: needs powers of two from 16 on, warps and stages")
    numbers = {name: _count(entry[name], name) for name in ("itemsize", "block_r", "m", "n", "k")}
    return MeasuredTile(
        entry["kernel"], **numbers, tile=Tile(*sizes), seconds=_seconds(entry["seconds"])
    )


def _ceilings(device: str, found: Mapping[str, Any] | None) -> Device | None:
    return None if found is None else Device.measured(device, **{k: found[k] for k in _CEILINGS})


def _capability(found: Any) -> tuple[int, int] | None:
    if found is None:
        return None
    major, minor = found
    return _count(major, "capability"), _count(minor, "capability")


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise TypeError(f"expected a text, found {found!r}")
    return found


def _count(found: Any, name: str) -> int:
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise ValueError(f"{name} is {found!r}, not a number of things")
    return found


def _seconds(found: Any) -> float:
    if not isinstance(found, (int, float)) or not math.isfinite(found) or found <= 0:
        raise ValueError(f"{found!r} is no time in seconds")
    return float(found)
