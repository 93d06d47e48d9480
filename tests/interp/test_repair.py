"""The repaired interpreter computes in bfloat16 what torch does."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.quick


@triton.jit
def arithmetic_kernel(a, b, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y = tl.load(a + index), tl.load(b + index)
    tl.store(out + index, x + y)
    tl.store(out + SIZE + index, x * y)
    tl.store(out + 2 * SIZE + index, tl.where(x > y, x, y))
    tl.store(out + 3 * SIZE + index, (x.to(tl.float32) * 3.0).to(tl.bfloat16))
    tl.store(out + 4 * SIZE + index, -x)


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)).to(tl.bfloat16))


@triton.jit
def sum_kernel(a, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(a + tl.arange(0, SIZE))))


def bf16(*shape):
    return torch.randn(shape).bfloat16()


def test_arithmetic_rounds_as_torch_does():
    a, b = bf16(1024), bf16(1024)
    a[:4] = torch.tensor([float("inf"), float("nan"), 0.0, 1e-40])
    out = torch.empty(5, 1024, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, SIZE=1024)
    expected = [a + b, a * b, torch.where(a > b, a, b), (a.float() * 3).bfloat16(), -a]
    assert torch.equal(out.nan_to_num(7.0), torch.stack(expected).nan_to_num(7.0))


def test_halfway_goes_to_even():
    a = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8)]).repeat(16)[:32]
    a = torch.cat([a, torch.linspace(0, 1, 32)])
    out = torch.empty(64, dtype=torch.bfloat16)
    cast_kernel[(1,)](a, out, SIZE=64)
    assert torch.equal(out, a.bfloat16())


@triton.jit
def cast_kernel(a, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, tl.load(a + index).to(tl.bfloat16))


def test_dot_is_a_float32_product_rounded_once():
    a, b = bf16(32, 32), bf16(32, 32)
    out = torch.empty(32, 32, dtype=torch.bfloat16)
    dot_kernel[(1,)](a, b, out, SIZE=32)
    exact = a.double() @ b.double()
    off = (out.double() - exact).abs()
    assert (off <= exact.abs() * 2**-8 + 1e-5).all()


def test_a_sum_in_bfloat16_is_refused():
    with pytest.raises(Exception, match="widen to float32"):
        sum_kernel[(1,)](bf16(32), torch.empty(1), SIZE=32)
