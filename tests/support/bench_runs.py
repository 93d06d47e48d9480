"""Made-up results of the bench, of every kind, for what reads result files. No number is real."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from heterolora.bench.harness.memory import MemoryUse
from heterolora.bench.harness.parity import Parity
from heterolora.bench.harness.record import BenchRun, CaseResult, Training
from heterolora.bench.harness.timing import Timing
from heterolora.bench.harness.work import Work, minimum

BANDWIDTH, FLOPS = 1e10, {"fp32": 1e11, "bf16": 4e11}
ROUNDS = 5
# Time over the floor, by dtype.
OVER = {
    "fp32": {"base-only": 1.0, "fused": 1.07, "peft": 1.4, "peft-lowp": 1.41},
    "bf16": {"base-only": 1.0, "fused": 1.2, "peft": 1.9, "peft-lowp": 1.6},
}
COMPILED = {
    "fp32": {"compile-peft": 1.25, "compile-fused": 1.03},
    "bf16": {"compile-peft": 1.5, "compile-fused": 1.1},
}


def environment(device: str = "Made-up CPU", device_type: str = "cpu") -> dict[str, Any]:
    return {
        "versions": {"python": "3.11.0", "torch": "2.13.0"},
        "device": device,
        "device_type": device_type,
        "cpu": "Made-up CPU",
        "cpu_capability": "AVX512",
        "threads": 1,
        "platform": "Linux x86_64",
        "commit": "0123456789ab",
        "date": "2026-01-01T00:00:00+00:00",
        "command": "heterolora bench --out bench/results",
        "ceilings": {"bandwidth": BANDWIDTH, "flops": dict(FLOPS)},
    }


def result(
    case: str,
    kind: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    work: Work = Work(2_000_000, 1_000, 1_000_000, 500),  # noqa: B008 (frozen)
    dtype: str = "fp32",
    saved: Mapping[str, int] | None = None,
    clock: str = "process CPU time",
    **fields: Any,
) -> CaseResult:
    """A green case with the given samples in seconds a round, by variant; `saved` in bytes."""
    samples = {name: list(values) for name, values in seconds.items()}
    kept = {"base-only": 64_000, "fused": 96_000, **(saved or {})}
    found: dict[str, Any] = {
        "case": case,
        "kind": kind,
        "description": "a toy",
        "shapes": {"hidden": 8},
        "dtype": dtype,
        "ranks": {"layers.0.q_proj": 8},
        "tokens": 64,
        "layers": 2,
        "repeats": 1,
        "dropout": 0.0,
        "work": work,
        "parity": Parity(True, "", "relative difference to PEFT, limit 1e-05", 0.0, 1e-7),
        "timing": Timing(clock, "peft", samples, samples),
        "memory": {
            name: MemoryUse(3_000_000, 1_000_000, kept.get(name, 128_000)) for name in samples
        },
        "launches": dict.fromkeys(samples, 120),
    }
    return CaseResult(**{**found, **fields})


def red(case: str = "toy-bf16-uniform", reason: str = "not fused: 2 of 2") -> CaseResult:
    work = Work(2, 1, 1, 1)
    return CaseResult(
        case, "model", "a toy", {}, "bf16", {}, 64, 2, 1, 0.0, work, Parity(False, reason)
    )


def full_run(**device: str) -> BenchRun:
    """Cases of every kind, one red, one variant failed and one skipped."""
    cases = [
        *_models(),
        *_operations(),
        *_scoring(),
        *_trainings(),
        red("llama-1b-8x1024-bf16-mixed"),
    ]
    cases[0].failed["unsloth"] = "RuntimeError: <no> compiler & no luck"
    for case in cases:
        case.skipped["triton"] = "Triton's kernels need a GPU"
    return BenchRun(environment(**device), cases)


def _timed(
    name: str, kind: str, work: Work, dtype: str, heavier: float, compiled: bool, **fields: Any
) -> CaseResult:
    draw = random.Random(name)
    floor = 1.3 * max(work.base_flops / FLOPS[dtype], work.base_bytes / BANDWIDTH)
    over = OVER[dtype] | (COMPILED[dtype] if compiled else {})
    seconds = {
        variant: [floor * (1 + (value - 1) * heavier) * draw.gauss(1, 0.01) for _ in range(ROUNDS)]
        for variant, value in over.items()
    }
    tokens, layers = fields["tokens"], fields["layers"]
    saved = {
        variant: int(tokens * layers * heavier * each)
        for variant, each in {
            "peft": 9000,
            "peft-lowp": 8000,
            "fused": 5000,
            "base-only": 4000,
        }.items()
    }
    return result(name, kind, seconds, work=work, dtype=dtype, saved=saved, **fields)


def _models() -> Iterator[CaseResult]:
    sizes = {
        "minilm-16x64": ("model", 6, 384, 1024),
        "llama-8x64": ("model", 12, 576, 512),
        "roberta-large-2x128": ("model", 24, 1024, 256),
        "linears-16x64": ("model", 6, 384, 1024),
        "roberta-large-layer-2x128": ("layer", 1, 1024, 256),
        "llama-1b-layer-2x128": ("layer", 1, 2048, 256),
    }
    for name, (kind, layers, hidden, tokens) in sizes.items():
        for dtype in FLOPS:
            for ranks in ("uniform", "mixed"):
                named = {f"layers.{i}": 8 for i in range(6 * layers)}
                if ranks == "mixed":
                    named = {key: (0, 32, 2, 8, 4, 2)[i % 6] for i, key in enumerate(named)}
                work = minimum(
                    [[key] for key in named],
                    dict.fromkeys(named, (hidden, hidden)),
                    named,
                    tokens=tokens,
                    itemsize=4 if dtype == "fp32" else 2,
                )
                yield _timed(
                    f"{name}-{dtype}-{ranks}", kind, work, dtype, 0.8, name.startswith("minilm"),
                    description=f"{name}, training step, {dtype}, {ranks}",
                    shapes={"hidden": hidden}, ranks=named, tokens=tokens, layers=layers,
                )  # fmt: skip


def _operations() -> Iterator[CaseResult]:
    for d in (768, 1024, 2048):
        for m in (256, 1024, 4096):
            varied = (d, m) == (1024, 1024)
            allocations = {"r16": [16]}
            if varied:
                allocations |= {
                    "r8": [8], "r64": [64], "r128": [128],
                    "mixed16": [0, 64, 4, 16, 8, 4], "sparse16": [0, 0, 64, 0, 0, 32],
                }  # fmt: skip
            for ranks, cycle in allocations.items():
                yield from _operation("op", f"op-{d}x{d}", m, d, [d], ranks, cycle)
    for d in (768, 2048):
        yield from _operation("group", f"qkv-{d}", 1024, d, [d, d, d], "r16", [16])
    yield from _operation("op", "op-4096x1024", 256, 4096, [1024], "r16", [16])


def _operation(
    kind: str, label: str, m: int, k: int, sites: list[int], ranks: str, cycle: list[int]
) -> Iterator[CaseResult]:
    for dtype in FLOPS:
        repeats = 6
        names = [f"copies.{i}.{j}" for i in range(repeats) for j in range(len(sites))]
        named = {name: cycle[i % len(cycle)] for i, name in enumerate(names)}
        work = minimum(
            [[f"copies.{i}.{j}" for j in range(len(sites))] for i in range(repeats)],
            {name: (k, sites[int(name[-1])]) for name in names},
            named,
            tokens=m,
            itemsize=4 if dtype == "fp32" else 2,
        )
        mean = sum(cycle) / len(cycle)
        heavier = (0.3 + 0.3 * mean / 16) * 1024 / k * (1 + 300 / m)
        yield _timed(
            f"{label}-m{m}-{ranks}-{dtype}", kind, work, dtype, heavier, False,
            description=f"{k} to {', '.join(map(str, sites))}, {m} tokens, {ranks}, {dtype}",
            shapes={"m": m, "k": k, "n": sum(sites), "sites": len(sites)}, ranks=named,
            tokens=m, layers=repeats, repeats=repeats,
        )  # fmt: skip


def _scoring() -> Iterator[CaseResult]:
    for name in ("minilm-16x64", "llama-8x64"):
        for dtype in FLOPS:
            draw = random.Random(name + dtype)
            over = {"peft": 1.6, "fused": 1.12, "base-only": 1.0}
            yield result(
                f"scoring-{name}-{dtype}",
                "scoring",
                {
                    v: [0.1 * o * draw.gauss(1, 0.01) for _ in range(ROUNDS)]
                    for v, o in over.items()
                },
                dtype=dtype,
                description=f"{name}, {dtype}: one batch of the search, every linear a candidate",
            )


def trained(
    case: str, losses: Mapping[str, Sequence[Sequence[float]]], **fields: Any
) -> CaseResult:
    """A green train case with the given losses, by variant, seed and step; steps take 10 to 13 ms.

    Its searched ranks are 0, 0 and 24, its uniform one 8.
    """
    runs = {name: [list(run) for run in curves] for name, curves in losses.items()}
    rounds, steps = len(runs["peft"]), len(runs["peft"][0])
    seconds = {name: [0.010 + 0.001 * i] * rounds for i, name in enumerate(runs)}
    training = Training(
        weights="made-up weights",
        steps=steps,
        untimed=1,
        rank=8,
        parameters=dict.fromkeys(runs, 1234),
        through_op={name: 3 if "fused" in name else 0 for name in runs},
        search_seconds=1.5,
        losses=runs,
    )
    ranks = {"layers.0.q_proj": 0, "layers.0.k_proj": 0, "layers.0.v_proj": 24}
    return result(case, "train", seconds, **{"ranks": ranks, "training": training, **fields})


def _trainings() -> Iterator[CaseResult]:
    for dtype in FLOPS:
        draw = random.Random(dtype)
        losses = {
            name: [[0.7 - 0.01 * i + draw.gauss(0, 0.01) for i in range(8)] for _ in range(ROUNDS)]
            for name in ("peft", "fused", "peft-searched", "fused-uniform")
        }
        yield trained(f"train-minilm-32x32-{dtype}", losses, dtype=dtype)
