"""What a compiled kernel says about itself: registers, shared memory, spills, instructions."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ARCHS", "Arch", "Usage", "faults", "tool", "usage"]


@dataclass(frozen=True)
class Arch:
    """A GPU architecture to compile for.

    Attributes:
        backend, target, warp: of Triton's `GPUTarget`.
        capability: as torch reports it.
        shared: bytes of shared memory that a block may have.
        programs: multiprocessors of a common chip.
        matmul: the tensor core instruction of a large product.
    """

    backend: str
    target: int | str
    warp: int
    capability: tuple[int, int]
    shared: int
    programs: int
    matmul: str


def _cuda(target: int, kib: int, programs: int, matmul: str = r"mma\.sync") -> Arch:
    return Arch("cuda", target, 32, divmod(target, 10), kib * 1024, programs, matmul)


# Shared memory: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", and
# AMD's CDNA 3 ISA guide. Multiprocessors of A100, A10, L40S, H100 SXM, B200, RTX 5090 and MI300X.
ARCHS = {
    "sm_80": _cuda(80, 163, 108),
    "sm_86": _cuda(86, 99, 72),
    "sm_89": _cuda(89, 99, 142),
    "sm_90": _cuda(90, 227, 132, r"wgmma\.mma_async"),
    "sm_100": _cuda(100, 227, 148, r"tcgen05\.mma"),
    "sm_120": _cuda(120, 99, 170),
    "gfx942": Arch("hip", "gfx942", 64, (9, 4), 64 * 1024, 304, "v_mfma"),
}

_DOTS = ("shrink", "expand", "expand_tma", "dy", "dx", "da", "score")
# Their result has as many rows as S has columns, often too few for the wide instructions.
_FEW_ROWS = ("da", "score")
_ANY_MATMUL = r"mma\.sync|wgmma\.mma_async|tcgen05\.mma|v_mfma"
_TENSOR_MEMORY_COLUMNS = 512
# One load of a bias or of flags, and of nothing else, may be of single elements.
_NARROW_LOADS = 4


class Usage(NamedTuple):
    """Attributes:
    registers: of a thread; on AMD vector registers.
    shared: bytes of a block.
    spilled: bytes of a thread; on AMD vector registers as well.
    """

    registers: int
    shared: int
    spilled: int


def usage(compiled: Any) -> Usage:
    """Figures of a `triton.compiler.CompiledKernel`; needs no GPU."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        found = [_field(compiled.asm["amdgcn"], rf"\.{n}:") for n in _AMD]
        return Usage(found[0], shared, found[1] + found[2])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [str(tool("cuobjdump")), "--dump-resource-usage", str(path)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = [_field(out, f"{n}:") for n in ("REG", "STACK", "LOCAL")]
    return Usage(found[0], shared, found[1] + found[2])


# Scalar registers spill into lanes of vector registers, not into memory: not counted.
_AMD = ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")


def _field(text: str, name: str) -> int:
    match = re.search(name + r"\s*(\d+)", text)
    if match is None:
        raise ValueError(f"no {name!r} in the compiler's figures: {text[:200]!r}")
    return int(match.group(1))


def tool(name: str) -> Path:
    """One of NVIDIA's tools that come with Triton: "cuobjdump" or "nvdisasm"."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def faults(
    kernel: str,
    arch: Arch,
    compiled: Any,
    found: Usage,
    *,
    ieee: bool,
    wide: bool,
    few: bool = False,
    aligned: bool,
    stack: int = 0,
) -> list[str]:
    """What is wrong with a compiled kernel.

    Args:
        kernel: its name, without "_kernel".
        found: of `usage`.
        ieee: whether products are of float32 without tensor cores.
        wide: whether elements have more than 16 bits.
        few: whether tiles have too few rows for the wide instructions.
        aligned: whether all rows begin at a multiple of 16 elements.
        stack: bytes that a thread may spill.
    """
    code = compiled.asm["amdgcn" if arch.backend == "hip" else "ptx"]
    wrong = []
    if found.spilled > stack:
        wrong.append(f"{found.spilled} bytes a thread spilled")
    if found.shared > arch.shared:
        wrong.append(f"{found.shared} bytes of shared memory, {arch.shared} are there")
    columns = getattr(compiled.metadata, "tmem_size", 0) or 0
    if columns > _TENSOR_MEMORY_COLUMNS:
        wrong.append(f"{columns} columns of tensor memory, {_TENSOR_MEMORY_COLUMNS} are there")
    if kernel not in _DOTS:
        return wrong
    # Small tiles, of float32 too, get the older instructions on new chips.
    matmul = _ANY_MATMUL if wide or few or kernel in _FEW_ROWS else arch.matmul
    used = re.search(matmul, code) is not None
    # score forms its Gram matrices of float32 gradients by three products of TF32.
    if not ieee and not used:
        wrong.append(f"no {matmul}: tensor cores are not used")
    # AMD's tensor cores take float32 as it is.
    if ieee and kernel != "score" and arch.backend == "cuda" and used:
        wrong.append("tensor cores are used for products that must be of full float32")
    if arch.backend == "cuda" and aligned:
        copies = r"cp\.async\.bulk\.tensor" if kernel == "expand_tma" else r"cp\.async\.c[ag]\."
        if not re.search(copies, code):
            wrong.append("no asynchronous copies: the loops are not pipelined")
        narrow = len(re.findall(r"ld\.global[.a-z0-9:_]*\.b(?:8|16)\b", code))
        narrow += len(re.findall(r"cp\.async\.ca\.[^;]*, (?:0x)?4[,;]", code))
        if not wide and narrow > _NARROW_LOADS:
            wrong.append(f"{narrow} loads of single elements: vectors were lost")
    return wrong
