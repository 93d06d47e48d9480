"""Groups alone: the fused operation computes what PEFT computes, copy by copy."""

import pytest
import torch
from helpers import CountOps, error

from heterolora.bench.cases import groups, peers
from heterolora.bench.harness import steps

CPU = torch.device("cpu")
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 16}
SITES = {"one": {"proj": 24}, "qkv": QKV, "gate-up": {"gate_proj": 40, "up_proj": 40}}


def workload(
    sites: dict[str, int] = QKV, dtype: torch.dtype = torch.float32, **options: object
) -> steps.Workload:
    return groups.group(
        **{"m": 19, "k": 32, "sites": sites, "repeats": 6, "dtype": dtype, "device": CPU, **options}
    )


def build(variant: str, load: steps.Workload, ranks: dict[str, int]) -> steps.Step:
    load = steps.twin(load)
    shortcut = any(name.startswith("u") for name in load.inputs)
    if shortcut and variant != peers.FLOOR:
        return groups.shortcut_step(variant, load, ranks)
    return peers.build_step(variant, load, ranks)


def everything(step: steps.Step) -> dict[str, torch.Tensor]:
    """Outputs, dX (and dU), dA and dB (and the shortcut's) by name."""
    step.clear_gradients()
    outputs = step.forward()
    torch.autograd.backward(outputs, step.output_grads)
    leaves = {**steps.adapter_parameters(step.module), **step.inputs}
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"d {name}": leaf.grad for name, leaf in leaves.items()}
    step.clear_gradients()
    assert all(value is not None for value in found.values())
    return found


def worst(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(error(value, exact[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("allocation", "shortcut"),
    # Only a group with an adapter at every site has shortcuts.
    [("uniform", False), ("mixed", False), ("sparse", False), ("uniform", True)],
)
@pytest.mark.parametrize("sites", SITES)
def test_fused_is_as_exact_as_peft(sites, allocation, shortcut, poisoned):
    load = workload(SITES[sites], shortcut=shortcut)
    ranks = getattr(steps, f"{allocation}_ranks")(load.targets)
    # Named, because so small a group would be left to PEFT.
    ours = "fused" if shortcut else "aten"
    peft, fused = build("peft", load, ranks), build(ours, load, ranks)
    everything(fused)
    with CountOps() as ops:
        found = everything(fused)
    adapted = {name.rsplit(".", 1)[0] for name, rank in ranks.items() if rank}
    assert ops.forward == ops.backward == len(adapted) > 0
    exact = everything(peft.in_float64())
    assert worst(found, exact) <= 2 * worst(everything(peft), exact)


@pytest.mark.parametrize("shortcut", [False, True])
def test_in_bf16_fused_is_as_exact_as_peft_in_bf16(shortcut, poisoned):
    load = workload(dtype=torch.bfloat16, shortcut=shortcut)
    ranks = steps.uniform_ranks(load.targets)
    steps_by_name = {name: build(name, load, ranks) for name in ("peft", "peft-lowp", "fused")}
    exact = everything(steps_by_name["peft"].in_float64())
    low = worst(everything(steps_by_name["peft-lowp"]), exact)
    assert 0 < worst(everything(steps_by_name["fused"]), exact) <= 2 * low


def test_the_shortcut_and_its_source_get_gradients():
    load = workload(shortcut=True)
    found = everything(build("fused", load, steps.uniform_ranks(load.targets)))
    names = [name for name in found if "lora_shortcut" in name or name.startswith("d u")]
    assert len(names) == 3 * load.repeats
    assert all(found[name].abs().max() > 0 for name in names)


def test_fused_notices_a_changed_shortcut():
    load = workload(shortcut=True)
    ranks = steps.uniform_ranks(load.targets)
    fused = build("fused", load, ranks)
    before = everything(fused)
    name, factor = next(
        item for item in steps.adapter_parameters(fused.module).items() if "shortcut" in item[0]
    )
    factor.data.mul_(1.5)
    assert worst(everything(fused), before) > 0.01, name


@pytest.mark.parametrize("variant", ["peft", "fused", "base-only"])
def test_copies_are_independent(variant):
    load = workload(repeats=2)
    ranks = steps.uniform_ranks(load.targets)
    step = build(variant, load, ranks)
    before = everything(step)
    step.inputs["x1"].data.add_(1.0)
    after = everything(step)
    for name, value in before.items():
        # Of the three outputs a copy has, the first three are of copy 0.
        first = name in ("output 0", "output 1", "output 2") or ".0." in name or name == "d x0"
        # dX depends on the weights and dY alone.
        assert torch.equal(value, after[name]) == (first or name == "d x1"), name


def test_copies_have_weights_and_inputs_of_their_own():
    load = workload(repeats=3)
    weights = [p for p in load.model.parameters()]
    assert len({p.data_ptr() for p in weights}) == len(weights) == 9
    assert len({x.data_ptr() for x in load.inputs.values()}) == len(load.inputs) == 3
    assert not torch.equal(load.inputs["x0"], load.inputs["x1"])
    assert load.repeats == load.layers == 3 and not load.trains and load.tokens == 19


def test_every_call_builds_the_same():
    one, two = workload(shortcut=True), workload(shortcut=True)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(one.inputs[name], two.inputs[name]) for name in one.inputs)


def test_a_group_is_built_without_memory_on_the_meta_device():
    load = groups.group(
        m=16384,
        k=14336,
        sites={"proj": 4096},
        repeats=48,
        shortcut=True,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
    )
    assert len(load.targets) == 48
    assert {x.device.type for x in (*load.inputs.values(), *load.model.parameters())} == {"meta"}
    assert steps.mixed_ranks(load.targets).keys() == load.targets.keys()


def test_enough_copies_to_leave_the_caches_cold():
    for m, k, n, itemsize in ((256, 768, 768, 4), (1024, 4096, 1024, 2), (8192, 8192, 8192, 2)):
        count = groups.copies(m, k, n, itemsize)
        held = count * groups.bytes_of_group(m, k, n, itemsize)
        assert held >= groups.COLD_BYTES
        assert held - groups.bytes_of_group(m, k, n, itemsize) < groups.COLD_BYTES
        rounded = groups.copies(m, k, n, itemsize, multiple=6)
        assert rounded % 6 == 0 and 0 <= rounded - count < 6
    assert groups.copies(1, 8, 8, 2) == groups.MOST_COPIES


def test_bytes_of_a_group_are_those_of_its_tensors():
    m, k, n = 19, 32, sum(QKV.values())
    load = workload(repeats=1)
    (x,) = load.inputs.values()
    outputs = load.run(load.model, load.inputs)
    torch.autograd.backward(outputs, load.output_grads)
    weights = sum(p.nbytes for p in load.model.parameters())
    moved = x.nbytes + x.grad.nbytes + sum(y.nbytes for y in (*outputs, *load.output_grads))
    assert groups.bytes_of_group(m, k, n, 4) == weights + moved
