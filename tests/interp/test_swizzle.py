"""Every tile is dealt out once: down strips of rows, through the columns of all sites."""

import pytest
import torch
import triton
import triton.language as tl

from heterolora.kernels.gpu.device import find, swizzle


@triton.jit
def deal_kernel(out, ns, m, GROUP_M: tl.constexpr, BLOCK: tl.constexpr):
    """What expand does with each of its tiles, but for the product: who takes it, and its site."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK), 0
    for i in tl.static_range(len(ns)):
        tiles_n += tl.cdiv(ns[i], BLOCK)
    for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        block_m, block_n = swizzle(tile, tiles_m, tiles_n, GROUP_M)
        site, block_n = find(ns, block_n, BLOCK)
        tl.store(out + tile * 4, tl.program_id(0))
        tl.store(out + tile * 4 + 1, site)
        tl.store(out + tile * 4 + 2, block_m)
        tl.store(out + tile * 4 + 3, block_n)


@pytest.mark.quick
@pytest.mark.parametrize(("m", "ns"), [(300, (64, 33)), (160, (17,)), (40, (32, 1, 100))])
def test_the_order_of_tiles(m, ns):
    block, programs, group_m = 16, 5, 8
    rows, expected = -(-m // block), []
    for first in range(0, rows, group_m):
        for site, n in enumerate(ns):
            expected += [site] * (min(group_m, rows - first) * -(-n // block))
    out = torch.full((len(expected), 4), -1, dtype=torch.int32)
    deal_kernel[(programs,)](out, ns, m, GROUP_M=group_m, BLOCK=block)
    assert out[:, 0].tolist() == [index % programs for index in range(len(expected))]
    assert out[:, 1].tolist() == expected
    places = {tuple(row) for row in out[:, 1:].tolist()}
    assert len(places) == len(expected)
