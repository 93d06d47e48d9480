"""What was measured on a device: the time of each path, and tiles. Plain data in `tuned/`.

One JSON file a device, written by the offline tuner and shipped. Nothing here measures anything,
and nothing is shipped for a device that nobody measured.
"""

import contextlib
import dataclasses
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..tiles import KERNELS, Tile

__all__ = [
    "FOLDER",
    "SCHEMA_VERSION",
    "GroupShape",
    "LowRank",
    "MeasuredPath",
    "MeasuredTile",
    "Tuned",
    "cpu_name",
    "device_name",
    "read",
    "shipped_for",
    "slug",
    "write",
]

FOLDER = Path(__file__).parent
SCHEMA_VERSION = 1
_KIND = "heterolora.tuned"
_PATHS = ("peft", "aten", "triton", "base")

_T = TypeVar("_T")


class LowRank(NamedTuple):
    """Shape of a branch: its rank, the site it adds to, the source it reads (0 is x), and whether
    its source is dropped out."""

    rank: int
    site: int = 0
    source: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class GroupShape:
    """All that the time of a group's forward and backward pass depends on.

    Attributes:
        m: rows of x.
        sources: columns of each distinct source, x first.
        sites: outputs of each site.
        branches: the low-rank branches.
        itemsize: bytes of an element of x.
        factor_itemsize: bytes of an element of A and B.
        bias: whether the sites have biases.
        input_grad: whether x needs a gradient.

    Raises:
        ValueError: a number that is no size.
    """

    m: int
    sources: tuple[int, ...]
    sites: tuple[int, ...]
    branches: tuple[LowRank, ...] = ()
    itemsize: int = 2
    factor_itemsize: int = 2
    bias: bool = False
    input_grad: bool = True

    def __post_init__(self) -> None:
        ranks = (number for branch in self.branches for number in branch[:3])
        _check_counts(self.m, *self.sources, *self.sites, *ranks)
        _check_counts(self.itemsize, self.factor_itemsize)
        if not self.sources or not self.sites:
            raise ValueError("a group needs a source and a site")
        for branch in self.branches:
            if branch.site >= len(self.sites) or branch.source >= len(self.sources):
                raise ValueError(f"no site {branch.site} or no source {branch.source}")

    @property
    def live(self) -> tuple[LowRank, ...]:
        """The branches of a rank above 0."""
        return tuple(branch for branch in self.branches if branch.rank)


@dataclass(frozen=True)
class MeasuredPath:
    """Times of one group.

    Attributes:
        shape: of the group.
        seconds: of forward and backward together, by path: "peft" (PEFT's own layers), "aten" and
            "triton"; "base" (the frozen layers alone) for comparison.

    Raises:
        ValueError: an unknown path, or what is no time.
    """

    shape: GroupShape
    seconds: Mapping[str, float]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.seconds) - set(_PATHS))
        if unknown:
            raise ValueError(f"unknown path {unknown[0]!r}; known are {', '.join(_PATHS)}")
        _check_seconds(*self.seconds.values())


@dataclass(frozen=True)
class MeasuredTile:
    """The fastest tile found for one kernel at one shape.

    Attributes:
        kernel: one of `tiles.KERNELS`.
        itemsize: bytes of an element of x.
        block_r: columns of S that it takes at a time.
        m, n, k: rows of x; outputs of all sites together; columns of x.
        tile: block sizes.
        seconds: of one launch.

    Raises:
        ValueError: an unknown kernel, or a number that is no size, tile or time.
    """

    kernel: str
    itemsize: int
    block_r: int
    m: int
    n: int
    k: int
    tile: Tile
    seconds: float

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"unknown kernel {self.kernel!r}; known are {', '.join(KERNELS)}")
        _check_counts(self.itemsize, self.block_r, self.m, self.n, self.k)
        tile = dataclasses.astuple(self.tile)
        _check_counts(*tile)
        if any(size < 16 or size & (size - 1) for size in tile[:3]):
            raise ValueError(f"tile {tile}: needs powers of two from 16 on, warps and stages")
        _check_seconds(self.seconds)


@dataclass(frozen=True)
class Tuned:
    """All that was measured on one device.

    Attributes:
        device: the name torch reports.
        capability: compute capability of a GPU, None for a CPU.
        paths, tiles: what was measured.
        versions: of torch and triton.
        commit, date: of the code, and UTC.
    """

    device: str
    capability: tuple[int, int] | None = None
    paths: tuple[MeasuredPath, ...] = ()
    tiles: tuple[MeasuredTile, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""


@lru_cache
def cpu_name() -> str:
    """What the system calls the processor, "AMD EPYC" for one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name by which a device that is here is known: torch's, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


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
    head = {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "device": tuned.device,
        "capability": tuned.capability,
        "versions": dict(tuned.versions),
        "commit": tuned.commit,
        "date": tuned.date,
    }
    paths = [
        {**dataclasses.asdict(entry.shape), "seconds": dict(entry.seconds)} for entry in tuned.paths
    ]
    tiles = [
        {**dataclasses.asdict(entry), "tile": list(dataclasses.astuple(entry.tile))}
        for entry in tuned.tiles
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    lines += [
        f" {json.dumps(key)}: {_one_a_line(entries)}"
        for key, entries in (("paths", paths), ("tiles", tiles))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _one_a_line(entries: Iterable[Mapping[str, Any]]) -> str:
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
    return f"[\n{lines}\n ]" if lines else "[]"


def read(path: Path) -> Tuned:
    """Read what `write` wrote; files of earlier versions hold ceilings too, which nothing needs.

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
        capability = content["capability"]
        return Tuned(
            device=content["device"],
            capability=None if capability is None else (int(capability[0]), int(capability[1])),
            paths=_entries(content, "paths", _path),
            tiles=_entries(content, "tiles", _tile),
            versions=dict(content["versions"]),
            commit=content["commit"],
            date=content["date"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _entries(
    content: Mapping[str, Any], key: str, build: Callable[[Mapping[str, Any]], _T]
) -> tuple[_T, ...]:
    found = []
    for index, entry in enumerate(content[key]):
        try:
            found.append(build(entry))
        except KeyError as error:
            raise ValueError(f"{key}[{index}]: {error.args[0]!r} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key}[{index}]: {error}") from error
    return tuple(found)


def _path(entry: Mapping[str, Any]) -> MeasuredPath:
    values = {f.name: entry[f.name] for f in dataclasses.fields(GroupShape)}
    for key in ("sources", "sites"):
        values[key] = tuple(values[key])
    values["branches"] = tuple(LowRank(*branch) for branch in values["branches"])
    return MeasuredPath(GroupShape(**values), dict(entry["seconds"]))


def _tile(entry: Mapping[str, Any]) -> MeasuredTile:
    values = {f.name: entry[f.name] for f in dataclasses.fields(MeasuredTile)}
    return MeasuredTile(**{**values, "tile": Tile(*values["tile"])})


def _check_counts(*numbers: Any) -> None:
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ValueError(f"{number!r} is not a number of things")


def _check_seconds(*times: Any) -> None:
    for time in times:
        if not isinstance(time, (int, float)) or not math.isfinite(time) or time <= 0:
            raise ValueError(f"{time!r} is no time in seconds")
