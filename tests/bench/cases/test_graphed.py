"""The graph variants: what they are, and that a replay is an eager step, simulated on a CPU."""

import pytest
import torch
from recorder import CpuRecorder

from heterolora.bench.cases import groups, peers
from heterolora.bench.cases import registry as cases
from heterolora.bench.cases.graphed import GraphedStep
from heterolora.bench.harness import steps
from heterolora.train.cuda_graphs import WARM_UP

CPU = torch.device("cpu")
TINY = "tiny-4x16-fp32-mixed"


def _load(name):
    if name == "group":
        sites = {"q_proj": 16, "k_proj": 8, "v_proj": 8}
        return groups.group(m=8, k=32, sites=sites, repeats=2, dtype=torch.float32, device=CPU)
    case = cases.CASES[TINY]
    return case.build(case.torch_dtype, CPU)


@pytest.mark.parametrize("name", ["group", "model"])
@pytest.mark.parametrize("variant", peers.GRAPHED)
def test_replays_are_eager_steps(variant, name):
    load = _load(name)
    ranks = steps.mixed_ranks(load.targets)
    # Both are built for a capture, so that the fused path chooses alike.
    eager, graphed = (peers.build_step(variant, steps.twin(load), ranks) for _ in range(2))
    assert isinstance(graphed, GraphedStep)
    graphed.recorder = recorder = CpuRecorder()
    for _ in range(3):
        graphed()
    for _ in range(WARM_UP + 3):
        steps.Step.__call__(eager)
    assert (recorder.warm_ups, recorder.recordings) == (WARM_UP, 1)
    for one, other in zip(eager.tensors(), graphed.tensors(), strict=True):
        assert torch.equal(one, other)
    grads = [
        [t.grad for t in (*step.module.parameters(), *step.inputs.values()) if t.grad is not None]
        for step in (eager, graphed)
    ]
    assert grads[0] and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    if graphed.optimizer is not None:
        counts = {float(state["step"]) for state in graphed.optimizer.state.values()}
        assert counts == {float(WARM_UP + 3)}
    # Its memory stays its own when gradients are cleared, as the memory measurement does.
    graphed.clear_gradients()
    graphed()
    steps.Step.__call__(eager)
    assert all(torch.equal(a, b) for a, b in zip(eager.tensors(), graphed.tensors(), strict=True))


def test_a_cpu_has_no_graph_variants():
    load = _load("group")
    for variant in peers.GRAPHED:
        assert variant in peers.VARIANTS and variant not in peers.COMPILED
        reason = peers.unavailable(variant, load, {}, CPU)
        assert reason == "CUDA graphs need a GPU"
        assert peers.unavailable(variant, load, {}, torch.device("cuda")) is None
