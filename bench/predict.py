"""What the cost model expects of whole cases: of the registry's linears and groups, and of a Llama.

All of it is arithmetic on :mod:`heterolora.kernels.cost`; nothing here was measured.

A group is predicted by its own estimate. A whole step is the sum over its groups and the rest of
the model (:func:`rest_of_llama`), once on the device and once on the host, and takes the longer of
the two, since the host runs ahead across layers. What torch.compile makes of PEFT is
:func:`compiled_peft_steps`.
"""

from collections.abc import Mapping

from heterolora.bench.cases.registry import Case
from heterolora.bench.cases.shapes import GROUPS
from heterolora.kernels.cost import Load, LowRank, Problem, Step, estimate, load_of, step_seconds
from heterolora.kernels.cost_steps import base_steps
from heterolora.kernels.devices import Device
from heterolora.kernels.dispatch.paths import decide

__all__ = [
    "PATHS",
    "case_seconds",
    "compiled_peft_steps",
    "group_seconds",
    "ideal_steps",
    "llama_groups",
    "problems",
    "rest_of_llama",
    "whole_step",
]

# What dispatch chooses from on a GPU, without dropout.
PATHS = ("peft", "aten", "triton")
_ITEM = {"fp32": 4, "bf16": 2}
# PEFT keeps adapters in float32.
_FACTOR = 4


def group_seconds(problem: Problem, device: Device, variant: str) -> Load:
    """Forward and backward of one group.

    Args:
        variant: of the bench: "base-only", "peft", "aten", "triton", "fused" (what dispatch takes),
            "compile-peft", or "graph-peft" and "graph-fused" for a replayed graph; "ideal", also
            with these prefixes, for :func:`ideal_steps` without gaps or host.
    """
    if variant.endswith("ideal"):
        return Load(sum(max(step_seconds(step, device)[:2]) for step in ideal_steps(problem)))
    if variant == "compile-peft":
        return load_of(compiled_peft_steps(problem), device)
    captured = variant.startswith("graph-")
    plain = variant.removeprefix("graph-").removeprefix("compile-")
    if plain == "fused":
        plain = decide(problem, device, None, PATHS, captured=captured).path
    found = estimate(problem, device.captured() if captured else device)
    taken = found["base" if plain == "base-only" else plain]
    passes = taken.forward, taken.backward
    return Load(sum(p.device_seconds for p in passes), sum(p.host_seconds for p in passes))


def ideal_steps(p: Problem) -> list[Step]:
    """The least that LoRA needs, passes one after the other: the frozen matmuls at the library's
    speed with the low-rank FLOPs inside, each activation once a pass, and x once more for dA.
    """
    m, e, k, n = p.m, p.itemsize, p.sources[0], sum(p.sites)
    low = 2 * m * sum(b.rank * (p.sources[b.source] + p.sites[b.site]) for b in p.live)
    moved = (m * k + k * n + m * n) * e
    matmul = 2 * m * k * n
    steps = [Step("forward", moved - m * n * e, m * n * e, matmul + low, itemsize=e)]
    if p.input_grad:
        steps.append(Step("dX", moved - m * k * e, m * k * e, matmul + 2 * low, itemsize=e))
    if p.live:
        steps.append(Step("dA", m * k * e, 0, itemsize=e))
    return steps


def compiled_peft_steps(p: Problem) -> list[Step]:
    """PEFT's layers as torch.compile runs them: the matmuls stay the library's, one by one, in
    PEFT's dtypes; neighbouring elementwise operations become one kernel that reads each input and
    writes each result once. So, for each site,

    forward: one cast of x for all sites; scale, add and both casts in one kernel; backward: cast
    and scale of dY in one; the casts and sums of all parts of dX of a group in one.
    """
    m, e, f, k = p.m, p.itemsize, p.factor_itemsize, p.sources[0]
    forward, backward = base_steps(p)
    steps = [step for step in (*forward, *backward) if step.flops]
    parts = e * len(p.sites) if p.input_grad else 0
    for b in p.live:
        k_b, n, r = p.sources[b.source], p.sites[b.site], b.rank
        steps += [
            _mm("A", m, k_b, r, f),
            _mm("B", m, r, n, f),
            Step("scale, add", m * n * (e + f), m * n * e),
            Step("cast and scale dY", m * n * e, m * n * f),
            _mm("dB", n, m, r, f),
            _mm("dS", m, n, r, f),
            _mm("dA", r, m, k_b, f),
        ]
        if b.dropout:
            steps.append(Step("dropout", m * k_b * e, m * k_b * (f + 1)))
        if p.input_grad:
            steps.append(_mm("dS A", m, r, k_b, f))
            parts += f + b.dropout
    if p.live and e != f:
        steps.append(Step("cast x", m * k * e, m * k * f))
    if p.input_grad and (p.live or len(p.sites) > 1):
        steps.append(Step("sum of dX", m * k * parts, m * k * e))
    return steps


def _mm(name: str, m: int, k: int, n: int, size: int) -> Step:
    return Step(name, (m * k + k * n) * size, m * n * size, 2 * m * k * n, itemsize=size)


def problems(case: Case) -> list[Problem]:
    """One problem a copy of a case of kind "op" or "group" of the registry."""
    m, k, n = (case.shapes[name] for name in "mkn")
    label = case.name.rpartition(f"-m{m}-")[0]
    sites = GROUPS[label][1] if label in GROUPS else {"proj": n}
    repeats = round(case.flops / (4 * m * k * n))
    targets = {f"copies.{i}.{s}": (k, sites[s]) for i in range(repeats) for s in sites}
    ranks = case.ranks_of(targets)
    return [
        Problem(
            m,
            (k,),
            tuple(sites.values()),
            tuple(
                LowRank(ranks[f"copies.{i}.{s}"], j, dropout=case.dropout > 0)
                for j, s in enumerate(sites)
            ),
            itemsize=_ITEM[case.dtype],
            factor_itemsize=_FACTOR,
        )
        for i in range(repeats)
    ]


def case_seconds(case: Case, device: Device, variant: str) -> float:
    """A step of a case: of kind "op" or "group", or a Llama (its "model" or "layer").

    Args:
        variant: as :func:`group_seconds`.
    """
    if case.kind in ("op", "group"):
        total = Load()
        for problem in problems(case):
            total += group_seconds(problem, device, variant)
        return total.seconds
    return whole_step(case.shapes, device, variant, itemsize=_ITEM[case.dtype])


def llama_groups(sizes: Mapping[str, int], rank: int, itemsize: int) -> list[Problem]:
    """The groups of one Llama layer: q, k and v; o; gate and up; down. All with the same rank."""
    hidden, ffn = sizes["hidden"], sizes["ffn"]
    kv = hidden * sizes["kv_heads"] // sizes["heads"]
    shapes = ((hidden, (hidden, kv, kv)), (hidden, (hidden,)), (hidden, (ffn, ffn)))
    return [
        Problem(
            sizes["batch"] * sizes["length"],
            (k,),
            ns,
            tuple(LowRank(rank, i) for i in range(len(ns))),
            itemsize=itemsize,
            factor_itemsize=_FACTOR,
        )
        for k, ns in (*shapes, (ffn, (hidden,)))
    ]


def rest_of_llama(sizes: Mapping[str, int], itemsize: int, *, compiled: bool) -> list[Step]:
    """What a layer does beside its linears, forward and backward: bytes an element and launches,
    counted from the operations of transformers' Llama, eager or as one kernel each when compiled.

    Attention is taken to be one kernel a pass that does half of all products of a causal mask, 2.5
    times that in backward, and moves q, k, v and their gradients.
    """
    m, e = sizes["batch"] * sizes["length"], itemsize
    hidden, ffn, length = sizes["hidden"], sizes["ffn"], sizes["length"]
    kv = hidden * sizes["kv_heads"] // sizes["heads"]
    # Elements, bytes of each that eager operations move, and launches; the same compiled. Norms
    # compute in float32 and are frozen; sums of the residual stream are part of them if compiled.
    table = {
        "norms": (2 * m * hidden, (e + 32, 2 * 8), (2 * e, 2)),
        "norms, backward": (2 * m * hidden, (2 * e + 72, 2 * 12), (3 * e, 2)),
        "residual adds": (2 * m * hidden, (6 * e, 2 * 2), (2 * e, 0)),
        "rotary": (m * (hidden + kv), (22 * e, 2 * 12), (4 * e, 2)),
        "activation": (m * ffn, (14 * e, 5), (8 * e, 2)),
    }
    steps = []
    for name, (elements, eager, fused) in table.items():
        size, launches = fused if compiled else eager
        steps.append(Step(name, elements * size, 0, launches=launches))
    products = 2 * m * length * hidden
    tensors = m * (2 * hidden + 2 * kv) * e
    return [
        *steps,
        Step("attention", tensors, 0, products, itemsize=e),
        Step("attention, backward", 2 * tensors, 0, 5 * products // 2, launches=3, itemsize=e),
    ]


def whole_step(
    sizes: Mapping[str, int], device: Device, variant: str, *, itemsize: int = 2, rank: int = 8
) -> float:
    """A training step of a Llama of `sizes`: its layers' groups and the rest of them.

    Left out, since it is small and the same in every variant: embedding, head, loss (vocabularies
    are shrunk), the optimizer. The first layer is taken to need an input gradient as all do. A
    step takes the longer of its device and its host time.

    Args:
        variant: as :func:`group_seconds`; "compile-fused" runs the groups as dispatch does, and the
            rest compiled.
    """
    compiled = variant.startswith("compile-")
    run = device.captured() if variant.startswith("graph-") else device
    total = Load()
    for problem in llama_groups(sizes, rank, itemsize):
        total += group_seconds(problem, device, variant)
    rest = rest_of_llama(sizes, itemsize, compiled=compiled)
    if variant.endswith("ideal"):
        total += Load(sum(max(step_seconds(s, run)[:2]) for s in rest))
    else:
        total += load_of(rest, run)
    return sizes["layers"] * total.seconds
