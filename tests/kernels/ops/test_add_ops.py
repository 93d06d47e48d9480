"""`low_rank_add` as torch sees it: opcheck, compilers, and what is refused."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import linear

from heterolora.kernels import Branch, low_rank_add
from heterolora.verify.groups import GROUPS, Draw


def _read(group):
    x, _, branches = group
    found = [x, *(t for b in branches for t in (b.a, b.b, b.source) if t is not None)]
    return list(dict.fromkeys(found))


def _arguments(group):
    x, sites, branches = group
    sources = list(dict.fromkeys([x, *(b.source for b in branches if b.source is not None)]))
    position = {id(source): i for i, source in enumerate(sources)}
    return (
        [torch.randn(*x.shape[:-1], site.weight.shape[0], dtype=x.dtype) for site in sites],
        sources,
        [],
        [],
        [b.a for b in branches],
        [b.b for b in branches],
        None,
        [float(b.scale) for b in branches],
        [b.site for b in branches],
        [0 if b.source is None else position[id(b.source)] for b in branches],
        [0.0 for _ in branches],
        "aten",
    )


@pytest.mark.parametrize("name", ["single", "mixed_siblings", "two_sources", "no_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype):
    group = GROUPS[name](Draw(dtype, torch.float32))
    tolerance = 1e-2 if dtype == torch.bfloat16 else None
    results = torch.library.opcheck(
        torch.ops.heterolora.low_rank_add_.default,
        _arguments(group),
        atol=tolerance,
        rtol=tolerance,
    )
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources"])
def test_opcheck_backward_without_base_weights(name):
    outputs, sources, _, _, a, b, *rest = _arguments(GROUPS[name](Draw(torch.float32)))
    sources, a, b = ([t.detach() for t in part] for part in (sources, a, b))
    s = torch.randn(sources[0].shape[:-1].numel(), sum(f.shape[0] for f in a))
    needs = [True] * (len(sources) + 2 * len(a))
    torch.library.opcheck(
        torch.ops.heterolora.group_linear_backward.default,
        ([torch.randn_like(y) for y in outputs], s, needs, sources, [], [], a, b, *rest),
    )


@pytest.mark.parametrize("name", ["mixed_siblings", "two_sources", "dropout"])
def test_compiles_as_one_node(name):
    group = GROUPS[name](Draw(torch.float32))
    x, sites, branches = group
    weights = [torch.randn(site.weight.shape[0], x.shape[-1], requires_grad=True) for site in sites]
    graphs = []

    def record(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def function(x, weights, branches):
        return low_rank_add([linear(x, weight) for weight in weights], x, branches)

    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    expected = function(x, weights, branches)
    ones = [torch.ones_like(y) for y in expected]
    leaves = [*weights, *_read(group)]
    truth = torch.autograd.grad(expected, leaves, ones)
    outputs = compiled(x, weights, branches)
    grads = torch.autograd.grad(outputs, leaves, ones)
    targets = [str(n.target) + str(n.args[:1]) for g in graphs for n in g.graph.nodes]
    ours = [target for target in targets if "heterolora" in target]
    assert len(ours) == 2 and "low_rank_add_" in ours[0] and "group_linear_backward" in ours[1]
    for value, other in zip([*outputs, *grads], [*expected, *truth], strict=True):
        torch.testing.assert_close(value, other)


def test_inductor():
    x = torch.randn(2, 5, 7, requires_grad=True)
    branches = [Branch(0, torch.randn(2, 7), torch.randn(4, 2), 0.5)]
    weight, bias = torch.randn(4, 7), torch.randn(4)

    def function(x):
        return low_rank_add([linear(x, weight, bias)], x, branches)[0].relu()

    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), function(x))


@pytest.mark.parametrize(
    ("outputs", "x", "branches", "message"),
    [
        ([], torch.randn(3, 7), [], "at least one output"),
        ([torch.randn(2, 4)], torch.randn(3, 7), [], "before the last dim"),
        ([torch.ones(3, 4, dtype=torch.int8)], torch.randn(3, 7), [], "float dtype"),
        ([torch.randn(3, 4), torch.randn(3, 4).half()], torch.randn(3, 7), [], "output 1"),
        ([torch.randn(3, 4, device="meta")], torch.randn(3, 7), [], "on meta"),
        ([torch.randn(3, 4)], torch.ones(3, 7, dtype=torch.int64), [], "x must be a float tensor"),
        ([torch.randn(3, 4)], torch.randn(3, 7), [(1, 7, 4)], "no output 1 among 1"),
        ([torch.randn(3, 4)], torch.randn(3, 7), [(0, 6, 4)], r"not \[r, 7\]"),
        ([torch.randn(3, 4)], torch.randn(3, 7), [(0, 7, 5)], r"and \[4, r\]"),
    ],
)
def test_refuses(outputs, x, branches, message):
    branches = [Branch(site, torch.randn(2, k), torch.randn(n, 2)) for site, k, n in branches]
    with pytest.raises(ValueError, match=message):
        low_rank_add(outputs, x, branches)
