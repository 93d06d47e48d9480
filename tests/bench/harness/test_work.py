"""The least work of a step against operators and tensors that were counted."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heterolora.bench.cases import groups, peers, workloads
from heterolora.bench.harness import steps
from heterolora.bench.harness.work import Work, minimum

CPU = torch.device("cpu")
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 16}


def group(repeats: int = 6, dtype: torch.dtype = torch.float32) -> steps.Workload:
    return groups.group(m=19, k=32, sites=QKV, repeats=repeats, dtype=dtype, device=CPU)


def copies_of(load: steps.Workload) -> list[list[str]]:
    names = list(load.targets)
    return [names[i : i + 3] for i in range(0, len(names), 3)]


def counted_flops(step: steps.Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("allocation", [steps.uniform_ranks, steps.mixed_ranks, steps.sparse_ranks])
def test_flops_are_those_of_every_product(allocation):
    load = group()
    ranks = allocation(load.targets, 4)
    found = minimum(copies_of(load), load.targets, ranks, tokens=load.tokens, itemsize=4)
    peft = peers.build_step("peft", steps.twin(load), ranks)
    floor = peers.build_step("base-only", steps.twin(load), ranks)
    assert found.flops == counted_flops(peft)
    assert found.base_flops == counted_flops(floor)


def test_flops_of_a_stack_of_linears():
    load = workloads.linear_stack(
        layers=2, hidden=32, ffn=64, batch=2, length=8, dtype=torch.float32, device=CPU
    )
    found = minimum(
        [[name] for name in load.targets],
        load.targets,
        dict.fromkeys(load.targets, 0),
        tokens=load.tokens,
        itemsize=4,
    )
    assert found.flops == found.base_flops == counted_flops(peers.build_step("base-only", load, {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_every_tensor_read_or_written(dtype):
    load = group(repeats=1, dtype=dtype)
    ranks = dict(zip(load.targets, (4, 0, 8), strict=True))
    step = peers.build_step("peft", steps.twin(load), ranks)
    (x,) = step.inputs.values()
    outputs = step.forward()
    torch.autograd.backward(outputs, step.output_grads)
    adapters = list(steps.adapter_parameters(step.module).values())
    weights = [p for p in step.module.parameters() if not p.requires_grad]
    forward = [x, *weights, *adapters, *outputs]
    backward = [*step.output_grads, x, *weights, *adapters, x.grad, *(p.grad for p in adapters)]
    without = [x, *weights, *outputs, *step.output_grads, *weights, x.grad]

    found = minimum(
        copies_of(load), load.targets, ranks, tokens=load.tokens, itemsize=dtype.itemsize
    )
    assert found.bytes == sum(tensor.nbytes for tensor in (*forward, *backward))
    assert found.base_bytes == sum(tensor.nbytes for tensor in without)


def test_a_group_reads_its_input_once_for_all_its_layers():
    load = group(repeats=1)
    ranks = steps.uniform_ranks(load.targets, 4)
    (together,) = copies_of(load)

    def work(division: list[list[str]]) -> Work:
        return minimum(division, load.targets, ranks, tokens=load.tokens, itemsize=4)

    one, three = work([together]), work([[name] for name in together])
    assert one.flops == three.flops and one.base_flops == three.base_flops
    # x forward, x backward and dX, two times more than needed.
    assert three.bytes - one.bytes == 2 * 3 * 4 * load.tokens * 32
    assert three.base_bytes - one.base_bytes == 2 * 2 * 4 * load.tokens * 32


def test_ranks_of_zero_cost_nothing_and_work_adds_up():
    load = group(repeats=2)
    division = copies_of(load)
    ranks = steps.uniform_ranks(load.targets, 4)
    none = minimum(
        division, load.targets, dict.fromkeys(load.targets, 0), tokens=load.tokens, itemsize=4
    )
    assert (none.flops, none.bytes) == (none.base_flops, none.base_bytes)
    parts = [
        minimum([names], load.targets, ranks, tokens=load.tokens, itemsize=4) for names in division
    ]
    whole = minimum(division, load.targets, ranks, tokens=load.tokens, itemsize=4)
    assert parts[0] + parts[1] == whole and parts[0] == parts[1]
