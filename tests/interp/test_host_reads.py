"""The launchers read nothing on the host, so that a CUDA graph can capture them."""

import pytest
import torch

from heterolora.kernels.gpu import passes
from heterolora.kernels.group import Call
from heterolora.train.cuda_graphs import NoHostReads

RANKS = (3, 0, 33)
NS = (64, 40, 16)


@pytest.mark.quick
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("own_base", [False, True])
def test_forward_and_backward_read_nothing_on_the_host(own_base, dropout, launches):
    m, k = 45, 48
    x = torch.randn(m, k)
    weights = [] if own_base else [torch.randn(n, k) for n in NS]
    a = [torch.randn(r, k) for r in RANKS]
    b = [torch.randn(n, r) for n, r in zip(NS, RANKS, strict=True)]
    call = Call(
        sources=[x],
        weights=weights,
        biases=[None] * len(weights),
        a=a,
        b=b,
        seed=torch.tensor(5) if dropout else None,
        scales=[2.0, 1.0, 0.5],
        branch_site=[0, 1, 2],
        branch_source=[0, 0, 0],
        dropout=[dropout] * 3,
        implementation="triton",
    )
    needs = [True] * (1 + len(weights) + len(a) + len(b))
    grads = [torch.randn(m, n) for n in NS]
    with NoHostReads("cpu"):
        if own_base:
            outputs = [torch.zeros(m, n) for n in NS]
            s = passes.low_rank_add(call, outputs)
        else:
            outputs, s = passes.group_linear(call)
        found = passes.group_linear_backward(call, grads, s, needs)
    assert sum(launches.values()) >= 9
    assert all(value.isfinite().all() for value in (*outputs, *found))
