"""The JSON form of an allocation: schema version 2. Version 1 knew no shortcuts and no variants.

Files of version 2 may carry `step_time` and `step_time_error`, of budgets of time, which are gone.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heterolora.checked import Fields
from heterolora.errors import AllocationFileError, SearchSpaceError
from heterolora.search.sites import Site
from heterolora.search.space import MAX_RANK
from heterolora.search.variant import Variant
from heterolora.shortcuts.attachments import ShortcutCandidate
from heterolora.shortcuts.model import KINDS
from heterolora.shortcuts.structure import LayerParts

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["SCHEMA_VERSION", "read", "write"]

SCHEMA_VERSION = 2

_PLAIN_KEYS = (
    "budget_parameters",
    "lookalikes",
    "modules_to_save",
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
    "task_type",
)
_SINCE_VERSION_2: dict[str, Any] = {
    "mapping": None,
    "shortcut_candidates": {},
    "shortcut_scaling": 2.0,
}
_GONE = ("step_time", "step_time_error")

logger = logging.getLogger("heterolora")


def write(allocation: Any, path: Path) -> None:
    """Write an `Allocation`, keys sorted, non-finite numbers refused.

    Raises:
        AllocationFileError: the file cannot be written, or a number is not finite.
    """
    document: dict[str, Any] = {key: getattr(allocation, key) for key in _PLAIN_KEYS}
    document["schema_version"] = SCHEMA_VERSION
    document["sites"] = {
        name: {key: value for key, value in asdict(site).items() if key != "name"}
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


def read(path: Path) -> dict[str, Any]:
    """The fields of an `Allocation`, every one checked, and `parameters` as the file states it.

    Raises:
        AllocationFileError: the message names the file and the key at fault.
    """
    file = Fields.load(path, AllocationFileError)
    if file.version(SCHEMA_VERSION) == 1:
        file.values |= {**_SINCE_VERSION_2, "variant": asdict(Variant())}
    file.keys(*_PLAIN_KEYS, *_SINCE_VERSION_2, "schema_version", "sites", "variant", optional=_GONE)
    if file.value("step_time", None) is not None:
        logger.warning(
            "%s: step_time is ignored: budgets of time were removed, as they cost more accuracy "
            "than fewer steps do; the ranks are read as they are",
            path,
        )
    if file.value("mapping") == []:
        file.fail("mapping", "must be null or a list of layers")
    sites = file.each("sites", _site)
    shortcuts = file.each("shortcut_candidates", _shortcut)
    # JSON sorts the keys; model order cannot be recovered and nothing depends on it.
    ranks = _per_name(file, "ranks", sites, Fields.integer, high=MAX_RANK)
    if not any(ranks.values()):
        file.fail("ranks", "are all 0, so there is no adapter")
    return {
        "ranks": ranks,
        "sites": sites,
        "scores": _per_name(file, "scores", [*sites, *shortcuts], Fields.number),
        "shortcuts": _per_name(file, "shortcuts", shortcuts, Fields.integer, high=MAX_RANK),
        "shortcut_candidates": shortcuts,
        "shortcut_scaling": file.number("shortcut_scaling", positive=True),
        "mapping": None if file.value("mapping") is None else file.entries("mapping", _layer),
        "variant": _variant(file),
        "parameters": file.integer("parameters", low=1),
        "budget_parameters": file.integer("budget_parameters", low=1),
        "proxy": file.text("proxy"),
        "seed": file.integer("seed", high=2**32 - 1),
        "scaling": file.number("scaling", positive=True),
        "probe_rank": file.optional("probe_rank", Fields.integer, low=1, high=MAX_RANK),
        "task_type": file.optional("task_type", Fields.choice, known=_task_types()),
        "modules_to_save": tuple(file.entries("modules_to_save", Fields.text)),
        "lookalikes": tuple(file.entries("lookalikes", Fields.text)),
        "seconds": file.number("seconds"),
        "step_seconds": file.optional("step_seconds", Fields.number, positive=True),
    }


def _per_name(file: Fields, key: str, names: Iterable[str], take: Any, **limits: Any) -> Any:
    """{name: value}, in the order of the names, which the file must have no more and no less of."""
    names = list(names)
    values = file.each(key, take, **limits)
    for name in sorted(set(names) ^ values.keys()):
        file.fail(key, f"must name the candidates, and {name!r} is in only one of both")
    return {name: values[name] for name in names}


def _names(kind: type[DataclassInstance]) -> list[str]:
    return [field.name for field in fields(kind)]


def _site(file: Fields, name: str) -> Site:
    entry = file.fields(name)
    entry.keys("conv1d", "in_features", "out_features")
    return Site(
        name,
        entry.integer("in_features", low=1),
        entry.integer("out_features", low=1),
        entry.flag("conv1d"),
    )


def _shortcut(file: Fields, name: str) -> ShortcutCandidate:
    entry = file.fields(name)
    entry.keys("kind", "layer", "projection", "width")
    candidate = ShortcutCandidate(
        entry.text("projection"),
        entry.choice("kind", KINDS),
        entry.integer("layer"),
        entry.integer("width", low=1),
    )
    if candidate.name != name:
        file.fail(name, f"describes {candidate.name!r}")
    return candidate


def _layer(file: Fields, index: str) -> dict[str, str]:
    entry = file.fields(index)
    entry.keys(*_names(LayerParts))
    return {part: entry.text(part) for part in entry}


def _variant(file: Fields) -> Variant:
    entry = file.fields("variant")
    entry.keys(*_names(Variant))
    try:
        return Variant(**entry.values)
    except SearchSpaceError as error:
        file.fail("variant", str(error))


def _task_types() -> list[str]:
    # PEFT takes seconds to import.
    from peft import TaskType

    return [kind.value for kind in TaskType]
