"""The budgets that compiled kernels are held to: `tuned/resources.json`, made by one Triton."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from .read import Usage

__all__ = ["RESOURCES", "read_table", "worse", "write_table"]

RESOURCES = Path(__file__).parents[1] / "tuned" / "resources.json"

# A patch release of Triton, or of the assembler inside, may use a few more registers.
_REGISTERS = 8
_HOW = "python -m heterolora.kernels.aot --write-table"


def read_table() -> Mapping[str, Sequence[int]] | None:
    """{name of a compiled kernel: (registers, bytes of shared memory)}, or None if they were made
    with another Triton, whose code differs."""
    table = json.loads(RESOURCES.read_text(encoding="utf-8"))
    found: Mapping[str, Sequence[int]] = table["kernels"]
    return found if table["triton"] == _family() else None


def write_table(usages: Mapping[str, Usage]) -> None:
    """Write the file, one kernel a line."""
    # Registers and shared memory; spills are not for the table to excuse.
    lines = [f"    {json.dumps(name)}: {json.dumps(usages[name][:2])}" for name in sorted(usages)]
    head = f'{{\n  "triton": {json.dumps(_family())},\n  "columns": ["registers", "shared"],\n'
    RESOURCES.write_text(head + '  "kernels": {\n' + ",\n".join(lines) + "\n  }\n}\n")


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


def _family() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])
