"""Tensors of more than 2^31 elements, in each place where one can be that large."""

import pytest
import torch

from heterolora.kernels import Branch, Site, group_linear
from heterolora.verify.checks import error

ROWS = (1 << 20) + 7
WIDE = 2064
GIB = 1 << 30


def draw(*shape, scale=1.0):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16) * scale


def check(found, eager, exact):
    assert error(found, exact) <= max(2 * error(eager, exact), torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("k", [WIDE, 16], ids=["input", "output"])
def test_more_than_int32_can_address(k, room):
    n = 16 if k == WIDE else WIDE
    assert ROWS * max(n, k) > 2**31
    room(4 * 2 * ROWS * max(n, k) + 2 * GIB)
    rank, scale = 8, 2.0
    x = draw(ROWS, k).requires_grad_()
    site = Site(draw(n, k, scale=k**-0.5))
    a, b = (t.requires_grad_() for t in (draw(rank, k, scale=k**-0.5), draw(n, rank)))
    (y,) = group_linear(x, [site], [Branch(0, a, b, scale)], implementation="triton")
    dy = draw(ROWS, n)
    dx, d_a, d_b = torch.autograd.grad(y, [x, a, b], dy)
    with torch.no_grad():
        # Rows before and after the 2^31st element, and the last.
        edge = 2**31 // max(n, k)
        for rows in (slice(0, 64), slice(edge - 32, edge + 32), slice(ROWS - 64, ROWS)):
            part, part_dy = x[rows], dy[rows]
            for found, form in (
                (y[rows], lambda x, dy, w, a, b: x @ w.T + scale * ((x @ a.T) @ b.T)),
                (dx[rows], lambda x, dy, w, a, b: dy @ w + scale * ((dy @ b) @ a)),
            ):
                operands = (part, part_dy, site.weight, a, b)
                check(found, form(*operands), form(*(t.double() for t in operands)))
        totals = []
        for dtype in (torch.bfloat16, torch.float64):
            sum_a, sum_b = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b).double()
            small_a, small_b = a.to(dtype), b.to(dtype)
            for start in range(0, ROWS, 1 << 16):
                part = x[start : start + (1 << 16)].to(dtype)
                part_dy = dy[start : start + (1 << 16)].to(dtype)
                sum_a += scale * ((part_dy @ small_b).T @ part).double()
                sum_b += scale * (part_dy.T @ (part @ small_a.T)).double()
            totals.append((sum_a, sum_b))
        # Summed over blocks in float64, the eager gradient is better than one product would be.
        for found, eager, exact in zip((d_a, d_b), *totals, strict=True):
            check(found, eager, exact)
