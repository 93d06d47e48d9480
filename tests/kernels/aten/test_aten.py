"""Rung 2: the op on its `aten` implementation against the specification."""

import copy

import pytest
import torch
from helpers import CountOps, error

from heterolora.kernels import Branch, Site, group_linear, spec
from heterolora.verify.groups import GROUPS, Draw, leaves

pytestmark = pytest.mark.usefixtures("poisoned")


def _run(function, group, grads=None):
    outputs = function(*group)
    if grads is None:
        grads = [torch.randn_like(y) for y in outputs]
    tensors = leaves(group)
    found = torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)
    return [*outputs, *found], grads


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_spec(name, dtype):
    group = GROUPS[name](Draw(dtype))
    with CountOps() as ops:
        values, grads = _run(group_linear, group)
    assert (ops.forward, ops.backward) == (1, 1)
    truth, _ = _run(spec.group_linear, group, grads)
    for value, expected in zip(values, truth, strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["same", "float32"])
def test_low_precision_within_twice_eager(name, dtype, factors):
    """Eager: the same formula op by op in the low precision, adapters included."""
    draw = Draw(dtype, torch.float32 if factors == "float32" else None)
    group = GROUPS[name](draw)
    exact = _double(group)
    values, grads = _run(group_linear, group)
    truth, _ = _run(spec.group_linear, exact, [g.double() for g in grads])
    eager, _ = _run(spec.group_linear, _to(group, dtype), grads)
    for tensor, grad in zip(leaves(group), values[len(group[1]) :], strict=True):
        assert grad.dtype == tensor.dtype
    for value, other, expected in zip(values, eager, truth, strict=True):
        if expected.numel():
            # One rounding of the result is allowed even where eager happens to be exact.
            bound = max(2 * error(other, expected), torch.finfo(dtype).eps)
            assert error(value, expected) <= bound


def _map(group, change):
    seen = {}

    def get(tensor):
        if tensor is None:
            return None
        if tensor not in seen:
            seen[tensor] = change(tensor.detach()).requires_grad_(tensor.requires_grad)
        return seen[tensor]

    x, sites, branches = group
    return (
        get(x),
        [Site(get(s.weight), get(s.bias)) for s in sites],
        [Branch(b.site, get(b.a), get(b.b), b.scale, get(b.source), get(b.mask)) for b in branches],
    )


def _double(group):
    return _map(group, torch.Tensor.double)


def _to(group, dtype):
    return _map(group, lambda t: t.to(dtype, copy=True))


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources"])
def test_prunes_what_is_not_needed(name):
    """Each tensor alone, and outputs that nothing depends on."""
    group = GROUPS[name](Draw(torch.float64))
    truth_all = spec.group_linear(*group)
    weights = [torch.randn_like(y) for y in truth_all]
    for keep in leaves(group):
        only = _map(group, lambda t: t.clone())
        chosen = None
        for old, new in zip(leaves(group), leaves(only), strict=True):
            new.requires_grad_(old is keep)
            chosen = new if old is keep else chosen
        for used in range(len(truth_all)):
            (found,) = torch.autograd.grad(
                (group_linear(*only)[used] * weights[used]).sum(),
                [chosen],
                materialize_grads=True,
            )
            (truth,) = torch.autograd.grad(
                (spec.group_linear(*group)[used] * weights[used]).sum(),
                [keep],
                materialize_grads=True,
            )
            torch.testing.assert_close(found, truth)


def test_nan_row_stays_in_its_row():
    x, sites, branches = GROUPS["mixed_siblings"](Draw(torch.float32))
    x = x.detach().reshape(6, 7).clone()
    clean = group_linear(x, sites, branches)
    x[2] = float("nan")
    for y, expected in zip(group_linear(x, sites, branches), clean, strict=True):
        assert y[2].isnan().all()
        torch.testing.assert_close(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


def test_inputs_are_not_changed():
    group = GROUPS["two_sources"](Draw(torch.float32))
    before = copy.deepcopy([t.detach() for t in leaves(group)])
    weights = [site.weight.clone() for site in group[1]]
    _run(group_linear, group)
    for tensor, old in zip(leaves(group), before, strict=True):
        assert torch.equal(tensor, old)
    for site, old in zip(group[1], weights, strict=True):
        assert torch.equal(site.weight, old)


@pytest.mark.parametrize("name", ["single", "no_branch", "mixed_siblings", "two_sources"])
def test_outputs_can_be_changed_in_place(name):
    """A module such as nn.ReLU(inplace=True) after a linear layer does that."""
    group = GROUPS[name](Draw(torch.float64))

    def run(function):
        outputs = [y.mul_(2).relu_() for y in function(*group)]
        return torch.autograd.grad(sum(map(torch.sum, outputs)), leaves(group), allow_unused=True)

    for value, expected in zip(run(group_linear), run(spec.group_linear), strict=True):
        torch.testing.assert_close(value, expected)


def test_input_changed_after_the_forward_pass_is_noticed():
    x, sites, branches = GROUPS["single"](Draw(torch.float64))
    u = x * 1
    (y,) = group_linear(u, sites, branches)
    u.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_same_bits_again():
    group = GROUPS["mixed_siblings"](Draw(torch.float32))
    first, grads = _run(group_linear, group)
    second, _ = _run(group_linear, group, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_scale_as_tensor():
    x, sites, branches = GROUPS["single"](Draw(torch.float64))
    scaled = [Branch(b.site, b.a, b.b, torch.tensor(b.scale)) for b in branches]
    torch.testing.assert_close(
        group_linear(x, sites, scaled)[0], group_linear(x, sites, branches)[0]
    )


@pytest.mark.parametrize("name", ["single", "mixed_siblings"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_do_not_hold_the_stack(name, dtype):
    """A's gradients come from one product for the group, but each owns its memory."""
    group = GROUPS[name](Draw(dtype))
    outputs = group_linear(*group)
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    for branch in group[2]:
        for factor in (branch.a, branch.b):
            assert factor.grad.untyped_storage().nbytes() == factor.numel() * factor.itemsize


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.float32, 1 + 3 + 17), (torch.bfloat16, 16 + 16 + 32), (torch.float16, 16 + 16 + 32)],
)
def test_ranks_are_padded_where_a_cpu_compiles_products_for_their_sizes(dtype, columns):
    draw, ranks = Draw(dtype), (1, 3, 17, 0)
    a = [draw.tensor(rank, 24) for rank in ranks]
    b = [draw.tensor(40, rank) for rank in ranks]
    x, weight = draw.tensor(5, 24), draw.tensor(40, 24, grad=False)
    first, none = [0] * len(ranks), [0.0] * len(ranks)
    _, s = torch.ops.heterolora.group_linear(
        [x], [weight], [None], a, b, None, [1.0] * len(ranks), first, first, none, "aten"
    )
    assert s.shape == (5, columns)
    assert (s != 0).any(dim=0).sum() == sum(ranks)
