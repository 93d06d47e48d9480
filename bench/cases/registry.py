"""The registry of cases."""

import fnmatch
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from heterolora.bench.cases import peers, scoring, training
from heterolora.bench.cases.groups import copies, group, shortcut_step
from heterolora.bench.cases.shapes import GROUPS, LAYERS, MODELS, OPERATIONS, TRAINED, Shape
from heterolora.bench.harness.parity import Parity, check_parity
from heterolora.bench.harness.steps import Step, Workload, mixed_ranks, sparse_ranks, uniform_ranks
from heterolora.bench.harness.timing import BenchError

__all__ = ["CASES", "Case", "select"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of one step; a CPU core does some 1e11 a second. What is beyond is left to a GPU unless named.
_CPU_FLOPS = {
    "op": 7e10, "group": 1.6e11, "layer": 3e11, "model": 4e11, "scoring": 1e11, "train": 1e11
}  # fmt: skip
_RANKS: dict[str, Callable[[Mapping[str, tuple[int, int]]], dict[str, int]]] = {
    "uniform": uniform_ranks,
    "mixed": mixed_ranks,
    **{f"r{rank}": partial(uniform_ranks, rank=rank) for rank in (8, 16, 64, 128)},
    "mixed16": partial(mixed_ranks, rank=16),
    "sparse16": partial(sparse_ranks, rank=16),
}
_STEPS = tuple(peers.VARIANTS)
_WITH_SHORTCUT = (peers.BASELINE, "fused", peers.FLOOR, peers.LOW_PRECISION)

# variant, workload, ranks by module name, dropout
BuildStep = Callable[[str, Workload, Mapping[str, int], float], Step]


def _peft_step(variant: str, load: Workload, ranks: Mapping[str, int], dropout: float) -> Step:
    return peers.build_step(variant, load, ranks, dropout=dropout)


def _shortcut_step(variant: str, load: Workload, ranks: Mapping[str, int], dropout: float) -> Step:
    if variant == peers.FLOOR:
        return peers.build_step(variant, load, ranks)
    return shortcut_step(variant, load, ranks)


@dataclass(frozen=True)
class Case:
    """One line of the benchmark: a training step of one workload, dtype and allocation, or runs of
    such steps.

    Attributes:
        name: unique, also the name of the result file.
        kind: "op" (one linear), "group" (several on one input), "layer", "model", "scoring"
            or "train" (whole runs).
        description: one line for `--list`.
        build: (dtype, device) -> a fresh workload, the same weights and batch on every call.
        shapes: sizes for the record.
        dtype: "fp32" or "bf16", of the base model; adapters are as PEFT makes them (fp32).
        ranks: name of an allocation.
        flops: of one step, roughly; decides whether a CPU runs it unasked.
        quick: small enough for `--quick`; a check of the bench, not a result.
        dropout: of the adapters' input.
        variants: what is timed, where it applies.
        step: makes a variant's step.
        parity: the gate, (PEFT step, fused step, and for a group alone in low precision the step of
            PEFT with adapters in that precision) -> outcome.
        recipe: of the runs of a train case, None of all others.
    """

    name: str
    kind: str
    description: str
    build: Callable[[torch.dtype, torch.device], Workload]
    shapes: Mapping[str, int]
    dtype: str
    ranks: str
    flops: float
    quick: bool = False
    dropout: float = 0.0
    variants: tuple[str, ...] = _STEPS
    step: BuildStep = _peft_step
    parity: Callable[..., Parity] = check_parity
    recipe: training.TrainRecipe | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU runs it unasked. Active dropout is fused by the Triton kernels only, and
        `train` takes a GPU where there is one.
        """
        taken = self.recipe is not None and torch.cuda.is_available()
        return self.flops <= _CPU_FLOPS[self.kind] and not self.dropout and not taken

    @property
    def described(self) -> bool:
        """Whether a step is nothing but groups that dispatch looks up: no scoring pass, no
        shortcut, no ranks that are searched for.
        """
        return self.kind not in ("scoring", "train") and not self.shapes.get("shortcut")

    def ranks_of(self, targets: Mapping[str, tuple[int, int]]) -> dict[str, int]:
        """The rank of every target by name."""
        return _RANKS[self.ranks](targets)


def _built(shape: Shape) -> Callable[[torch.dtype, torch.device], Workload]:
    def build(dtype: torch.dtype, device: torch.device) -> Workload:
        return shape.builder(dtype=dtype, device=device, **shape.sizes)

    return build


def _of_models(shapes: list[Shape], kind: str) -> Iterator[Case]:
    for shape in shapes:
        for dtype in _DTYPES:
            for ranks in ("uniform", "mixed"):
                yield Case(
                    name=f"{shape.name}-{dtype}-{ranks}",
                    kind=kind,
                    description=f"{shape.what}, {shape.batch}, training step, {dtype}, "
                    f"{'r=8' if ranks == 'uniform' else 'mixed ranks'}",
                    build=_built(shape),
                    shapes=shape.sizes,
                    dtype=dtype,
                    ranks=ranks,
                    flops=shape.flops,
                    quick=shape.quick,
                )


def _of_scoring(shapes: list[Shape]) -> Iterator[Case]:
    for shape in shapes:
        for dtype in _DTYPES:
            yield Case(
                name=f"scoring-{shape.name}-{dtype}",
                kind="scoring",
                description=f"{shape.what}, {shape.batch}, {dtype}: one batch of the search, every "
                "linear a candidate",
                build=_built(shape),
                shapes=shape.sizes,
                dtype=dtype,
                ranks="uniform",
                flops=shape.flops,
                quick=shape.quick,
                variants=("peft", "fused", "base-only"),
                step=scoring.build_step,
                parity=scoring.check_parity,
            )


def _of_training(shapes: list[Shape]) -> Iterator[Case]:
    for shape in shapes:
        recipe = (
            training.TrainRecipe(steps=6, untimed=2, gate_steps=4, scoring_batches=2)
            if shape.quick
            else training.TrainRecipe()
        )
        for dtype in _DTYPES:
            if dtype == "fp32" and shape.flops > 1e13:
                continue  # nobody trains a billion frozen weights in float32
            yield Case(
                name=f"train-{shape.name}-{dtype}",
                kind="train",
                description=f"{shape.what}, {shape.batch}, {dtype}, {recipe.steps} steps of "
                f"`train` with as many parameters as r={recipe.rank}",
                build=_built(shape),
                shapes=shape.sizes,
                dtype=dtype,
                ranks="uniform",
                flops=shape.flops,
                quick=shape.quick,
                variants=tuple(training.ARMS),
                recipe=recipe,
            )


def _of_group(
    kind: str,
    label: str,
    m: int,
    k: int,
    sites: Mapping[str, int],
    ranks: str,
    *,
    multiple: int = 1,
    dropout: float = 0.0,
    shortcut: bool = False,
) -> Iterator[Case]:
    n = sum(sites.values())
    extra = (f", dropout {dropout:g}" if dropout else "") + (", shortcut" if shortcut else "")
    suffix = ("-dropout" if dropout else "") + ("-shortcut" if shortcut else "")
    for dtype, torch_dtype in _DTYPES.items():
        # Mixed lists need whole cycles of six, and what they are compared with needs the same.
        repeats = copies(m, k, n, torch_dtype.itemsize, multiple=multiple)

        def build(dtype: torch.dtype, device: torch.device, repeats: int = repeats) -> Workload:
            return group(
                m=m,
                k=k,
                sites=sites,
                repeats=repeats,
                shortcut=shortcut,
                dtype=dtype,
                device=device,
            )

        yield Case(
            name=f"{label}-m{m}-{ranks}-{dtype}{suffix}",
            kind=kind,
            description=f"{k} to {', '.join(map(str, sites.values()))}, {m} tokens, {ranks}, "
            f"{dtype}{extra}",
            build=build,
            shapes={"m": m, "k": k, "n": n, "sites": len(sites), "shortcut": int(shortcut)},
            dtype=dtype,
            ranks=ranks,
            flops=4.0 * m * k * n * repeats,
            dropout=dropout,
            variants=_WITH_SHORTCUT if shortcut else _STEPS,
            step=_shortcut_step if shortcut else _peft_step,
            parity=partial(check_parity, covers_all=False) if shortcut else check_parity,
        )


def _operations() -> Iterator[Case]:
    for k, n in OPERATIONS.shapes:
        one = partial(_of_group, "op", f"op-{k}x{n}", k=k, sites={"proj": n})
        for m in OPERATIONS.tokens:
            varied = (k, n, m) in OPERATIONS.varied
            for ranks in OPERATIONS.ranks if varied else ["r16"]:
                yield from one(m=m, ranks=ranks, multiple=6 if varied else 1)
            if varied:
                yield from one(m=m, ranks="r16", dropout=0.1)
                yield from one(m=m, ranks="r16", shortcut=True)
    for d, m in OPERATIONS.small:
        yield from _of_group("op", f"op-{d}x{d}", m, d, {"proj": d}, "r16")


def _groups() -> Iterator[Case]:
    for label, (k, sites) in GROUPS.items():
        for m in (64, 256, 1024, 8192):
            for ranks in ("r16", "mixed16"):
                yield from _of_group("group", label, m, k, sites, ranks, multiple=6)


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        *_of_models(MODELS, "model"),
        *_of_models(LAYERS, "layer"),
        *_of_scoring([shape for shape in MODELS if shape.scored]),
        *_of_training(TRAINED),
        *_operations(),
        *_groups(),
    ]
}


def select(patterns: list[str] | None, *, quick: bool = False, device: str = "cpu") -> list[Case]:
    """Cases whose name matches any of the shell patterns; without patterns all that suit `device`,
    or the quick ones.

    Raises:
        BenchError: a pattern matches nothing.
    """
    if not patterns:
        # The quick cases check the bench itself; among real results they would only be noise.
        suited = [case for case in CASES.values() if device != "cpu" or case.on_cpu]
        return [case for case in suited if case.quick == quick]
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        matched = fnmatch.filter(CASES, pattern)
        if not matched:
            raise BenchError(f"no case matches {pattern!r}; --list shows all {len(CASES)}")
        chosen.update((name, CASES[name]) for name in matched)
    return list(chosen.values())
