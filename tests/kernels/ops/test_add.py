"""`low_rank_add` against the specification; in place where that is right, a copy elsewhere."""

import pytest
import torch
from helpers import CountOps, error
from torch.nn.functional import linear

from heterolora.kernels import Branch, low_rank_add, spec
from heterolora.verify.groups import GROUPS, Draw

pytestmark = pytest.mark.usefixtures("poisoned")

OP, BACKWARD = "heterolora::low_rank_add_", "heterolora::group_linear_backward"
WITH_BRANCHES = [name for name in GROUPS if name != "no_branch"]


def _bases(group, dtype=None):
    """What the base layers would have returned, each with a graph of its own."""
    x, sites, _ = group
    dtype = dtype or x.dtype
    inputs = [
        torch.randn(*x.shape[:-1], site.weight.shape[0], dtype=dtype, requires_grad=True)
        for site in sites
    ]
    # A copy each time: what the op writes to must not be seen by the next call.
    return inputs, lambda: [y * 1 for y in inputs]


def _leaves(group):
    x, _, branches = group
    found = [x, *(t for b in branches for t in (b.a, b.b, b.source) if t is not None)]
    return list(dict.fromkeys(found))


def _run(function, outputs, group, inputs, grads, **options):
    x, _, branches = group
    results = function(outputs, x, branches, **options)
    leaves = [*inputs, *_leaves(group)]
    found = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
    return [*results, *found]


def _cast(group, dtype):
    x, sites, branches = group
    seen = {}

    def get(t):
        if t is not None and t not in seen:
            seen[t] = t.detach().to(dtype).requires_grad_(t.requires_grad)
        return seen.get(t)

    rest = [
        Branch(b.site, get(b.a), get(b.b), b.scale, get(b.source), get(b.mask)) for b in branches
    ]
    return get(x), sites, rest


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_against_spec(name, dtype):
    group = GROUPS[name](Draw(dtype))
    inputs, outputs = _bases(group)
    grads = [torch.randn_like(y) for y in inputs]
    with CountOps() as ops:
        values = _run(low_rank_add, outputs(), group, inputs, grads)
    expected = name != "no_branch"
    assert (ops.counts[OP], ops.counts[BACKWARD]) == (expected, expected)
    truth = _run(spec.low_rank_add, outputs(), group, inputs, grads)
    for value, other in zip(values, truth, strict=True):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("name", WITH_BRANCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", ["same", "float32"])
def test_low_precision_within_twice_eager(name, dtype, factors):
    """Eager: the same formula op by op in the low precision, adapters included."""
    group = GROUPS[name](Draw(dtype, torch.float32 if factors == "float32" else None))
    inputs, outputs = _bases(group)
    grads = [torch.randn_like(y) for y in inputs]
    values = _run(low_rank_add, outputs(), group, inputs, grads)
    for tensor, value in zip([*inputs, *inputs, *_leaves(group)], values, strict=True):
        assert value.dtype == tensor.dtype
    exact, same = _cast(group, torch.float64), _cast(group, dtype)
    doubles = [y.detach().double().requires_grad_() for y in inputs]
    truth = _run(
        spec.low_rank_add, [y * 1 for y in doubles], exact, doubles, [g.double() for g in grads]
    )
    eager = _run(spec.low_rank_add, outputs(), same, inputs, grads)
    for value, other, true in zip(values, eager, truth, strict=True):
        if true.numel():
            # One rounding of the result is allowed even where eager happens to be exact.
            assert error(value, true) <= max(2 * error(other, true), torch.finfo(dtype).eps)


def test_dropout_takes_the_masks_of_the_specification():
    draw = Draw(torch.float64)
    seed = torch.tensor(0x1234_5678_9ABC_DEF0)
    branches = [draw.branch(0, 3, 7, 4, dropout=0.5), draw.branch(1, 2, 7, 6, dropout=0.1)]
    group = draw.tensor(2, 3, 7), [draw.site(4, 7), draw.site(6, 7)], branches
    inputs, outputs = _bases(group)
    grads = [torch.randn_like(y) for y in inputs]
    values = _run(low_rank_add, outputs(), group, inputs, grads, seed=seed)
    truth = _run(spec.low_rank_add, outputs(), group, inputs, grads, seed=seed)
    for value, other in zip(values, truth, strict=True):
        torch.testing.assert_close(value, other)
    other = _run(low_rank_add, outputs(), group, inputs, grads, seed=seed + 1)
    assert not torch.allclose(other[0], values[0])
    with pytest.raises(ValueError, match="needs a seed"):
        low_rank_add(outputs(), group[0], branches)


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources"])
def test_prunes_what_is_not_needed(name):
    """Each tensor alone, and results that nothing depends on."""
    group = GROUPS[name](Draw(torch.float64))
    inputs, outputs = _bases(group)
    leaves = [*inputs, *_leaves(group)]
    truth = spec.low_rank_add(outputs(), group[0], group[2])
    weights = [torch.randn_like(y) for y in truth]
    for keep in leaves:
        for leaf in leaves:
            leaf.requires_grad_(leaf is keep)
        for used, weight in enumerate(weights):
            found, expected = (
                torch.autograd.grad(
                    (function(outputs(), group[0], group[2])[used] * weight).sum(),
                    [keep],
                    materialize_grads=True,
                )
                if function(outputs(), group[0], group[2])[used].requires_grad
                else (torch.zeros_like(keep),)
                for function in (low_rank_add, spec.low_rank_add)
            )
            torch.testing.assert_close(found[0], expected[0])


def _small(shape=(5,), dtype=torch.float32):
    a = torch.randn(2, 7, dtype=dtype, requires_grad=True)
    b = torch.randn(4, 2, dtype=dtype, requires_grad=True)
    return torch.randn(*shape, 7, dtype=dtype, requires_grad=True), [Branch(0, a, b, 0.5)]


class _Keeps(torch.autograd.Function):
    """Its backward pass needs what it returned."""

    @staticmethod
    def forward(ctx, t):
        y = t.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class _KeepsNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t):
        return t * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class _Tripled(torch.autograd.Function):
    """Returns its input, so that autograd takes the result for a view of it."""

    @staticmethod
    def forward(ctx, t):
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


EYE, ONES = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
IN_PLACE = {
    "linear, 2-D": lambda t: linear(t, EYE, ONES),
    "linear, 3-D, a view of the product": lambda t: linear(t.view(1, 5, 4), EYE, ONES),
    "linear without bias, 3-D": lambda t: linear(t.view(1, 5, 4), EYE),
    "sum": lambda t: t + 1,
    "function that saves nothing": _KeepsNothing.apply,
    "without gradient": lambda t: t.detach() * 2,
}
COPIED = {
    "leaf": lambda t: t,
    "part of a larger tensor": lambda t: (torch.cat([t, t], -1))[:, 4:],
    "a view of a flat tensor": lambda t: (t * 1).flatten().clone().view(5, 4),
    "transposed": lambda t: (t * 1).t().contiguous().t(),
    "expanded": lambda t: (t[:1] * 1).expand(5, 4),
    "kept by sigmoid": torch.sigmoid,
    "kept by softmax": lambda t: torch.softmax(t, -1),
    "kept by a function": _Keeps.apply,
    "a view with a backward of its own": lambda t: _Tripled.apply(t * 1),
    "a view of such a view": lambda t: _Tripled.apply(t * 1).view(5, 4),
    "chunk": lambda t: torch.cat([t, t]).chunk(2)[0],
}


@pytest.mark.parametrize("name", [*IN_PLACE, *COPIED])
def test_in_place_where_that_is_right(name):
    make = {**IN_PLACE, **COPIED}[name]
    shape = (1, 5) if "3-D" in name else (5,)
    x, branches = _small(shape, torch.float64)
    t = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y, twin = make(t), make(t)
    before, memory = y.detach().clone(), y.untyped_storage().data_ptr()
    (found,) = low_rank_add([y], x, branches)
    (expected,) = spec.low_rank_add([twin], x, branches)
    assert (found.untyped_storage().data_ptr() == memory) == (name in IN_PLACE)
    assert torch.equal(y.detach(), before) == (name in COPIED)
    torch.testing.assert_close(found, expected)
    leaves = [x, branches[0].a, branches[0].b, t]
    grad = torch.randn_like(found)
    values = torch.autograd.grad(found, leaves, grad, materialize_grads=True)
    truth = torch.autograd.grad(expected, leaves, grad, materialize_grads=True)
    for value, other in zip(values, truth, strict=True):
        torch.testing.assert_close(value, other)


def test_memory_of_sources_and_of_other_outputs_is_left_alone():
    x, _ = _small()
    square = [Branch(0, torch.randn(2, 7), torch.randn(7, 2))]
    with torch.no_grad():
        value = x.clone()
        (y,) = low_rank_add([x], x, square)
        assert torch.equal(x, value) and not torch.equal(y, value)
        shared = torch.randn(5, 7)
        both = [*square, Branch(1, torch.randn(3, 7), torch.randn(7, 3))]
        expected = spec.low_rank_add([shared, shared], x, both)
        for found, other in zip(low_rank_add([shared, shared], x, both), expected, strict=True):
            torch.testing.assert_close(found, other)
        u = torch.randn(5, 4)
        value = u.clone()
        branch = Branch(0, torch.randn(2, 4), torch.randn(4, 2), source=u, mask=torch.ones(5, 4))
        low_rank_add([u], x, [branch])
        assert torch.equal(u, value)


def test_inference_tensors():
    x, branches = _small()
    with torch.inference_mode():
        inside = torch.randn(5, 4)
        memory = inside.data_ptr()
        expected = spec.low_rank_add([inside], x, branches)[0].clone()
        (y,) = low_rank_add([inside], x, branches)
        assert y.data_ptr() == memory
        torch.testing.assert_close(y, expected)
        outside = torch.randn(5, 4)
    value = outside.clone()
    (y,) = low_rank_add([outside], x, branches)
    y.sum().backward()
    assert torch.equal(outside, value) and branches[0].a.grad is not None


def test_autograd_notices_the_change():
    """The version counter moves, so whoever kept the output for a backward pass is told."""
    x, branches = _small()
    t = torch.randn(5, 4, requires_grad=True)
    y = t * 1
    square = y * y
    version = y._version
    (z,) = low_rank_add([y], x, branches)
    assert z is y and y._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    with torch.no_grad():
        y = t * 1
        low_rank_add([y], x, branches)
        assert y._version > 0


def test_results_can_be_changed_in_place():
    x, branches = _small((1, 5), torch.float64)
    t = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(function):
        y = linear(t, torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        (z,) = function([y], x, branches)
        return torch.autograd.grad(z.mul_(2).relu_().sum(), [t, x, branches[0].a, branches[0].b])

    for value, other in zip(run(low_rank_add), run(spec.low_rank_add), strict=True):
        torch.testing.assert_close(value, other)


def test_outputs_decide_the_dtype():
    for dtype, x_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        x, branches = _small()
        x = x.detach().to(x_dtype).requires_grad_()
        y = torch.randn(5, 4, dtype=dtype)
        (expected,) = spec.low_rank_add(
            [y.double()], x.double(), _cast((x, [], branches), torch.float64)[2]
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (found,) = low_rank_add([y], x, branches)
        assert found.dtype == dtype
        assert error(found, expected) < (0.02 if dtype == torch.bfloat16 else 1e-6)
        found.sum().backward()
        assert x.grad.dtype == x_dtype and branches[0].a.grad.dtype == torch.float32


def test_rank_zero_alone_runs_nothing():
    x, _ = _small()
    y = torch.randn(5, 4)
    with CountOps() as ops:
        (z,) = low_rank_add([y], x, [Branch(0, torch.randn(0, 7), torch.randn(4, 0))])
    assert z is y and ops.counts[OP] == 0


def test_saves_the_source_once_and_s():
    x, _, branches = GROUPS["mixed_siblings"](Draw(torch.float32))
    outputs = [torch.randn(2, 3, b.b.shape[0]) for b in branches]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_add(outputs, x, branches)
    known = [factor for branch in branches for factor in (branch.a, branch.b)]
    rest = [t for t in saved if not any(t is k for k in known)]
    total = sum(b.a.shape[0] for b in branches)
    assert sorted(tuple(t.shape) for t in rest) == [(2, 3, 7), (6, total)]


def test_double_backward_is_refused():
    x, branches = _small()
    (y,) = low_rank_add([torch.randn(5, 4)], x, branches)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), [branches[0].a], create_graph=True)
