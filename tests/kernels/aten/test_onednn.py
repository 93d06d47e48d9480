"""The base matmul by oneDNN: as exact as by BLAS, and really taken."""

import pytest
import torch
from helpers import error

from heterolora.kernels import Branch, Site, group_linear, spec
from heterolora.kernels.aten import onednn

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN"
    ),
]
M, K = 96, 160


@pytest.fixture
def forced(monkeypatch):
    """oneDNN for every size on every processor; counts its products."""
    calls = []
    for name in ("linear", "matmul", "add_matmul"):
        plain = getattr(onednn, name)

        def counted(*args, name=name, plain=plain):
            calls.append(name)
            return plain(*args)

        monkeypatch.setattr(onednn, name, counted)
    monkeypatch.setattr(onednn, "_SMALLEST", 0)
    monkeypatch.setattr(onednn, "_faster_here", lambda: True)
    return calls


def _group(x, *, ns=(64, 33, 17), ranks=(4, 0, 3), transposed=False, bias=True):
    torch.manual_seed(1)
    sites, branches = [], []
    for i, (n, r) in enumerate(zip(ns, ranks, strict=True)):
        weight = torch.randn(K, n).t() if transposed else torch.randn(n, K)
        sites.append(Site(weight, torch.randn(n).requires_grad_() if bias else None))
        if r:
            a, b = torch.randn(r, K).requires_grad_(), torch.randn(n, r).requires_grad_()
            branches.append(Branch(i, a, b, 0.5))
    return x, sites, branches


def _run(function, x, sites, branches, grads):
    outputs = function(x, sites, branches)
    leaves = [x, *(s.bias for s in sites if s.bias is not None)]
    leaves += [factor for branch in branches for factor in (branch.a, branch.b)]
    used = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None]
    ys, gs = zip(*used, strict=True)
    return [*outputs, *torch.autograd.grad(ys, leaves, gs, allow_unused=True, retain_graph=True)]


def _double(x, sites, branches):
    def wide(t):
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    return (
        wide(x),
        [Site(wide(s.weight), wide(s.bias)) for s in sites],
        [Branch(b.site, wide(b.a), wide(b.b), b.scale) for b in branches],
    )


INPUTS = {
    "plain": lambda: torch.randn(M, K),
    "three_dims": lambda: torch.randn(2, M // 2, K),
    "column_major": lambda: torch.randn(K, M).t(),
    "every_other_row": lambda: torch.randn(2 * M, K)[::2],
    "one_row": lambda: torch.randn(1, K),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_at_most_twice_the_error_of_blas(forced, monkeypatch, kind, transposed, bias):
    torch.manual_seed(0)
    x = INPUTS[kind]().requires_grad_()
    group = _group(x, transposed=transposed, bias=bias)
    grads = [torch.randn(*x.shape[:-1], s.weight.shape[0]) for s in group[1]]
    values = _run(group_linear, *group, grads)
    assert forced == ["linear"] * 3 + ["matmul"] + ["add_matmul"] * 2
    monkeypatch.setattr(onednn, "_faster_here", lambda: False)
    plain = _run(group_linear, *group, grads)
    assert len(forced) == 6
    truth = _run(spec.group_linear, *_double(*group), [g.double() for g in grads])
    for value, other, expected in zip(values, plain, truth, strict=True):
        bound = max(2 * error(other, expected), torch.finfo(torch.float32).eps)
        assert error(value, expected) <= bound
        assert value.is_contiguous()


def test_an_output_that_nothing_depends_on_costs_no_product(forced):
    x = torch.randn(M, K).requires_grad_()
    group = _group(x)
    grads = [torch.randn(M, 64), None, torch.randn(M, 17)]
    _run(group_linear, *group, grads)
    assert forced == ["linear"] * 3 + ["matmul", "add_matmul"]


def test_outputs_can_be_changed_in_place(forced):
    x = torch.randn(2, M, K).requires_grad_()
    y, *_ = group_linear(*_group(x))
    assert forced
    y.mul_(2).sum().backward()
    assert x.grad is not None


def test_bf16_and_small_products_stay_with_blas(monkeypatch):
    monkeypatch.setattr(onednn, "_faster_here", lambda: True)
    weight = torch.randn(1024, 1024)
    assert onednn.preferred(torch.randn(64, 1024), weight)
    assert not onednn.preferred(torch.randn(2, 1024), weight)
    assert not onednn.preferred(torch.randn(64, 1024).bfloat16(), weight.bfloat16())
    assert not onednn.preferred(torch.randn(64, 1024, device="meta"), weight)
    assert not onednn.preferred(torch.randn(64, 1024), weight[:, ::2])


@pytest.mark.parametrize(
    ("vendor", "capability", "taken"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_only_where_it_was_measured_to_be_faster(monkeypatch, vendor, capability, taken):
    monkeypatch.setattr(onednn, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert onednn._faster_here.__wrapped__() is taken
