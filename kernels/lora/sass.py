"""Reads the machine code of a compiled matmul: which loops it has and what a turn consists of.

A loop is a natural loop of the control flow graph, found by dominators: code that waits for a
barrier lies behind the end of the kernel and jumps back into the middle, so that the distance of a
jump says nothing.
"""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .aot.read import tool
from .gpu.tiles import Tile
from .mixes import Loop, Mix

__all__ = ["digest", "matmul_loops", "mix", "tensor_flops"]

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z]\w*)((?:\.\w+)*)\s*(.*);")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_TENSOR = re.compile(r"^(?:HMMA|HGMMA|UTCHMMA)$")
_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
# An 8x8 matrix of 16-bit elements, or 4 bytes for each thread of a warp.
_ROW = 128


@dataclass
class _Block:
    """Code without jumps into or out of its middle."""

    code: list[tuple[str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    falls: bool = True


def digest(ptx: str) -> str:
    """Of the code alone: without the places in the source, which change with every comment."""
    code = ptx.split(".section", 1)[0]
    lines = [line for line in code.splitlines() if not re.match(r"\s*(//|\.loc|\.file|$)", line)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def mix(compiled: Any, tile: Tile, block_r: int) -> Mix:
    """Of a compiled expand or dx of one site and one branch.

    Args:
        compiled: a `triton.compiler.CompiledKernel` for an NVIDIA GPU.
        tile, block_r: what it was compiled for.

    Raises:
        ValueError: its code has not the two loops of such a kernel, or they do not do in one turn
            what a step is.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [str(tool("nvdisasm")), "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    loops = matmul_loops(text)
    if len(loops) != 2:
        raise ValueError(f"{len(loops)} loops with tensor core instructions, not 2")
    for loop, length in zip(loops, (tile.k, block_r), strict=True):
        flops, expected = tensor_flops(loop, tile.warps), 2 * tile.m * tile.n * length
        if flops not in (None, expected):
            raise ValueError(f"{flops} FLOPs in one turn of a loop, not {expected}")
    total = sum(len(block.code) for block in _blocks(text)[0])
    base, low = (_count(loop) for loop in loops)
    return Mix(base, low, total - base.issued - low.issued, digest(compiled.asm["ptx"]))


def matmul_loops(text: str) -> list[list[tuple[str, str]]]:
    """The innermost loops with tensor core instructions, in order: (opcode, modifiers) of each
    instruction.

    Args:
        text: what `nvdisasm -c` prints of a kernel.
    """
    blocks, labels = _blocks(text)
    after = [_successors(i, blocks, labels) for i in range(len(blocks))]
    matmuls = [
        (head, body)
        for head, body in _natural_loops(after).items()
        if any(_TENSOR.match(name) for i in body for name, _ in blocks[i].code)
    ]
    inner = [
        (head, body) for head, body in matmuls if not any(other < body for _, other in matmuls)
    ]
    return [[op for i in sorted(body) for op in blocks[i].code] for _, body in sorted(inner)]


def tensor_flops(loop: Sequence[tuple[str, str]], warps: int) -> int | None:
    """FLOPs of one turn by a block of so many warps; None where an instruction does not say.

    HMMA.16816 is m16n8k16 of one warp, HGMMA.64x256x16 of a group of four; UTCHMMA keeps its shape
    in a register.
    """
    total = 0
    for name, modifiers in loop:
        if name == "HMMA":
            shape = re.search(r"\.16(8)(16|8)\b", modifiers)
            if shape is None:
                return None
            total += 2 * 16 * 8 * int(shape[2]) * warps
        elif name == "HGMMA":
            shape = re.search(r"\.(\d+)x(\d+)x(\d+)", modifiers)
            if shape is None:
                return None
            total += 2 * int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
        elif _TENSOR.match(name):
            return None
    return total


def _count(loop: Sequence[tuple[str, str]]) -> Loop:
    return Loop(
        tensor=sum(bool(_TENSOR.match(name)) for name, _ in loop),
        copies=sum(name in _COPIES for name, _ in loop),
        shared=sum(_shared(name, modifiers) for name, modifiers in loop),
        issued=len(loop),
    )


def _shared(name: str, modifiers: str) -> int:
    """Bytes that a warp reads: LDSM.16.M88.4 is four matrices, LDS.128 16 bytes a thread."""
    if name == "LDSM":
        return _ROW * int(modifiers[-1] if modifiers[-2:] in (".2", ".4") else 1)
    if name == "LDS":
        return _ROW * next((n // 32 for n in (64, 128) if f".{n}" in modifiers), 1)
    return 0


def _blocks(text: str) -> tuple[list[_Block], dict[str, int]]:
    blocks, labels = [_Block()], {}
    for line in text.splitlines():
        if found := _LABEL.match(line):
            if blocks[-1].code:
                blocks.append(_Block())
            labels[found[1]] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            guard, name, modifiers, rest = found.groups()
            # What never runs still takes its place among the instructions.
            never = guard is not None and guard.strip() == "@!PT"
            blocks[-1].code.append(("NOP", "") if never else (name, modifiers))
            if name == "BRX" or name == "JMX":
                raise ValueError("a jump to an address that only the GPU knows")
            if name in ("BRA", "EXIT", "RET"):
                blocks[-1].targets += _TARGET.findall(rest)
                # BRA.U names its condition among its operands.
                blocks[-1].falls = bool(guard) or (name == "BRA" and not rest.startswith("`("))
                blocks.append(_Block())
    return blocks, labels


def _successors(i: int, blocks: Sequence[_Block], labels: dict[str, int]) -> set[int]:
    found = {labels[target] for target in blocks[i].targets}
    return found | {i + 1} if blocks[i].falls and i + 1 < len(blocks) else found


def _natural_loops(after: Sequence[set[int]]) -> dict[int, set[int]]:
    """For each block that is entered again: the blocks of its loop, all jumps to it together."""
    reached = sorted(_reach(0, after.__getitem__, None))
    before: dict[int, set[int]] = {i: set() for i in reached}
    for i in reached:
        for j in after[i]:
            before[j].add(i)
    dominators = {i: set(reached) for i in reached}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in reached[1:]:
            found = {i} | set.intersection(*(dominators[j] for j in before[i]))
            changed |= found != dominators[i]
            dominators[i] = found
    loops: dict[int, set[int]] = {}
    for i in reached:
        for head in after[i] & dominators[i]:
            loops.setdefault(head, {head}).update(_reach(i, before.__getitem__, head))
    return loops


def _reach(start: int, step: Callable[[int], set[int]], end: int | None) -> set[int]:
    """All that steps from `start` lead to, without those beyond `end`."""
    found, waiting = {start}, [start]
    while waiting:
        here = waiting.pop()
        fresh = step(here) - found if here != end else set()
        found |= fresh
        waiting += fresh
    return found
