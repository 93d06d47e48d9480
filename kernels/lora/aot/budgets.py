"""What `aot` compares with: `tuned/resources.json` and `tuned/mix.json`, made by one Triton."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .. import mixes
from ..mixes import Mix
from .read import Usage

__all__ = ["RESOURCES", "Recorded", "different", "read_table", "worse", "write_table"]

RESOURCES = Path(__file__).parents[1] / "tuned" / "resources.json"

# A patch release of Triton, or of the assembler inside, may use a few more registers and
# instructions.
_REGISTERS = 8
_INSTRUCTIONS = 0.1
_HOW = "python -m heterolora.kernels.aot --write-table"


class Recorded(NamedTuple):
    """Attributes:
    usages: registers and shared memory by `aot.Compiled.name`.
    mixes: by `mixes.mix_name`.
    """

    usages: Mapping[str, Sequence[int]]
    mixes: Mapping[str, Mix]


def read_table() -> Recorded | None:
    """The files, or None if they were made with another Triton, whose code differs."""
    table = json.loads(RESOURCES.read_text())
    if table["triton"] != _family():
        return None
    family, recorded = mixes.read()
    return Recorded(table["kernels"], recorded if family == _family() else {})


def write_table(usages: Mapping[str, Usage], found: Mapping[str, Mix]) -> None:
    """Write both files, one kernel a line."""
    # Registers and shared memory; spills are not for the table to excuse.
    lines = [f"    {json.dumps(name)}: {json.dumps(usages[name][:2])}" for name in sorted(usages)]
    head = f'{{\n  "triton": {json.dumps(_family())},\n  "columns": ["registers", "shared"],\n'
    RESOURCES.write_text(head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")
    mixes.write(_family(), found)


def worse(found: Usage, before: Sequence[int] | None) -> str | None:
    """How a kernel needs more than is recorded, or None."""
    if before is None:
        return f"not in {RESOURCES.name}: {_HOW} adds it"
    registers, shared = before
    if found.registers > registers + _REGISTERS:
        return f"{found.registers} registers, {registers} in {RESOURCES.name}"
    if found.shared > shared:
        return f"{found.shared} bytes of shared memory, {shared} in {RESOURCES.name}"
    return None


def different(found: Mix, before: Mix | None) -> str | None:
    """How a kernel's loops differ from what is recorded, or None."""
    if before is None:
        return f"not in {mixes.FILE.name}: {_HOW} adds it"
    new, old = ([*mix.base, *mix.low, mix.rest] for mix in (found, before))
    if any(abs(a - b) > _INSTRUCTIONS * b for a, b in zip(new, old, strict=True)):
        return f"{found[:3]}, {before[:3]} in {mixes.FILE.name}: {_HOW} brings it up to date"
    return None


def _family() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])
