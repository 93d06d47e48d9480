"""What holds bit for bit: repeats, wide addresses, rows apart, pruned gradients, launch counts."""

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from heterolora.kernels import Branch, Site, group_linear
from heterolora.kernels.gpu import passes
from heterolora.kernels.gpu.launch import launch_for
from heterolora.verify.checks import check_repeats, converted
from heterolora.verify.groups import GROUPS, LARGE, SEEDED, Draw, dropout_seed, leaves
from heterolora.verify.operations import outputs_and_gradients

ALL = {**GROUPS, **SEEDED, **LARGE}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["seeded_shortcut", "split_k", "shortcuts", "many_rows"])
def test_repeats(name, dtype):
    assert check_repeats(ALL[name], dtype, "triton") is None


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(n, marks=pytest.mark.quick) for n in ("two_sources", "transposed_weight")),
        "shortcuts",
        "split_k",
        "dropout_large",
    ],
)
def test_wide_addresses_change_nothing(name, monkeypatch):
    """The kernels with int64 offsets forced on; what they are chosen by is only the size."""
    group = ALL[name](Draw(torch.float32))
    narrow, grads = outputs_and_gradients(group, "triton")
    asked = []

    def wide(x):
        asked.append(x)
        return dataclasses.replace(launch_for(x), index64=True)

    monkeypatch.setattr(passes, "launch_for", wide)
    values, _ = outputs_and_gradients(group, "triton", grads)
    assert len(asked) >= 2
    assert all(torch.equal(a, b) for a, b in zip(narrow, values, strict=True))


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["mixed_siblings", "seeded_shortcut", "split_k"])
def test_a_bad_row_stays_in_its_row(name, poison):
    """A bad row of x or a source spoils that of the outputs alone; one of dY, that of dX."""
    clean = ALL[name](Draw(torch.float32))
    dirty = converted(clean, torch.float32)
    sources = {t for t in (dirty[0], *(b.source for b in dirty[2])) if t is not None}
    with torch.no_grad():
        for source in sources:
            source.view(-1, source.shape[-1])[1] = poison
        expected = group_linear(*clean, seed=dropout_seed(), implementation="triton")
        found = group_linear(*dirty, seed=dropout_seed(), implementation="triton")
    for good, bad in zip(expected, found, strict=True):
        _same_but_row_one(good, bad)

    values, grads = outputs_and_gradients(clean, "triton")
    for grad in grads:
        grad.view(-1, grad.shape[-1])[1] = poison
    again, _ = outputs_and_gradients(clean, "triton", grads)
    tensors = leaves(clean)
    for tensor, good, bad in zip(tensors, values[len(grads) :], again[len(grads) :], strict=True):
        if any(tensor is source for source in (clean[0], *(b.source for b in clean[2]))):
            _same_but_row_one(good, bad)


def _same_but_row_one(good, bad):
    good, bad = good.reshape(-1, good.shape[-1]), bad.reshape(-1, bad.shape[-1])
    others = [row for row in range(len(good)) if row != 1]
    assert torch.equal(good[others], bad[others])
    assert not bad[1].isfinite().any()


@pytest.mark.parametrize(
    "name",
    [pytest.param("only_shortcut", marks=pytest.mark.quick), "two_sources", "seeded_dropout"],
)
def test_pruned_gradients_are_the_same(name):
    """Any one gradient alone, or all but one, is bit for bit what it is among all."""
    group = ALL[name](Draw(torch.float32))
    tensors = leaves(group)
    values, grads = outputs_and_gradients(group, "triton")
    full = dict(zip(tensors, values[len(grads) :], strict=True))
    every = range(len(tensors))
    for wanted in [*([i] for i in every), *([i for i in every if i != j] for j in every)]:
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i in wanted)
        chosen = [tensors[i] for i in wanted]
        outputs = group_linear(*group, seed=dropout_seed(), implementation="triton")
        found = torch.autograd.grad(outputs, chosen, grads)
        for tensor, grad in zip(chosen, found, strict=True):
            assert torch.equal(grad, full[tensor])


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources"])
def test_an_output_that_nothing_depends_on(name):
    """It counts as one whose dY is zero."""
    group = ALL[name](Draw(torch.float32))
    _, grads = outputs_and_gradients(group, "triton")
    for unused in range(len(grads)):
        zeroed = [g * (i != unused) for i, g in enumerate(grads)]
        expected, _ = outputs_and_gradients(group, "triton", zeroed)
        outputs = group_linear(*group, seed=dropout_seed(), implementation="triton")
        used = [i for i in range(len(grads)) if i != unused]
        found = torch.autograd.grad(
            [outputs[i] for i in used],
            leaves(group),
            [grads[i] for i in used],
            materialize_grads=True,
        )
        for value, good in zip(found, expected[len(grads) :], strict=True):
            assert torch.equal(value, good)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "three dimensions"])
def test_gradients_of_any_stride(layout):
    group = ALL["two_sources"](Draw(torch.float32))
    _, grads = outputs_and_gradients(group, "triton")
    strided = {
        "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda g: g[:1, :, :1].expand(g.shape),
        "three dimensions": lambda g: torch.stack([g, g], -1)[..., 0],
    }[layout]
    grads = [strided(grad) for grad in grads]
    expected, _ = outputs_and_gradients(group, "triton", [g.contiguous() for g in grads])
    found, _ = outputs_and_gradients(group, "triton", grads)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.quick
def test_the_seed_alone_decides_the_masks():
    group = SEEDED["seeded_dropout"](Draw(torch.float32))
    run = [
        group_linear(*group, seed=torch.tensor(seed), implementation="triton")
        for seed in (5, 5, 5 + 2**32, 6)
    ]
    for (i, one), (j, other) in itertools.combinations(enumerate(run), 2):
        assert torch.equal(one[0], other[0]) == ((i, j) == (0, 1))


@pytest.mark.quick
@pytest.mark.parametrize("k", [96, 640], ids=["whole sums", "split sums"])
@pytest.mark.parametrize("ranks", [(16,), (1, 0, 128), (4, 24, 160)])
def test_launches_do_not_grow_with_branches(ranks, k, launches, monkeypatch):
    """Three forward and six backward, whatever the ranks, sums split over programs or not."""
    splits = []

    def start(kernel, grid, *args, **options):
        splits.append((kernel.__name__, options.get("SPLIT")))
        kernel[grid](*args, **options)

    few = dataclasses.replace(launch_for(torch.empty(0)), programs=64, start=start)
    monkeypatch.setattr(passes, "launch_for", lambda x: few)
    x = torch.randn(8, k, requires_grad=True)
    sites = [Site(torch.randn(24, k)) for _ in ranks]
    branches = [
        Branch(i, *(torch.randn(*size, requires_grad=True) for size in ((r, k), (24, r))))
        for i, r in enumerate(ranks)
    ]
    outputs = group_linear(x, sites, branches, implementation="triton")
    forward = dict(launches)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert forward == {"pack_kernel": 1, "shrink_kernel": 1, "expand_kernel": 1}
    assert dict(splits)["expand_kernel"] == (k == 640)
    assert launches - Counter(forward) == {
        "pack_kernel": 1, "dy_kernel": 1, "reduce_kernel": 2, "dx_kernel": 1, "da_kernel": 1
    }  # fmt: skip
