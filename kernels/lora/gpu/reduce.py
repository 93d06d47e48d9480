"""reduce: sums of fp32 partial results in fixed order, for several matrices in one launch.

The other kernels split a long sum over programs, each of which writes its part. Adding the parts up
in the order of their index, rather than by atomics in the order of arrival, makes every result
repeat bit for bit.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .device import ceil_div, pick
from .launch import Launch
from .tables import times16

__all__ = ["Part", "Sum", "reduce_kernel", "reduce_splits"]

_BLOCK = 1024


@triton.jit
def reduce_kernel(
    outs,  # per problem: [rows, columns], rows out_strides apart
    parts,  # fp32 (fp64 for fp64 outputs), from the first part on
    sizes,  # rows * columns; this and the next three times 16, see `tables.times16`
    rows,
    out_strides,
    part_strides,  # elements between a part's rows
    split_strides,  # elements between parts
    splits,
    scales,
    BLOCK: tl.constexpr,
):
    problem = tl.program_id(1)
    size = pick(sizes, problem) // 16
    columns = pick(sizes, problem) // pick(rows, problem)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size  # [BLOCK]
    row, column = index // columns, index % columns
    part = pick(parts, problem)
    source = part + row * pick(part_strides, problem) + column
    acc = tl.zeros((BLOCK,), part.dtype.element_ty)
    # In ascending order, by one program for each element: the same sum every time.
    for _ in range(pick(splits, problem) // 16):
        acc += tl.load(source, mask=inside, other=0.0)
        source += pick(split_strides, problem)
    out = pick(outs, problem)
    value = (acc * pick(scales, problem)).to(out.dtype.element_ty)
    tl.store(out + row * (pick(out_strides, problem) // 16) + column, value, mask=inside)


class Part(NamedTuple):
    """Parts of a gradient that belong to some columns of S.

    Attributes:
        start, stop: the columns.
        parts: flat, fp32, from the first part on: dB as [n, width], dA as [width, k].
        part_stride: elements between a part's rows.
        split_stride: elements between parts.
        splits: how many parts.
    """

    start: int
    stop: int
    parts: Tensor
    part_stride: int
    split_stride: int
    splits: int


class Sum(NamedTuple):
    """One matrix to add up.

    Attributes:
        out: [rows, columns], last stride 1.
        parts: fp32 (fp64 for fp64 outputs), flat, from the first part on.
        part_stride: elements between a part's rows.
        split_stride: elements between parts.
        splits: how many parts.
        scale: multiplied into the sum.
    """

    out: Tensor
    parts: Tensor
    part_stride: int
    split_stride: int
    splits: int
    scale: float = 1.0


def reduce_splits(sums: Sequence[Sum], launch: Launch) -> None:
    """Write every sum to its output: one launch for each dtype among the outputs."""
    for dtype in dict.fromkeys(item.out.dtype for item in sums):
        some = [item for item in sums if item.out.dtype == dtype and item.out.numel()]
        if not some:
            continue
        largest = max(item.out.numel() for item in some)
        launch.start(
            reduce_kernel,
            (ceil_div(largest, _BLOCK), len(some)),
            tuple(item.out for item in some),
            tuple(item.parts for item in some),
            times16(item.out.numel() for item in some),
            times16(item.out.shape[0] for item in some),
            times16(item.out.stride(0) for item in some),
            tuple(item.part_stride for item in some),
            tuple(item.split_stride for item in some),
            times16(item.splits for item in some),
            tuple(item.scale for item in some),
            BLOCK=_BLOCK,
            num_warps=4,
        )
