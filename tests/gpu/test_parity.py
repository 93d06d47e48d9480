"""Outputs and gradients in bf16 and fp16 against float64, and the same bits in every run."""

import pytest
import torch

from heterolora.kernels import group_linear
from heterolora.verify.checks import check_parity, check_repeats
from heterolora.verify.groups import GROUPS, LARGE, SEEDED, Draw, Sizes, build, dropout_seed, leaves

ALL = {**GROUPS, **SEEDED, **LARGE}
LOW = (torch.bfloat16, torch.float16)
FEW = ("ranks_1_to_4", "rank_160_beside_17", "split_k", "shortcuts", "dropout_large")

# Sizes of a transformer layer: aligned, so that the fast paths run, and one row off.
REAL = {
    "attention": Sizes(512, 1024, (1024, 256, 256), ((0, 8), (1, 64), (2, 16))),
    "odd attention": Sizes(511, 1023, (1021, 255, 257), ((0, 7), (1, 33), (2, 100))),
    "mlp with shortcut": Sizes(384, 768, (2048, 2048), ((0, 16), (1, 4)), ((1, 8, 0),), (768,)),
    "one token": Sizes(1, 2048, (2048, 512, 512), ((0, 16), (1, 16), (2, 16))),
    "down with dropout": Sizes(640, 2048, (768,), ((0, 32),), dropout=0.1),
}


def make(name):
    return (lambda draw: build(draw, REAL[name])) if name in REAL else ALL[name]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [*ALL, *REAL])
def test_within_twice_eager(name, dtype):
    assert check_parity(make(name), dtype, "triton", device="cuda") is None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [*FEW, *REAL])
def test_float32_factors(name):
    problem = check_parity(
        make(name), torch.bfloat16, "triton", factors=torch.float32, device="cuda"
    )
    assert problem is None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("operation", ["low_rank_add", "group_score"])
@pytest.mark.parametrize("name", [*FEW, "attention", "odd attention"])
def test_other_ops(name, operation):
    problem = check_parity(make(name), torch.bfloat16, "triton", operation=operation, device="cuda")
    assert problem is None


@pytest.mark.parametrize("operation", ["group_linear", "low_rank_add", "group_score"])
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [*FEW, *REAL])
def test_repeats_bit_for_bit(name, dtype, operation):
    if operation == "group_score" and dtype == torch.float16:
        pytest.skip("sums of squares of this size overflow in the specification's float16")
    problem = check_repeats(make(name), dtype, "triton", operation=operation, device="cuda")
    assert problem is None


@pytest.mark.parametrize("name", ["seeded_dropout", "seeded_shortcut"])
def test_masks_are_those_of_the_cpu(name):
    """The same seed drops the same elements wherever it runs."""
    group = SEEDED[name](Draw(torch.float32, device="cuda"))
    on_gpu = group_linear(*group, seed=dropout_seed("cuda"), implementation="triton")
    aten = group_linear(*group, seed=dropout_seed("cuda"), implementation="aten")
    for value, other in zip(on_gpu, aten, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mixed_siblings", "shortcuts", "attention"])
def test_a_bad_row_stays_in_its_row(name, poison):
    clean = make(name)(Draw(torch.bfloat16, device="cuda"))
    dirty = make(name)(Draw(torch.bfloat16, device="cuda"))
    with torch.no_grad():
        for source in {dirty[0], *(b.source for b in dirty[2] if b.source is not None)}:
            source.view(-1, source.shape[-1])[1] = poison
        expected = group_linear(*clean, seed=dropout_seed("cuda"), implementation="triton")
        found = group_linear(*dirty, seed=dropout_seed("cuda"), implementation="triton")
    for good, bad in zip(expected, found, strict=True):
        good, bad = good.reshape(-1, good.shape[-1]), bad.reshape(-1, bad.shape[-1])
        others = [row for row in range(len(good)) if row != 1]
        assert torch.equal(good[others], bad[others])
        assert not bad[1].isfinite().any()


def test_every_leaf_gets_its_gradient():
    group = LARGE["shortcuts"](Draw(torch.bfloat16, torch.float32, device="cuda"))
    outputs = group_linear(*group, seed=dropout_seed("cuda"), implementation="triton")
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for tensor in leaves(group):
        assert tensor.grad.dtype == tensor.dtype and tensor.grad.shape == tensor.shape
