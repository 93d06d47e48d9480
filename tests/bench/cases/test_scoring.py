"""The scoring case: its gate, and what one pass of the search calls."""

import pytest
import torch

import heterolora
from heterolora.bench.cases import scoring
from heterolora.bench.cases.workloads import bert
from heterolora.bench.harness.parity import OpCalls
from heterolora.bench.harness.steps import twin, uniform_ranks
from heterolora.search.scores.gradients import branch_factors

LAYERS = 2
# q, k and v read one x; the attention output, up and down read one each.
GROUPS = 4 * LAYERS


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def load(request):
    sizes = {"layers": LAYERS, "hidden": 64, "ffn": 128, "heads": 2, "batch": 3, "length": 16}
    return bert(**sizes, dtype=request.param, device=torch.device("cpu"))


def built(load, proxy="grad-norm"):
    ranks = uniform_ranks(load.targets)
    return [scoring.build_step(name, twin(load), ranks, proxy=proxy) for name in ("peft", "fused")]


@pytest.mark.parametrize("proxy", ["grad-norm", "snip"])
def test_gate_is_green_and_the_scores_are_no_zeros(load, proxy):
    found = scoring.check_parity(*built(load, proxy))
    assert found.green, found.reason
    assert found.output is not None and found.gradient is not None
    plain, fused = (step.scores() for step in built(load, proxy))
    assert list(plain) == list(fused) == list(load.targets)
    assert min(plain.values()) > 0


@pytest.mark.parametrize("proxy", ["grad-norm", "snip"])
def test_one_pass_calls_each_op_once_a_group(load, proxy):
    _, fused = built(load, proxy)
    with OpCalls() as calls:
        fused()
    # The score op gives dX as well: a backward op beside it would compute dS a second time.
    assert calls.calls == {"group_linear": GROUPS, "group_score": GROUPS}
    assert calls.adapters["group_score"] == len(load.targets)


def test_the_plain_route_and_the_floor_use_none_of_our_ops(load):
    steps = {
        name: scoring.build_step(name, twin(load), uniform_ranks(load.targets))
        for name in ("peft", "base-only")
    }
    with OpCalls() as calls:
        for step in steps.values():
            step()
    assert not calls.calls
    assert not any(p.requires_grad for p in steps["base-only"].module.parameters())


def test_b_is_what_the_search_makes_it(load):
    for proxy in ("grad-norm", "snip"):
        for step in built(load, proxy):
            largest = max(b.abs().max().item() for _, b in branch_factors(step.module).values())
            assert (largest > 0) == (proxy == "snip")


def test_gate_is_red_when_the_op_did_not_measure(load):
    peft, fused = built(load)
    heterolora.unfuse(fused.module)
    layer = fused.module.get_base_model().get_submodule(next(iter(load.targets)))
    layer.base_layer.register_forward_hook(lambda *_: None)
    heterolora.fuse(fused.module, example=fused.inputs, backend="aten")
    found = scoring.check_parity(peft, fused)
    assert not found.green
    assert "11 of 12 candidates were measured by the op" in found.reason


@pytest.mark.parametrize("factor", [1.0, 1.2, float("nan")])
def test_gate_is_red_when_one_module_scores_differently(load, factor, monkeypatch):
    peft, fused = built(load)
    name, scores = next(iter(load.targets)), fused.scores
    monkeypatch.setattr(
        fused, "scores", lambda: {**(found := scores()), name: found[name] * factor}
    )
    found = scoring.check_parity(peft, fused)
    assert found.green == (factor == 1.0), found


def test_memory_meters_see_a_pass_that_scores(load):
    """`forward` alone is what saved bytes are measured with."""
    peft, fused = built(load)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        (loss,) = fused.forward()
    assert fused.module.__dict__["_heterolora"].runner is None
    loss.backward()
    assert all(f.grad is None for pair in branch_factors(fused.module).values() for f in pair)
    assert kept
