"""The JSON form of an allocation: schema version 2. Version 1 knew no shortcuts and no
variants."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from heterolora.errors import AllocationFileError, SearchSpaceError
from heterolora.search.allocation import Allocation
from heterolora.search.sites import Site
from heterolora.search.space import MAX_RANK
from heterolora.search.variant import Variant
from heterolora.shortcuts.attachments import Candidate
from heterolora.shortcuts.model import KINDS
from heterolora.shortcuts.structure import LayerParts

__all__ = ["SCHEMA_VERSION", "read", "write"]

SCHEMA_VERSION = 2

_PLAIN_KEYS = (
    "budget_parameters",
    "modules_to_save",
    "lookalikes",
    "parameters",
    "probe_rank",
    "proxy",
    "ranks",
    "scaling",
    "scores",
    "seconds",
    "seed",
    "shortcuts",
    "step_seconds",
    "step_time",
    "step_time_error",
    "task_type",
)
_SHORTCUT_KEYS = {"mapping", "shortcut_candidates", "shortcut_scaling"}
_KEYS = {*_PLAIN_KEYS, *_SHORTCUT_KEYS, "schema_version", "sites", "variant"}
_VARIANT_KEYS = {field.name for field in fields(Variant)}
_SITE_KEYS = {"conv1d", "in_features", "out_features"}
_CANDIDATE_KEYS = {"kind", "layer", "projection", "width"}
_PART_KEYS = {field.name for field in fields(LayerParts)}


def write(allocation: Allocation, path: Path) -> None:
    """Write `allocation`, keys sorted, non-finite numbers refused.

    Raises:
        AllocationFileError: the file cannot be written, or a number is not finite.
    """
    document: dict[str, Any] = {key: getattr(allocation, key) for key in _PLAIN_KEYS}
    document["schema_version"] = SCHEMA_VERSION
    document["sites"] = {
        name: {
            "conv1d": site.conv1d,
            "in_features": site.in_features,
            "out_features": site.out_features,
        }
        for name, site in allocation.sites.items()
    }
    document["shortcut_candidates"] = {
        name: asdict(candidate) for name, candidate in allocation.shortcut_candidates.items()
    }
    document["variant"] = asdict(allocation.variant)
    document["shortcut_scaling"] = allocation.shortcut_scaling
    mapping = allocation.mapping
    document["mapping"] = None if mapping is None else [dict(layer) for layer in mapping]
    try:
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AllocationFileError(f"cannot write the allocation to {path}: {error}") from error


def read(path: Path) -> Allocation:
    """Read and check every field.

    Raises:
        AllocationFileError: the message names the file and the key at fault.
    """
    return _Reader(path).allocation()


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise AllocationFileError(f"{path}: no such allocation file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise AllocationFileError(f"{path}: cannot be read: {error}") from error
        try:
            self.document = json.loads(text, parse_constant=self._refuse_constant)
        except (ValueError, RecursionError) as error:
            raise AllocationFileError(f"{path}: not valid JSON: {error}") from error
        if not isinstance(self.document, dict):
            self.fail("the file", "is not a JSON object")

    def fail(self, key: str, problem: str) -> NoReturn:
        raise AllocationFileError(f"{self.path}: {key} {problem}")

    def _refuse_constant(self, token: str) -> NoReturn:
        self.fail("the file", f"holds {token}, which is not a finite number")

    def allocation(self) -> Allocation:
        version = self.integer("schema_version", self.value("schema_version"), low=1)
        if version > SCHEMA_VERSION:
            self.fail(
                "schema_version",
                f"is {version}, and this heterolora reads up to {SCHEMA_VERSION}; upgrade it",
            )
        for key in sorted(self.document.keys() - _KEYS):
            self.fail(repr(key), "is not a key of an allocation")
        if version == 1:
            self.document |= {"mapping": None, "shortcut_candidates": {}, "shortcut_scaling": 2.0}
            self.document |= {"step_time": None, "step_time_error": None}
            self.document["variant"] = asdict(Variant())
        sites = {name: self.site(name, entry) for name, entry in self.mapping("sites").items()}
        # JSON sorts the keys; model order cannot be recovered and nothing depends on it.
        ranks = self.per_name("ranks", sites, lambda k, v: self.integer(k, v, 0, MAX_RANK))
        if not any(ranks.values()):
            self.fail("ranks", "are all 0, so there is no adapter")
        probe = self.value("probe_rank")
        given = self.mapping("shortcut_candidates", empty=True)
        candidates = {name: self.candidate(name, entry) for name, entry in given.items()}
        allocation = Allocation(
            scores=self.per_name("scores", {**sites, **candidates}, lambda k, v: self.number(k, v)),
            ranks=ranks,
            sites=sites,
            shortcuts=self.per_name(
                "shortcuts", candidates, lambda k, v: self.integer(k, v, 0, MAX_RANK)
            ),
            shortcut_candidates=candidates,
            shortcut_scaling=self.number(
                "shortcut_scaling", self.value("shortcut_scaling"), positive=True
            ),
            mapping=self.layers(),
            variant=self.variant(),
            budget_parameters=self.integer(
                "budget_parameters", self.value("budget_parameters"), low=1
            ),
            proxy=self.text("proxy", self.value("proxy")),
            seed=self.integer("seed", self.value("seed"), 0, 2**32 - 1),
            scaling=self.number("scaling", self.value("scaling"), positive=True),
            probe_rank=None if probe is None else self.integer("probe_rank", probe, 1, MAX_RANK),
            task_type=self.task_type(),
            modules_to_save=self.names("modules_to_save"),
            lookalikes=self.names("lookalikes"),
            seconds=self.number("seconds", self.value("seconds")),
            step_seconds=self.number_or_none("step_seconds", positive=True),
            step_time=self.number_or_none("step_time", positive=True),
            step_time_error=self.number_or_none("step_time_error"),
        )
        parameters = self.integer("parameters", self.value("parameters"), low=1)
        if parameters != allocation.parameters:
            self.fail(
                "parameters", f"is {parameters}, but the ranks add up to {allocation.parameters}"
            )
        if parameters > allocation.budget_parameters:
            self.fail(
                "parameters",
                f"is {parameters}, above budget_parameters {allocation.budget_parameters}",
            )
        return allocation

    def value(self, key: str) -> Any:
        if key not in self.document:
            self.fail(repr(key), "is missing")
        return self.document[key]

    def mapping(self, key: str, *, empty: bool = False) -> dict[str, Any]:
        value = self.value(key)
        if not isinstance(value, dict):
            self.fail(repr(key), f"must be an object, not {type(value).__name__}")
        if not value and not empty:
            self.fail(repr(key), "is empty")
        return value

    def per_name(
        self, key: str, names: Iterable[str], check: Callable[[str, Any], Any]
    ) -> dict[str, Any]:
        names = list(names)
        values = self.mapping(key, empty=not names)
        for name in sorted(set(names) ^ values.keys()):
            self.fail(f"{key}[{name!r}]", "is in only one of the candidates and this key")
        return {name: check(f"{key}[{name!r}]", values[name]) for name in names}

    def candidate(self, name: str, entry: Any) -> Candidate:
        key = f"shortcut_candidates[{name!r}]"
        if not isinstance(entry, dict) or entry.keys() != _CANDIDATE_KEYS:
            self.fail(key, f"must be an object with the keys {', '.join(sorted(_CANDIDATE_KEYS))}")
        if entry["kind"] not in KINDS:
            self.fail(f"{key}.kind", f"is {entry['kind']!r}, none of {', '.join(KINDS)}")
        candidate = Candidate(
            self.text(f"{key}.projection", entry["projection"]),
            entry["kind"],
            self.integer(f"{key}.layer", entry["layer"]),
            self.integer(f"{key}.width", entry["width"], low=1),
        )
        if candidate.name != name:
            self.fail(key, f"describes {candidate.name!r}")
        return candidate

    def layers(self) -> list[dict[str, str]] | None:
        value = self.value("mapping")
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            self.fail("mapping", "must be null or a list of layers")
        for index, layer in enumerate(value):
            key = f"mapping[{index}]"
            if not isinstance(layer, dict) or layer.keys() != _PART_KEYS:
                self.fail(key, f"must be an object with the keys {', '.join(sorted(_PART_KEYS))}")
            for part, name in layer.items():
                self.text(f"{key}.{part}", name)
        return value

    def variant(self) -> Variant:
        entry = self.mapping("variant")
        if entry.keys() != _VARIANT_KEYS:
            self.fail("variant", f"must have the keys {', '.join(sorted(_VARIANT_KEYS))}")
        try:
            return Variant(**entry)
        except SearchSpaceError as error:
            self.fail("variant", str(error))

    def site(self, name: str, entry: Any) -> Site:
        key = f"sites[{name!r}]"
        if not name or not isinstance(entry, dict) or entry.keys() != _SITE_KEYS:
            self.fail(key, f"must be a named object with the keys {', '.join(sorted(_SITE_KEYS))}")
        if not isinstance(entry["conv1d"], bool):
            self.fail(f"{key}.conv1d", "must be true or false")
        return Site(
            name,
            self.integer(f"{key}.in_features", entry["in_features"], low=1),
            self.integer(f"{key}.out_features", entry["out_features"], low=1),
            entry["conv1d"],
        )

    def integer(self, key: str, value: Any, low: int = 0, high: int | None = None) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(key, f"must be an integer, not {value!r}")
        if value < low or (high is not None and value > high):
            self.fail(key, f"is {value}, outside {low}..{'' if high is None else high}")
        return value

    def number(self, key: str, value: Any, positive: bool = False) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"must be a number, not {value!r}")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            self.fail(key, f"is {value}; it must be finite and {'> 0' if positive else '>= 0'}")
        return float(value)

    def number_or_none(self, key: str, positive: bool = False) -> float | None:
        value = self.value(key)
        return None if value is None else self.number(key, value, positive)

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value:
            self.fail(key, f"must be a non-empty string, not {value!r}")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            self.fail(repr(key), "must be a list of module names")
        return tuple(value)

    def task_type(self) -> str | None:
        from peft import TaskType

        value = self.value("task_type")
        known = [kind.value for kind in TaskType]
        if value is not None and value not in known:
            self.fail("task_type", f"is {value!r}; known: null, {', '.join(known)}")
        return value
