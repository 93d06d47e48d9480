"""expand by tensor descriptors: the same product, its tiles moved by the Tensor Memory Accelerator.

For Hopper and later. Descriptors are made on the host and cannot be chosen at run time, so the
sites follow one another in the code; programs are dealt tiles as if all of them were in one row.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import GROUP_M, ceil_div, swizzle
from .tables import Pass, common_block, leading

__all__ = ["describable", "expand_tma", "expand_tma_kernel"]


@triton.jit(do_not_specialize=["m"])
def expand_tma_kernel(
    x,  # descriptor of [m, k], blocks [BLOCK_M, BLOCK_K]
    s,  # of [m, columns], blocks [BLOCK_M, BLOCK_R]
    weights,  # per site: of [n, k], blocks [BLOCK_N, BLOCK_K]; of [k, n] if TRANSPOSED
    packed_b,  # of [n, width], blocks [BLOCK_N, BLOCK_R]
    biases,  # pointers to [bias_size]
    outs,  # of [m, n], blocks [BLOCK_M, BLOCK_N]
    ns,
    bias_sizes,  # n, or 0 without bias
    starts,  # the site's columns of S
    widths,
    m,
    k,
    TRANSPOSED: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_m, programs, passed = tl.cdiv(m, BLOCK_M), tl.num_programs(0), 0
    # Unrolled: a site's descriptors are arguments that no run-time index can choose.
    for i in tl.static_range(len(ns)):
        tiles_n = tl.cdiv(ns[i], BLOCK_N)
        # The first tile of this site among every programs-th tile of the whole row.
        turn = (tl.program_id(0) + programs - passed % programs) % programs
        # Persistent across sites: a program goes on where the last site's tiles ended.
        for tile in range(turn, tiles_m * tiles_n, programs):
            block_m, block_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
            row, column = block_m * BLOCK_M, block_n * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # The base matmul, over k. Descriptors read zeros beyond the edges, so that no step has
            # a mask.
            for first in range(0, k, BLOCK_K):
                x_tile = x.load([row, first])  # [BLOCK_M, BLOCK_K]
                if TRANSPOSED:
                    w_tile = weights[i].load([first, column])  # [BLOCK_K, BLOCK_N]
                else:
                    w_tile = weights[i].load([column, first]).T
                acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
            # The branches, over the site's columns of S, into the same accumulator.
            for first in range(0, widths[i], BLOCK_R):
                s_tile = s.load([row, starts[i] + first])  # [BLOCK_M, BLOCK_R]
                b_tile = packed_b[i].load([column, first])  # [BLOCK_N, BLOCK_R]
                acc = tl.dot(s_tile, b_tile.T, acc, input_precision=PRECISION)
            if BIAS:
                at = column + tl.arange(0, BLOCK_N)  # [BLOCK_N]
                bias = tl.load(biases[i] + at, mask=at < bias_sizes[i], other=0.0)
                acc += bias.to(tl.float32)[None, :]
            outs[i].store([row, column], acc.to(outs[i].dtype))
        passed += tiles_m * tiles_n


def describable(*tensors: Tensor) -> bool:
    """Whether descriptors can address these matrices: bases and rows 16-byte aligned, not empty."""
    return all(
        t.numel() > 0
        and t.data_ptr() % 16 == 0
        and sorted(t.stride())[0] == 1
        and sorted(t.stride())[1] * t.element_size() % 16 == 0
        for t in tensors
    )


def expand_tma(group: Pass, s: Tensor, outs: Sequence[Tensor]) -> None:
    """Write every site's output; arguments as for `expand`, all matrices `describable`."""
    x, layout, launch = group.sources[0], group.layout, group.launch
    packed, weights, biases = group.packed, group.call.weights, group.call.biases
    m, k = x.shape
    ns = tuple(out.shape[1] for out in outs)
    block_r = common_block(columns.width for columns in layout.site)
    tile = launch.tile("expand_tma", block_r, m=m, ns=ns, k=k)
    given = [bias for bias in biases if bias is not None]
    dense, strides, transposed = leading(weights)
    packed_b = []
    for i, (n, columns) in enumerate(zip(ns, layout.site, strict=True)):
        # A site of rank 0 loads none of its B: any descriptor of the type will do.
        b = packed.buffer[packed.b[i] :] if columns.width else packed.buffer
        width = columns.width or block_r
        packed_b.append(TensorDescriptor(b, [n, width], [width, 1], [tile.n, block_r]))
    described = [
        TensorDescriptor(
            weight,
            [k, n] if transposed else [n, k],
            [stride, 1],
            [tile.k, tile.n] if transposed else [tile.n, tile.k],
        )
        for weight, stride, n in zip(dense, strides, ns, strict=True)
    ]
    tiles = ceil_div(m, tile.m) * sum(ceil_div(n, tile.n) for n in ns)
    launch.start(
        expand_tma_kernel,
        (min(tiles, launch.programs),),
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [tile.m, tile.k]),
        TensorDescriptor(s, [m, layout.columns], [layout.columns, 1], [tile.m, block_r]),
        tuple(described),
        tuple(packed_b),
        tuple(given[0] if bias is None else bias for bias in biases) if given else tuple(outs),
        tuple(
            TensorDescriptor(out, [m, n], [out.stride(0), 1], [tile.m, tile.n])
            for out, n in zip(outs, ns, strict=True)
        ),
        ns,
        tuple(0 if bias is None else bias.shape[0] for bias in biases),
        tuple(columns.start for columns in layout.site),
        tuple(columns.width for columns in layout.site),
        m,
        k,
        TRANSPOSED=transposed,
        BIAS=bool(given),
        PRECISION=launch.precision,
        GROUP_M=GROUP_M,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=block_r,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
