"""What the loops of the compiled expand and dx consist of: `tuned/mix.json`, read without a GPU.

`aot` reads the machine code (:mod:`.sass`), :mod:`.schedule` makes times of it.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from .gpu.tiles import Tile

__all__ = ["FILE", "KERNELS", "Loop", "Mix", "mix_name", "read", "shipped_mixes", "write"]

FILE = Path(__file__).parent / "tuned" / "mix.json"
# The kernels whose tiles are chosen by shape, and the file's.
KERNELS = ("expand", "expand_tma", "dx")


class Loop(NamedTuple):
    """One turn of a loop, one step of k.

    Attributes:
        tensor: tensor core instructions in the code of a warp.
        copies: asynchronous copies, likewise.
        shared: bytes that a warp reads from shared memory by instructions of its own.
        issued: all instructions in the code of a warp.
    """

    tensor: int
    copies: int
    shared: int
    issued: int


class Mix(NamedTuple):
    """A compiled kernel.

    Attributes:
        base: the loop over k (of dx: over the columns of a dY).
        low: the loop over columns of S.
        rest: instructions outside of both, which a program runs through once a tile.
        code: digest of the intermediate code it was assembled from.
    """

    base: Loop
    low: Loop
    rest: int
    code: str


def mix_name(arch: str, kernel: str, tile: Tile, block_r: int) -> str:
    """E.g. "sm_90 expand 128x256x64 8 warps 4 stages r16"."""
    sizes = f"{tile.m}x{tile.n}x{tile.k} {tile.warps} warps {tile.stages} stages"
    return f"{arch} {kernel} {sizes} r{block_r}"


def read(path: Path = FILE) -> tuple[str, dict[str, Mix]]:
    """The version of Triton that compiled them, as "3.7", and the kernels by :func:`mix_name`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    mixes = {
        name: Mix(Loop(*base), Loop(*low), rest, code)
        for name, (base, low, rest, code) in content["kernels"].items()
    }
    return content["triton"], mixes


@lru_cache
def shipped_mixes() -> Mapping[str, Mix]:
    """The shipped file, whatever Triton is installed: what differs between versions is little."""
    return read()[1]


def write(triton: str, mixes: Mapping[str, Mix], path: Path = FILE) -> None:
    """Write a file that :func:`read` takes, one kernel a line."""
    rows = [f"    {json.dumps(name)}: {json.dumps(mixes[name])}" for name in sorted(mixes)]
    columns = json.dumps([list(Loop._fields), list(Loop._fields), *Mix._fields[2:]])
    head = f'{{\n  "triton": {json.dumps(triton)},\n  "columns": {columns},\n  "kernels": {{\n'
    path.write_text(head + ",\n".join(rows) + "\n  }\n}\n", encoding="utf-8")
