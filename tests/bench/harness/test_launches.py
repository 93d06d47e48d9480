"""The launch counter on steps whose operators are known."""

import pytest
import torch

from heterolora.bench.cases import groups, peers
from heterolora.bench.harness import steps
from heterolora.bench.harness.launches import launches

CPU = torch.device("cpu")
X = torch.randn(8, 16)
W = torch.randn(4, 16)
BIAS = torch.randn(4)
SITES = {"q_proj": 16, "k_proj": 8, "v_proj": 8}


@pytest.mark.parametrize(
    ("count", "step"),
    [
        (1, lambda: torch.addmm(BIAS, X, W.t())),
        (1, lambda: torch.nn.functional.linear(X, W, BIAS)),
        (1, lambda: torch.nn.functional.linear(X, W)),
        (1, lambda: torch.nn.functional.linear(X.view(2, 4, 16), W)),
        (1, lambda: X @ W.t()),
        (2, lambda: (X @ W.t()).add_(BIAS)),
        (1, lambda: X.to(torch.bfloat16)),
        (1, lambda: X.t().contiguous()),
        (1, lambda: X.t().reshape(-1)),
        (1, lambda: torch.zeros(3)),
        (1, lambda: torch.cat([X, X])),
        (1, lambda: torch.nn.functional.gelu(X)),
    ],
)
def test_one_for_each_pass_over_memory(count, step):
    assert launches(step, CPU) == count


@pytest.mark.parametrize(
    "step",
    [
        lambda: None,
        lambda: (X.t(), X.view(-1), X[1:3], X.unsqueeze(0).expand(3, 8, 16), X.split(4)),
        lambda: (X.detach(), X.permute(1, 0).transpose(0, 1), X.unflatten(1, (4, 4)).flatten(1)),
        lambda: (torch.empty(3), torch.empty_like(X), X.new_empty(2)),
        lambda: (X.to(torch.float32), X.contiguous(), X.reshape(4, 32), X.float()),
        lambda: torch.nn.functional.dropout(X, 0.0, training=True),
        lambda: torch.nn.functional.dropout(X, 0.5, training=False),
    ],
)
def test_what_moves_no_data_is_free(step):
    assert launches(step, CPU) == 0


def test_a_frozen_linear_is_one_forward_and_one_backward():
    x, dy = X.clone().requires_grad_(), torch.randn(8, 4)

    def step() -> None:
        x.grad = None
        torch.nn.functional.linear(x, W).backward(dy)

    assert launches(step, CPU) == 2


def built(variant: str, repeats: int = 1, dtype: torch.dtype = torch.float32) -> steps.Step:
    load = groups.group(m=8, k=32, sites=SITES, repeats=repeats, dtype=dtype, device=CPU)
    step = peers.build_step(variant, load, steps.uniform_ranks(load.targets, 4))
    step()
    return step


@pytest.mark.parametrize("repeats", [1, 3])
def test_groups_of_known_operators(repeats):
    # Y and dX of each site, and the sum of three dX.
    assert launches(built("base-only", repeats), CPU) == repeats * (3 + 3 + 2)
    # A site: Y, S, low-rank product, scale, sum; backward scale, dB, dS, dA, two dX; six dX summed.
    assert launches(built("peft", repeats), CPU) == repeats * (3 * 5 + 3 * 6 + 5)


def test_casts_of_bf16_are_seen():
    low, cast = (launches(built(name, dtype=torch.bfloat16), CPU) for name in ("peft-lowp", "peft"))
    assert low == 3 * 5 + 3 * 6 + 5
    # A site: x to float32, the product back; backward dY to float32, dX back.
    assert cast > low + 3 * 2


def test_a_fused_group_launches_fewer_than_peft_in_bf16():
    fused, peft = (launches(built(name, dtype=torch.bfloat16), CPU) for name in ("aten", "peft"))
    floor = launches(built("base-only", dtype=torch.bfloat16), CPU)
    assert floor < fused < peft
