"""What is chosen by device or size, chosen by hand: descriptors, small tiles, far addresses."""

import mmap

import pytest
import torch
from helpers import error

from heterolora.kernels import Branch, Site, group_linear, spec
from heterolora.kernels.gpu import passes
from heterolora.kernels.gpu.launch import KERNELS, Launch, Tile
from heterolora.kernels.group import Call

RANKS = (3, 0, 33)
NS = (64, 40, 16)


def _launch(tile, **options):
    tiles = dict.fromkeys(KERNELS, Tile(*tile, warps=1, stages=1))
    return Launch(tiles, programs=3, **options)


def _operands(dtype, *, m=45, k=48, transposed=False):
    weights = [torch.randn(k, n, dtype=dtype).t() for n in NS]
    if not transposed:
        weights = [weight.contiguous() for weight in weights]
    a = [torch.randn(r, k) for r in RANKS]
    b = [torch.randn(n, r) for n, r in zip(NS, RANKS, strict=True)]
    biases = [torch.randn(64, dtype=dtype), None, torch.randn(16, dtype=dtype)]
    return torch.randn(m, k, dtype=dtype), weights, biases, a, b


def _forward(operands, launch):
    x, weights, biases, a, b = operands
    about = [2.0, 1.0, 0.5], [0, 1, 2], [0, 0, 0], [0.0] * 3, "triton"
    return passes.group_linear(Call([x], weights, biases, a, b, None, *about), launch)[0]


@pytest.mark.quick
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_descriptors_are_as_exact_as_pointers(dtype, transposed, launches):
    operands = _operands(dtype, transposed=transposed)
    found = _forward(operands, _launch((32, 32, 32), tma=True))
    assert launches["expand_tma_kernel"] == 1 and not launches["expand_kernel"]
    other = _forward(operands, _launch((32, 32, 32)))
    assert launches["expand_tma_kernel"] == 1 and launches["expand_kernel"] == 1
    x, weights, biases, a, b = operands
    sites = [
        Site(w.double(), None if c is None else c.double())
        for w, c in zip(weights, biases, strict=True)
    ]
    branches = [
        Branch(i, a[i].double(), b[i].double(), scale) for i, scale in enumerate((2.0, 1.0, 0.5))
    ]
    truth = spec.group_linear(x.double(), sites, branches)
    for value, pointers, expected in zip(found, other, truth, strict=True):
        bound = 2 * max(error(pointers, expected), torch.finfo(dtype).eps)
        assert error(value, expected) <= bound


@pytest.mark.quick
def test_descriptors_are_left_alone_where_rows_are_not_aligned(launches):
    operands = _operands(torch.bfloat16, k=49)
    _forward(operands, _launch((32, 32, 32), tma=True))
    assert launches["expand_kernel"] == 1 and not launches["expand_tma_kernel"]


@pytest.mark.parametrize("tile", [(16, 16, 16), (64, 16, 32)])
def test_tiles_change_nothing_but_rounding(tile):
    """Nine and more rows of tiles, so that the last strip is lower than the others."""
    operands = _operands(torch.float64, m=150, k=17)
    one = _forward(operands, _launch((128, 128, 64)))
    other = _forward(operands, _launch(tile))
    assert all(error(a, b) < 1e-14 for a, b in zip(one, other, strict=True))


@pytest.mark.quick
def test_padding_adds_nothing_to_infinity():
    """Where all operands are positive an infinite input gives infinity, as in the specification."""
    x = torch.rand(5, 7) + 0.1
    x[1, 3] = float("inf")
    sites = [Site(torch.rand(4, 7) + 0.1)]
    branches = [Branch(0, torch.rand(3, 7) + 0.1, torch.rand(4, 3) + 0.1, 2.0)]
    (expected,) = spec.group_linear(x, sites, branches)
    (found,) = group_linear(x, sites, branches, implementation="triton")
    assert expected[1].isinf().all() and torch.equal(found[1], expected[1])


def test_addresses_beyond_two_to_the_31():
    """Rows 2^30 elements apart, in memory that is reserved and, but for three rows, never touched.

    What a 32-bit offset would reach instead lies in the same reservation and reads as zero.
    """
    stride, m, k = 2**30, 3, 40
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, named from 3.13 on
    try:
        memory = mmap.mmap(-1, 2 * (2**32 + 2 * k), flags=flags)
    except OSError as refused:
        pytest.skip(f"8 GiB of address space are not to be had: {refused}")
    reserved = torch.frombuffer(memory, dtype=torch.float16)
    x = torch.as_strided(reserved, (m, k), (stride, 1), 2**31)
    x.copy_(torch.randn(m, k))
    dy = torch.as_strided(reserved, (m, 24), (stride, 1), 2**31 + k)
    dy.copy_(torch.randn(m, 24))
    weight = torch.randn(24, k, dtype=torch.float16)
    results = []
    for rows, grad in ((x.clone(), dy.clone()), (x.detach(), dy)):
        leaves = [rows.requires_grad_(), torch.full((3, k), 0.125), torch.full((24, 3), 0.25)]
        leaves[1].requires_grad_(), leaves[2].requires_grad_()
        branches = [Branch(0, *leaves[1:], 2.0)]
        (y,) = group_linear(rows, [Site(weight)], branches, implementation="triton")
        results.append([y, *torch.autograd.grad(y, leaves, grad)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
