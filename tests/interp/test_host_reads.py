"""The launchers read nothing on the host, so that a CUDA graph can capture them."""

import pytest
import torch

from heterolora.kernels.buckets import bucket_layout
from heterolora.kernels.gpu import passes as fused
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
    layout = bucket_layout(RANKS, (0, 1, 2), (0, 0, 0), (bool(dropout),) * 3, sites=3)
    common = [2.0, 1.0, 0.5], layout, [dropout] * 3
    seed = torch.tensor(5) if dropout else None
    needs = [True] * (1 + len(weights) + len(a) + len(b))
    grads = [torch.randn(m, n) for n in NS]
    with NoHostReads("cpu"):
        if own_base:
            outputs = [torch.zeros(m, n) for n in NS]
            s = fused.low_rank_add(outputs, [x], a, b, *common, seed)
        else:
            outputs, s = fused.group_linear([x], weights, [None] * 3, a, b, *common, seed)
        found = fused.group_linear_backward(grads, [x], weights, a, b, s, *common, seed, needs)
    assert sum(launches.values()) >= 9
    assert all(value.isfinite().all() for value in (*outputs, *found))
