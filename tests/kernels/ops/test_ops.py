"""The op as torch sees it: opcheck, compilers, autocast, what is saved, and what is refused."""

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import error
from torch._dynamo.backends.common import aot_autograd

from heterolora.kernels import Branch, Site, group_linear, spec
from heterolora.verify.groups import GROUPS, Draw, leaves


def _arguments(group):
    x, sites, branches = group
    sources = [x]
    for branch in branches:
        if branch.source is not None and all(branch.source is not s for s in sources):
            sources.append(branch.source)
    position = {id(s): i for i, s in enumerate(sources)}
    return (
        sources,
        [s.weight for s in sites],
        [s.bias for s in sites],
        [b.a for b in branches],
        [b.b for b in branches],
        None,
        [float(b.scale) for b in branches],
        [b.site for b in branches],
        [0 if b.source is None else position[id(b.source)] for b in branches],
        [0.0 for _ in branches],
        "aten",
    )


@pytest.mark.parametrize(
    "name", ["single", "no_branch", "mixed_siblings", "two_sources", "transposed_weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    group = GROUPS[name](Draw(dtype, torch.float32))
    results = torch.library.opcheck(
        torch.ops.heterolora.group_linear.default,
        _arguments(group),
        atol=1e-2 if dtype == torch.bfloat16 else None,
        rtol=1e-2 if dtype == torch.bfloat16 else None,
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["mixed_siblings", "strided_input"])
def test_opcheck_backward(name):
    sources, weights, _, a, b, *rest = _arguments(GROUPS[name](Draw(torch.float32)))
    sources, a, b = ([t.detach() for t in group] for group in (sources, a, b))
    rows = sources[0].shape[:-1].numel()
    s = torch.randn(rows, sum(f.shape[0] for f in a))
    grads = [torch.randn(*sources[0].shape[:-1], w.shape[0]) for w in weights]
    for missing in (False, True):
        some = [None if missing and i == 0 else g for i, g in enumerate(grads)]
        needs = [True] * (len(sources) + len(weights) + 2 * len(a))
        torch.library.opcheck(
            torch.ops.heterolora.group_linear_backward.default,
            (some, s, needs, sources, weights, [], a, b, *rest),
        )


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources", "dropout"])
def test_compiles_as_one_node(name):
    group = GROUPS[name](Draw(torch.float32))
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled = torch.compile(group_linear, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    expected = group_linear(*group)
    ones = [torch.ones_like(y) for y in expected]
    outputs = compiled(*group)
    grads = torch.autograd.grad(outputs, leaves(group), ones)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    ours = [target for target in targets if target.startswith("heterolora")]
    assert ours == ["heterolora.group_linear.default", "heterolora.group_linear_backward.default"]
    truth = torch.autograd.grad(expected, leaves(group), ones)
    for value, other in zip([*outputs, *grads], [*expected, *truth], strict=True):
        torch.testing.assert_close(value, other)


def test_a_new_number_of_rows_compiles_once_more_at_most():
    _, sites, branches = GROUPS["mixed_siblings"](Draw(torch.float32))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(group_linear, fullgraph=True, backend=counter)
    for rows in (4, 9, 17, 33):
        compiled(torch.randn(rows, 7), sites, branches)
    assert counter.frame_count <= 2


def test_autocast_is_that_of_linear():
    x, sites, branches = GROUPS["mixed_siblings"](Draw(torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = group_linear(x, sites, branches)
        plain = torch.nn.functional.linear(x, sites[0].weight)
    assert {y.dtype for y in outputs} == {plain.dtype} == {torch.bfloat16}
    truth = spec.group_linear(x, sites, branches)
    for y, expected in zip(outputs, truth, strict=True):
        assert error(y, expected) < 0.02
    grads = torch.autograd.grad(outputs, [x, branches[0].a], [torch.ones_like(y) for y in outputs])
    assert {g.dtype for g in grads} == {torch.float32}


def test_saves_x_once_and_s():
    x, sites, branches = GROUPS["mixed_siblings"](Draw(torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        group_linear(x, sites, branches)
    known = [site.weight for site in sites]
    known += [factor for branch in branches for factor in (branch.a, branch.b)]
    rest = [t for t in saved if not any(t is k for k in known)]
    rows, total = x.shape[:-1].numel(), sum(b.a.shape[0] for b in branches)
    assert sorted(tuple(t.shape) for t in rest) == sorted([tuple(x.shape), (rows, total)])
    assert any(t is x for t in rest)


def test_double_backward_is_refused():
    group = GROUPS["single"](Draw(torch.float64))
    (y,) = group_linear(*group)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), [group[2][0].a], create_graph=True)


def _site(n=4, k=7, dtype=torch.float32):
    return Site(torch.randn(n, k, dtype=dtype))


def _branch(site=0, r=2, k=7, n=4):
    return Branch(site, torch.randn(r, k), torch.randn(n, r))


@pytest.mark.parametrize(
    ("x", "sites", "branches", "message"),
    [
        (torch.randn(3, 7), [], [], "at least one site"),
        (torch.randn(3, 6), [_site()], [], "does not fit x"),
        (torch.randn(3, 7), [_site(dtype=torch.float64)], [], "must be torch.float32"),
        (torch.ones(3, 7, dtype=torch.int64), [_site()], [], "must be a float tensor"),
        (torch.randn(3, 7), [_site()], [_branch(site=1)], "no site 1 among 1"),
        (torch.randn(3, 7), [_site()], [_branch(k=6)], r"not \[r, 7\]"),
        (torch.randn(3, 7), [_site()], [_branch(n=5)], r"and \[4, r\]"),
        (torch.randn(3, 7), [Site(torch.randn(4, 7), torch.randn(3))], [], "bias"),
        (torch.randn(3, 7), [Site(torch.randn(4, 7, requires_grad=True))], [], "frozen"),
        (
            torch.randn(3, 7),
            [_site()],
            [Branch(0, torch.randn(2, 5), torch.randn(4, 2), source=torch.randn(4, 5))],
            "differs from x",
        ),
    ],
)
def test_refuses(x, sites, branches, message):
    with pytest.raises(ValueError, match=message):
        group_linear(x, sites, branches)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1 - 2**-18])
def test_dropout_of_less_than_nothing_or_everything_is_refused(p):
    x, sites, (branch,) = GROUPS["single"](Draw(torch.float32))
    dropped = Branch(0, branch.a, branch.b, dropout=p)
    with pytest.raises(ValueError, match="branch 0: dropout"):
        group_linear(x, sites, [dropped], seed=torch.tensor(1))


def test_backward_under_an_autocast_that_forward_was_not_under():
    group = GROUPS["mixed_siblings"](Draw(torch.float32))
    outputs = group_linear(*group)
    ones = [torch.ones_like(y) for y in outputs]
    truth = torch.autograd.grad(outputs, leaves(group), ones, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(outputs, leaves(group), ones)
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
