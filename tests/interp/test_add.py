"""`low_rank_add` and fused models on the Triton kernels, interpreted."""

import pytest
import torch
from helpers import CountOps, error
from peft import LoraConfig, get_peft_model
from quantised import added, quantise_bases
from torch import nn

import heterolora
from heterolora.kernels import low_rank_add, spec
from heterolora.verify.groups import GROUPS, SEEDED, Draw, dropout_seed

ALL = {name: make for name, make in {**GROUPS, **SEEDED}.items() if name != "no_branch"}
QUICK = {"mixed_siblings", "two_sources", "seeded_shortcut"}


def _run(function, outputs, group, leaves, grads, **options):
    results = function(outputs, group[0], group[2], **options)
    found = torch.autograd.grad(results, leaves, grads, materialize_grads=True)
    return [*results, *found]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.quick if n in QUICK else ()) for n in ALL]
)
def test_against_spec(name, launches):
    group = x, sites, branches = ALL[name](Draw(torch.float32))
    seed = dropout_seed() if name in SEEDED else None
    inputs = [
        torch.randn(*x.shape[:-1], site.weight.shape[0], requires_grad=True) for site in sites
    ]
    parts = [t for b in branches for t in (b.a, b.b, b.source) if t is not None]
    leaves = list(dict.fromkeys([*inputs, x, *parts]))
    grads = [torch.randn_like(y) for y in inputs]
    options = {"seed": seed, "implementation": "triton"}
    outputs = [y * 1 for y in inputs]
    memory = [y.data_ptr() for y in outputs]
    values = _run(low_rank_add, outputs, group, leaves, grads, **options)
    assert x.numel() == 0 or launches["pack_kernel"] == 2, "forward and backward"
    assert [y.data_ptr() for y in values[: len(sites)]] == memory
    truth = _run(spec.low_rank_add, inputs, group, leaves, grads, seed=seed)
    for value, expected in zip(values, truth, strict=True):
        torch.testing.assert_close(value, expected)


class Net(nn.Module):
    """Siblings over int8 weights, then a dense layer."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(24, 16), nn.Linear(24, 16)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        return self.out(self.left(x) * self.right(x))


def _step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), grads


@pytest.mark.quick
def test_a_model_with_dropout_and_both_kinds_of_base(launches):
    config = LoraConfig(
        r=5,
        rank_pattern={"left": 3},
        target_modules=["left", "right", "out"],
        lora_dropout=0.2,
        init_lora_weights=False,
    )
    model = get_peft_model(Net(), config)
    quantise_bases(model, only="left")
    quantise_bases(model, only="right")
    x = torch.randn(7, 24)
    report = heterolora.fuse(model, backend="triton", strict=True, example={"x": x})
    assert report.fused == {
        "left": "triton, own base matmul",
        "right": "triton, own base matmul",
        "out": "triton",
    }
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        launches.clear()
        with CountOps() as ops:
            results.append(_step(model, x))
        assert (ops.forward, *added(ops)) == (1, 1, 2)
        assert launches["pack_kernel"] == 4, "forward and backward of both calls"
    (y, grads), (again, repeated), (other, _) = results
    assert torch.equal(again, y) and not torch.equal(other, y)
    assert all(torch.equal(repeated[name], grad) for name, grad in grads.items())
    model.eval()
    fused, found = _step(model, x)
    heterolora.unfuse(model)
    plain, expected = _step(model, x)
    assert error(fused, plain) < 1e-5
    for name, grad in expected.items():
        assert error(found[name], grad) < 1e-5, name
