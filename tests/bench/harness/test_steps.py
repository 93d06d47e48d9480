"""Twins, ranks and adapters: what makes two variants of a workload comparable."""

import pytest
import torch

from heterolora.bench.cases import groups, peers, workloads
from heterolora.bench.harness import steps

CPU = torch.device("cpu")
SMALL = {"layers": 2, "hidden": 32, "ffn": 64, "batch": 2, "length": 4, "dtype": torch.float32}
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


def stack(device: torch.device = CPU, **sizes: int) -> steps.Workload:
    return workloads.linear_stack(**{**SMALL, **sizes}, device=device)


def with_shortcut() -> steps.Workload:
    return groups.group(
        m=6, k=16, sites=QKV, repeats=2, shortcut=True, dtype=torch.float32, device=CPU
    )


def adapters_of(model) -> dict:
    found = model.get_base_model().named_modules()
    return {name: module for name, module in found if hasattr(module, "lora_A")}


def test_a_twin_shares_every_frozen_weight():
    load = stack()
    other = steps.twin(load)
    assert other.model is not load.model
    theirs = dict(other.model.named_parameters())
    for name, parameter in load.model.named_parameters():
        assert theirs[name] is parameter
    assert other.inputs is load.inputs and other.targets is load.targets


def test_a_twin_has_its_own_trainable_weights():
    load = with_shortcut()
    theirs = dict(steps.twin(load).model.named_parameters())
    trained = 0
    for name, parameter in load.model.named_parameters():
        assert torch.equal(theirs[name], parameter)
        assert (theirs[name] is parameter) == (not parameter.requires_grad)
        trained += parameter.requires_grad
    assert trained == 4


def test_adapters_of_twins_are_equal_and_apart():
    load = stack()
    ranks = steps.mixed_ranks(load.targets)
    one, two = (steps.with_adapters(steps.twin(load), ranks) for _ in range(2))
    mine, theirs = steps.adapter_parameters(one), steps.adapter_parameters(two)
    assert mine.keys() == theirs.keys() and mine
    for name, parameter in mine.items():
        assert torch.equal(parameter, theirs[name])
        assert parameter.data_ptr() != theirs[name].data_ptr()


def test_a_step_trains_the_adapters_of_its_own_twin_only():
    load = stack()
    ranks = steps.uniform_ranks(load.targets)
    one, two = (peers.build_step("peft", steps.twin(load), ranks) for _ in range(2))
    before = {name: p.detach().clone() for name, p in two.module.named_parameters()}
    one()
    for name, parameter in one.module.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name
    for name, parameter in two.module.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("rank", [8, 16])
@pytest.mark.parametrize("builder", ["linear_stack", "bert", "opt", "llama"])
def test_mixed_and_sparse_ranks_cost_exactly_what_uniform_ranks_cost(builder, rank):
    extra = {
        "linear_stack": {},
        "bert": {"heads": 2},
        "opt": {"heads": 2, "embedding": 16},
        "llama": {"heads": 4, "kv_heads": 2},
    }[builder]
    meta = torch.device("meta")
    load = getattr(workloads, builder)(**{**SMALL, "layers": 6}, **extra, device=meta)

    def cost(ranks):
        return sum(ranks[name] * sum(load.targets[name]) for name in ranks)

    uniform = steps.uniform_ranks(load.targets, rank)
    mixed = steps.mixed_ranks(load.targets, rank)
    sparse = steps.sparse_ranks(load.targets, rank)
    assert set(uniform.values()) == {rank}
    assert cost(mixed) == cost(sparse) == cost(uniform)
    assert mixed.keys() == sparse.keys() == load.targets.keys()
    assert {0, 4 * rank} <= set(mixed.values())
    # Six layers: every shape class is a whole number of cycles.
    assert list(sparse.values()).count(0) * 6 == 4 * len(sparse)


def test_every_kind_of_linear_gets_several_ranks():
    ranks = steps.mixed_ranks(stack(torch.device("meta"), layers=6).targets)
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"):
        assert len({rank for name, rank in ranks.items() if name.endswith(kind)}) > 2, kind


def test_what_is_left_of_a_cycle_keeps_the_rank():
    ranks = steps.sparse_ranks({f"layer{i}": (4, 4) for i in range(8)}, 8)
    assert list(ranks.values()) == [0, 0, 32, 0, 0, 16, 8, 8]


def test_adapters_have_the_asked_ranks_and_one_scale():
    load = stack()
    ranks = steps.mixed_ranks(load.targets)
    found = adapters_of(steps.with_adapters(load, ranks, dropout=0.25))
    assert {name: module.r["default"] for name, module in found.items()} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert {module.scaling["default"] for module in found.values()} == {2.0}
    assert all(module.lora_B["default"].weight.abs().max() > 0 for module in found.values())
    assert {module.lora_dropout["default"].p for module in found.values()} == {0.25}


@pytest.mark.parametrize("kept", [True, False])
def test_adapters_are_float32_unless_asked_otherwise(kept):
    load = stack(dtype=torch.bfloat16)
    ranks = steps.uniform_ranks(load.targets)
    model = steps.with_adapters(load, ranks, autocast_adapter_dtype=kept)
    dtypes = {p.dtype for p in steps.adapter_parameters(model).values()}
    assert dtypes == {torch.float32 if kept else torch.bfloat16}


def test_the_float64_copy_gives_the_same_and_leaves_the_step_alone():
    load = with_shortcut()
    step = groups.shortcut_step("peft", load, steps.uniform_ranks(load.targets))
    exact = step.in_float64()
    for mine, theirs in zip(step.forward(), exact.forward(), strict=True):
        assert theirs.dtype == torch.float64
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
    exact()
    assert all(value.grad is None for value in step.inputs.values())
    assert all(value.grad is not None for value in exact.inputs.values())
    assert {p.dtype for p in step.module.parameters()} == {torch.float32}


def test_the_floor_has_no_adapters_and_only_gradients_of_activations():
    load = stack()
    floor = peers.build_step("base-only", load, steps.uniform_ranks(load.targets))
    floor()
    assert not steps.adapter_parameters(floor.module) and floor.optimizer is None
    (x,) = floor.inputs.values()
    assert x.grad is not None and x.grad.abs().max() > 0
