"""The cost model: its bytes, FLOPs and launches by hand, the published figures, and its limits."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heterolora.kernels import aten, cost, spec
from heterolora.kernels.aten import linear
from heterolora.kernels.cost import CALL, STEPS, LowRank, Problem, estimate
from heterolora.kernels.cost_steps import MASK_BYTES, MASK_LAUNCHES
from heterolora.kernels.devices import PEAKS, Device, device_for
from heterolora.kernels.dispatch.paths import decide
from heterolora.kernels.group import Call

H100 = device_for("NVIDIA H100 80GB HBM3")
HUGE = 2**20


def single(m, k, n, rank=16, dropout=False, **other):
    return Problem(m, (k,), (n,), (LowRank(rank, dropout=dropout),), **other)


def totals(problem, name):
    steps = [step for half in STEPS[name](problem) for step in half]
    return sum(s.flops for s in steps), sum(s.bytes for s in steps)


def test_peft_by_hand():
    # m 10, k 6, n 4, r 2, two bytes: products of the sizes, in elements.
    forward, backward = STEPS["peft"](single(10, 6, 4, rank=2))
    x, y, w, a, b, s = 60, 40, 24, 12, 8, 20
    read = [(x + w), (x + a), (s + b), y, 2 * y]
    assert [step.read for step in forward] == [2 * value for value in read]
    assert [step.written for step in forward] == [2 * value for value in (y, s, y, y, y)]
    # dX; scale; dB; dS; dA; dS A; sum.
    read = [y + w, y, y + s, y + b, s + x, s + a, 2 * x]
    written = [x, y, b, s, a, x, x]
    by_name = {step.name: step for step in backward}
    order = ["dX", "scale dY", "dB", "dS", "dA", "dS A", "sum of dX"]
    assert [by_name[name].read for name in order] == [2 * value for value in read]
    assert [by_name[name].written for name in order] == [2 * value for value in written]
    assert sum(step.flops for step in forward) == 2 * 10 * (6 * 4 + 2 * (6 + 4))
    assert sum(step.flops for step in backward) == 2 * 10 * (6 * 4 + 2 * 2 * (6 + 4))
    assert (len(forward), len(backward)) == (5, 7)


def test_triton_by_hand():
    # m 256, k 512, n 256, r 3 in a bucket of 16; float32 factors. Shrink has 8 steps of 64 over k
    # and cuts them in 2. dY is one block of 256 columns in 4 ranges of 64 rows,
    # the source 4 blocks of 128 in 4 ranges.
    forward, backward = STEPS["triton"](single(256, 512, 256, rank=3, factor_itemsize=4))
    pack = (3 * 768 * 4, 16 * 768 * 2)
    parts_s, s = 2 * 256 * 16 * 4, 256 * 16 * 2
    assert [(step.name, step.read, step.written) for step in forward] == [
        ("pack A, B", *pack),
        ("shrink", (256 * 512 + 16 * 512) * 2, parts_s),
        ("expand", (256 * 512 + 512 * 256 + 256 * 16 + 16 * 256) * 2 + parts_s, 256 * 256 * 2),
    ]
    parts_ds, parts_db, parts_da = 256 * 16 * 4, 4 * 256 * 16 * 4, 4 * 512 * 16 * 4
    assert [(step.name, step.read, step.written) for step in backward] == [
        ("pack A, B", *pack),
        ("dY pass", (256 * 256 + 256 * 16 + 16 * 256) * 2, parts_ds + parts_db),
        ("sum of dS", parts_ds, s),
        ("dX", (256 * (256 + 16) + (256 + 16) * 512) * 2, 256 * 512 * 2),
        ("dA pass", (256 * 512 + 256 * 16) * 2, parts_da),
        ("sum of dA, dB", parts_db + parts_da, 3 * 768 * 4),
    ]
    assert all(step.launches == 1 for step in (*forward, *backward))
    assert [step.name for step in (*forward, *backward) if step.own_matmul] == ["expand", "dX"]
    assert forward[-1].flops == 2 * 256 * 256 * (512 + 16)
    assert backward[1].flops == 2 * (2 * 256 * 256 * 16)


@pytest.mark.parametrize(
    ("name", "dropout", "forward", "backward"),
    [
        ("base", False, 2, 2),
        ("peft", False, 9, 11),
        ("peft", True, 11.5, 13.5),
        ("aten", False, 5, 7),
        # x twice and y; then dY twice, x and dX, and the parts of dS, 16 fp32 columns for every 256
        # of dY, written and read.
        ("triton", False, 3, 4.25),
        ("triton", True, 3, 4.25),
    ],
)
def test_activation_passes(name, dropout, forward, backward):
    """Bytes over one bf16 activation; S, A and B and their parts add less than 0.003 of one."""
    halves = STEPS[name](single(HUGE, HUGE, HUGE, rank=1, dropout=dropout))
    weight = activation = HUGE * HUGE * 2
    passes = [(sum(step.bytes for step in half) - weight) / activation for half in halves]
    assert passes == pytest.approx([forward, backward], abs=3e-3)


@pytest.mark.parametrize(
    ("k", "n", "ratios"),
    [
        (2048, 2048, (1.94, 2.22, 1.48)),
        (4096, 4096, (1.47, 1.61, 1.24)),
        (4096, 1024, (2.00, 2.57, 1.60)),
        (4096, 14336, (1.34, 1.38, 1.15)),
        (14336, 4096, (1.26, 1.40, 1.15)),
        (8192, 8192, (1.23, 1.31, 1.12)),
    ],
)
def test_published_ratios_when_nothing_overlaps(k, n, ratios):
    """PEFT, PEFT with dropout and the addmm composition over the frozen layer: m = 8192, r = 16,
    700 TFLOP/s and 3 TB/s, each extra byte added to the time of the FLOPs.
    """
    base_flops, base_bytes = totals(single(8192, k, n), "base")
    found = []
    for name, dropout in (("peft", False), ("peft", True), ("aten", False)):
        flops, moved = totals(single(8192, k, n, dropout=dropout), name)
        found.append((flops / 700e12 + (moved - base_bytes) / 3e12) / (base_flops / 700e12))
    # The figures have two decimals, and leave out S, A and B: less than 1 % more.
    assert found == pytest.approx(ratios, abs=0.006)


class Operations(TorchDispatchMode):
    """Counts operations that start a kernel, and the bytes of their operands and results."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in returns)
        is_view = returns and returns[0].alias_info is not None and not writes
        name = func.overloadpacket.__name__
        if is_view or name in ("empty", "new_empty", "empty_like", "_unsafe_view"):
            return out
        self.launches += 1
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def test_cost_of_the_dropout_mask_is_that_of_its_operations():
    m, k = 256, 512
    with Operations() as seen:
        spec.dropout_mask(torch.tensor(3), 0, m, k, 0.1)
    assert seen.launches == pytest.approx(MASK_LAUNCHES, rel=0.1)
    assert seen.bytes / (m * k) == pytest.approx(MASK_BYTES, rel=0.1)


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_launches_of_aten_are_those_of_its_operations(factor_dtype, bias, monkeypatch):
    monkeypatch.setattr(linear, "_pads_ranks", lambda x: False)
    m, ks, ns = 8, (6, 5), (4, 7, 3)
    shape = [(2, 0, 0), (3, 0, 1), (1, 1, 0), (0, 1, 0)]
    branches = tuple(LowRank(*item) for item in shape)
    size = torch.empty(0, dtype=factor_dtype).element_size()
    forward, backward = STEPS["aten"](Problem(m, ks, ns, branches, 2, size, bias))

    sources = [torch.randn(m, k, dtype=torch.bfloat16) for k in ks]
    weights = [torch.randn(n, ks[0], dtype=torch.bfloat16) for n in ns]
    biases = [w[:, 0].clone() if bias else None for w in weights]
    a = [torch.randn(r, ks[i], dtype=factor_dtype) for r, _, i in shape]
    b = [torch.randn(ns[site], r, dtype=factor_dtype) for r, site, _ in shape]
    _, branch_site, branch_source = zip(*shape, strict=True)
    about = [2.0] * len(shape), branch_site, branch_source, [0.0] * len(shape), "aten"
    call = Call(sources, weights, biases, a, b, None, *about)
    with Operations() as seen:
        outputs, s = aten.group_linear(call)
    assert seen.launches == sum(step.launches for step in forward)
    needs = [True] * len(ks) + [False] * len(ns) + [True] * (2 * len(shape))
    grads = [torch.ones_like(y) for y in outputs]
    with Operations() as seen:
        aten.group_linear_backward(call, grads, s, needs)
    # The zeros of the branch of rank 0 touch no memory.
    assert seen.launches - 2 == sum(step.launches for step in backward)


sizes = st.integers(1, 3000)
problems = st.builds(
    lambda m, k, ns, ranks, drop, f: Problem(
        m,
        (k,),
        tuple(ns),
        tuple(LowRank(r, i % len(ns), 0, drop) for i, r in enumerate(ranks)),
        2,
        f,
    ),
    sizes,
    sizes,
    st.lists(sizes, min_size=1, max_size=3),
    st.lists(st.integers(0, 200), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([2, 4]),
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(problems, st.integers(0, 3), st.integers(1, 64))
def test_more_work_never_costs_less(problem, branch, more):
    branches = list(problem.branches)
    j = branch % len(branches)
    branches[j] = branches[j]._replace(rank=branches[j].rank + more)
    larger = {
        "m": dataclasses.replace(problem, m=problem.m + more),
        "n": dataclasses.replace(problem, sites=(problem.sites[0] + more, *problem.sites[1:])),
        "rank": dataclasses.replace(problem, branches=tuple(branches)),
    }
    before = estimate(problem, H100)
    for what, after in ((what, estimate(p, H100)) for what, p in larger.items()):
        for name in ("base", "peft", "aten"):
            assert after[name].bytes >= before[name].bytes, (what, name)
            assert after[name].seconds >= before[name].seconds, (what, name)
        # Triton cuts sums into fewer parts as there is more work; its FLOPs only grow.
        assert after["triton"].flops >= before["triton"].flops, what


@settings(derandomize=True, deadline=None, max_examples=60)
@given(problems)
def test_adapters_cost_something_and_the_floor_is_below_peft(problem):
    found = estimate(problem, H100)
    assert found["base"].seconds <= found["peft"].seconds
    assert found["base"].flops <= min(found[name].flops for name in ("peft", "aten", "triton"))
    for item in found.values():
        for half in (item.forward, item.backward):
            assert half.seconds > 0 and half.bound in ("memory", "compute", "launches")
            assert half.memory_seconds + half.compute_seconds <= half.device_seconds


@settings(derandomize=True, deadline=None, max_examples=40)
@given(problems, st.floats(1.0, 50.0))
def test_a_faster_device_is_never_slower(problem, factor):
    faster = dataclasses.replace(
        H100, flops=H100.flops * factor, flops32=H100.flops32 * factor, bandwidth=H100.bandwidth * 2
    )
    before, after = estimate(problem, H100), estimate(problem, faster)
    assert all(after[name].seconds <= before[name].seconds for name in STEPS)


@pytest.mark.parametrize("name", list(STEPS))
def test_rank_0_costs_nothing(name):
    with_zero = Problem(64, (32, 48), (16, 16), (LowRank(0), LowRank(4, 1), LowRank(0, 0, 1, True)))
    without = dataclasses.replace(with_zero, branches=(LowRank(4, 1),))
    assert STEPS[name](with_zero) == STEPS[name](without)
    frozen = dataclasses.replace(with_zero, branches=(LowRank(0), LowRank(0, 1)))
    flops, moved = totals(frozen, name)
    assert flops == totals(frozen, "base")[0]
    assert moved <= totals(frozen, "base")[1]


def test_without_input_gradient_no_step_computes_one():
    problem = Problem(64, (32, 48), (16,), (LowRank(4), LowRank(4, 0, 1)), input_grad=False)
    for name, steps in STEPS.items():
        assert not [s for s in steps(problem)[1] if "dX" in s.name or s.name in ("dS A", "dU")], (
            name
        )


def test_time_is_the_larger_of_bytes_and_flops_and_a_gap_for_each_launch():
    device = Device.measured("unit", flops=100.0, bandwidth=10.0, gap=0.5, host=0.0, call=0.0)
    problem = Problem(2, (3,), (5,), (), 2)
    half = estimate(problem, device)["base"].forward
    moved, flops = 2 * (6 + 15 + 10), 2 * 2 * 3 * 5
    assert half.seconds == pytest.approx(max(moved / 10.0, flops / 100.0) + 0.5)
    assert half.bound == "memory"
    slow = dataclasses.replace(device, flops=1.0)
    half = estimate(problem, slow)["base"].forward
    assert (half.seconds, half.bound) == (pytest.approx(flops + 0.5), "compute")
    busy = dataclasses.replace(device, host=100.0)
    half = estimate(problem, busy)["base"].forward
    assert (half.seconds, half.bound) == (100.0, "launches")
    assert estimate(problem, slow)["triton"].forward.seconds == pytest.approx(flops / 0.9 + 0.5)


def test_float32_products_are_held_against_the_float32_ceiling():
    device = Device.measured("unit", flops=100.0, flops32=1.0, bandwidth=1e9, gap=0.0, host=0.0)
    in_bf16, in_fp32 = single(2, 3, 5, rank=1), single(2, 3, 5, rank=1, factor_itemsize=4)
    low_rank = 2 * 2 * (3 + 5)
    more = [estimate(p, device)["peft"].forward.seconds for p in (in_bf16, in_fp32)]
    assert more[1] - more[0] == pytest.approx(low_rank - low_rank / 100, rel=1e-3)


def test_python_is_hidden_by_a_device_that_is_busy_and_added_to_a_cpus_time():
    problem = single(2, 3, 5)
    free = Device.measured("free", flops=1e30, bandwidth=1e30, gap=0.0, host=1e-9, call=3.0)
    first, _ = CALL["peft"]
    calls = 3 * first[0]
    launched = estimate(problem, free)["peft"].forward
    assert launched.seconds == pytest.approx(calls + launched.launches * 1e-9)
    busy = dataclasses.replace(free, gap=1.0)
    assert estimate(problem, busy)["peft"].forward.seconds == launched.launches
    cpu = dataclasses.replace(busy, host=0.0)
    assert estimate(problem, cpu)["peft"].forward.seconds == launched.launches + calls
    assert estimate(problem, busy.captured())["peft"].forward.seconds == launched.launches
    three = Problem(2, (3,), (5,) * 3, tuple(LowRank(2, i) for i in range(3)))
    once, more = CALL["aten"]
    found = estimate(three, free)["aten"].backward
    assert found.host_seconds == pytest.approx(3 * (once[1] + 2 * more[1]) + found.launches * 1e-9)


def fastest(problem, device, among=("aten", "triton")):
    return decide(problem, device, None, among).path


def test_fastest_takes_either():
    wide, narrow = single(8192, 8192, 8192), single(16384, 1024, 1024)
    graph = H100.captured()
    for problem, expected in ((wide, "aten"), (narrow, "triton")):
        found = estimate(problem, graph)
        assert fastest(problem, graph) == expected
        assert min(found["aten"].seconds, found["triton"].seconds) == found[expected].seconds
    even = dataclasses.replace(graph, triton_matmul=1.0)
    assert fastest(wide, even) == "triton"
    # Launched one by one, so short a product waits for the host.
    assert fastest(narrow, H100) == "aten"


def test_where_launches_decide_fewer_win():
    problem = Problem(16, (64,), (64,) * 3, tuple(LowRank(8, i) for i in range(3)))
    found = estimate(problem, H100)
    assert found["triton"].forward.bound == found["aten"].forward.bound == "launches"
    assert found["triton"].launches == 3 + 6
    assert found["triton"].launches < min(found["aten"].launches, found["peft"].launches)
    assert fastest(problem, H100.captured()) == "triton"
    assert fastest(problem, H100, ("peft", "aten", "triton")) == "peft"
    # Memory and arithmetic for nothing: what is left is the launches.
    free = Device.measured("free", flops=1e30, bandwidth=1e30, gap=1.0, host=0.0, call=0.0)
    for name, item in estimate(problem, free).items():
        assert item.seconds == pytest.approx(found[name].launches)


@pytest.mark.parametrize(
    ("name", "capability", "key"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), "H100"),
        ("NVIDIA H100 PCIe", (9, 0), "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "A100"),
        ("NVIDIA L4", (8, 9), "L4"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "RTX 4090"),
        ("NVIDIA A40", (8, 6), "A10"),
        ("NVIDIA GB300", (10, 3), "H100"),
        ("NVIDIA RTX PRO 6000", (12, 0), "RTX 5090"),
        ("unheard of", None, "H100"),
    ],
)
def test_devices_by_name(name, capability, key):
    device = device_for(name, capability)
    assert device.bandwidth == pytest.approx(0.9 * PEAKS[key].bandwidth)
    assert device.flops == pytest.approx(0.7 * PEAKS[key].bf16)
    assert "not measured" in device.source
    words = set(name.lower().replace("-", " ").split())
    assert ("unknown" in device.name) == (not set(key.lower().split()) <= words)


def test_malformed_problems_and_devices_are_refused():
    with pytest.raises(ValueError, match="branch 0: no site 1"):
        Problem(1, (1,), (1,), (LowRank(1, 1),))
    with pytest.raises(ValueError, match="sizes of at least 0"):
        Problem(-1, (1,), (1,))
    with pytest.raises(ValueError, match="ceilings must be positive"):
        Device.measured("x", flops=0.0, bandwidth=1.0)
    with pytest.raises(ValueError, match="cannot cost less than nothing"):
        Device.measured("x", flops=1.0, bandwidth=1.0, gap=-1.0)
    assert set(cost.STEPS) == {"base", "peft", "aten", "triton"}
