"""The train cases: whole runs of `heterolora train`, with a searched allocation and fused, against
the same run by PEFT with one rank everywhere and as many trained parameters.

Every arm goes through :func:`heterolora.train.run.train`, the searched ones with what
:func:`heterolora.allocate` gives. The two arms between tell the effect of the ranks from that of
fusing. Round i of the timing is a run with seed i, which decides the adapters' first weights and
the order of the rows, the same rows in every arm.
"""

import copy
import gc
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from heterolora.bench.cases import peers
from heterolora.bench.cases.reviews import TrainingLoad, to_longest
from heterolora.bench.harness import memory
from heterolora.bench.harness import timing as harness
from heterolora.bench.harness.launches import launches
from heterolora.bench.harness.parity import OpCalls
from heterolora.bench.harness.record import Training
from heterolora.bench.harness.steps import RANK, SEED, Step, adapter_parameters, twin
from heterolora.bench.harness.timing import BenchError, Timing

if TYPE_CHECKING:
    from heterolora.search import Allocation

__all__ = [
    "ARMS",
    "ArmRun",
    "Plan",
    "TrainArm",
    "TrainRecipe",
    "check_device",
    "measure_memory",
    "measure_time",
    "search",
    "through_op",
    "train_arm",
]


@dataclass(frozen=True)
class TrainArm:
    """A variant of a train case.

    Attributes:
        allocation: "uniform" or "searched".
        fused: `train(fused=...)`.
    """

    allocation: str
    fused: bool


ARMS = {
    "peft": TrainArm("uniform", False),
    "fused": TrainArm("searched", True),
    "peft-searched": TrainArm("searched", False),
    "fused-uniform": TrainArm("uniform", True),
}


@dataclass(frozen=True)
class TrainRecipe:
    """What the runs of a case have in common; what is not here is the default of `train`.

    Attributes:
        steps: optimizer steps of a run, one epoch at most.
        untimed: of these, the first ones, without a time.
        gate_steps: of the runs that the gate compares.
        rank: of the uniform allocation; its parameters are the budget of the searched one.
        scoring_batches: what `allocate` sees.
    """

    steps: int = 40
    untimed: int = 5
    gate_steps: int = 20
    rank: int = RANK
    scoring_batches: int = 8


@dataclass(frozen=True)
class Plan:
    """A load and its two allocations, by name, and what the search for the second one took."""

    load: TrainingLoad
    recipe: TrainRecipe
    allocations: "dict[str, Allocation]"

    @property
    def searched(self) -> "Allocation":
        return self.allocations["searched"]


@dataclass(frozen=True)
class ArmRun:
    """One training run.

    Attributes:
        losses: one a step.
        seconds: of a timed step, by the clock of the device and by wall clock.
        adapters_run: adapters through the fused op by step, where they were counted.
        loss_dtype: of the losses as the model returns them.
    """

    losses: list[float]
    seconds: tuple[float, float]
    adapters_run: list[int]
    loss_dtype: torch.dtype


def check_device(device: torch.device) -> None:
    """`train` chooses its device by itself: the first GPU, else the CPU.

    Raises:
        BenchError: it would not choose `device`.
    """
    chosen = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if (device.type, device.index or 0) != (chosen.type, chosen.index or 0):
        raise BenchError(f"`train` runs on {chosen}, not on {device}: leave --device out")


def search(load: TrainingLoad, recipe: TrainRecipe) -> Plan:
    """The searched allocation, by `heterolora.allocate` with its defaults, and the uniform one.

    Raises:
        BenchError: a run would be more than one epoch, whose checkpoint would then be timed; the
            searched allocation has more parameters than the uniform one, or a hundredth less.
    """
    from heterolora.data.text import batches
    from heterolora.search import Budget, SearchSpace, allocate, uniform

    size = _batch_size(load)
    if len(load.rows) < recipe.steps * size:
        raise BenchError(
            f"{recipe.steps} steps of {size} rows are more than the {len(load.rows)} rows there are"
        )
    space = SearchSpace(target_modules=list(load.targets))
    feed = batches(_data(load), count=recipe.scoring_batches, batch_size=size, seed=SEED)
    even = uniform(load.model, recipe.rank, space)
    searched = allocate(load.model, feed, budget=Budget(rank=recipe.rank), space=space, seed=SEED)
    if not 0.99 * even.parameters <= searched.parameters <= even.parameters:
        raise BenchError(
            f"the searched allocation has {searched.parameters} parameters, the uniform one "
            f"{even.parameters}: the arms are not comparable"
        )
    return Plan(load, recipe, {"uniform": even, "searched": searched})


def measure_time(
    plan: Plan, rounds: int, device: torch.device, on_round: Callable[[int], None] | None = None
) -> tuple[Timing, Training]:
    """Runs every arm once a round, seed i in round i: seconds of a step, and all losses."""
    watch = _Taken(harness.stopwatch_for(device).clock)
    losses: dict[str, list[list[float]]] = {name: [] for name in ARMS}

    def arm(name: str) -> Callable[[], None]:
        seeds = count()

        def run() -> None:
            done = train_arm(plan, name, seed=next(seeds))
            watch.seconds = done.seconds
            losses[name].append(done.losses)

        return run

    timing = harness.paired(
        {name: arm(name) for name in ARMS},
        rounds=rounds,
        # The gate has run already, and the first steps of each run are left out.
        warmup=0,
        baseline=peers.BASELINE,
        stopwatch=watch,
        on_round=on_round,
    )
    return timing, Training(
        weights=plan.load.weights,
        steps=plan.recipe.steps,
        untimed=plan.recipe.untimed,
        rank=plan.recipe.rank,
        parameters={name: _trained(_adapted(plan, name, SEED)) for name in ARMS},
        through_op={name: through_op(plan, name) for name in ARMS},
        search_seconds=plan.searched.seconds,
        losses=losses,
    )


def measure_memory(
    plan: Plan, device: torch.device
) -> tuple[dict[str, memory.MemoryUse], dict[str, int]]:
    """Memory of the first three steps of a run, and launches of one step, by arm.

    What is kept for backward and the launches are those of a step as the other cases have it.
    """
    used: dict[str, memory.MemoryUse] = {}
    counted: dict[str, int] = {}
    for name in ARMS:
        model = _adapted(plan, name, SEED)
        # What an earlier run left must not be freed within this one.
        gc.collect()
        resident = memory.resident_bytes([*model.parameters(), *model.buffers()])
        peak = memory.peak_bytes(partial(_run, plan, name, model, steps=3), device)
        step = _step(plan, name)
        saved = memory.saved_bytes(step.forward, exclude=step.tensors())
        used[name] = memory.MemoryUse(resident, peak, saved)
        step()
        counted[name] = launches(step, device)
    return used, counted


def train_arm(
    plan: Plan,
    name: str,
    *,
    seed: int = SEED,
    steps: int | None = None,
    counted: bool = False,
    dtype: torch.dtype | None = None,
) -> ArmRun:
    """One run of an arm, by `heterolora.train.run.train`, from fresh adapters.

    Args:
        steps: default those of the recipe, which alone have a time.
        counted: count the adapters that go through the fused op.
        dtype: turn the adapted model into it; the first weights stay what they are.

    Raises:
        BenchError: the arm is to be fused, and a layer was declined.
    """
    model = _adapted(plan, name, seed)
    if dtype is not None:
        model = copy.deepcopy(model).to(dtype)
    # What refers to itself in a finished run is collected by Trainer when the next one begins.
    return _run(plan, name, model, seed=seed, steps=steps, counted=counted)


def through_op(plan: Plan, name: str) -> int:
    """Adapters of an arm that are to go through the fused op with batches of the load's size."""
    report = _step(plan, name).fuse_report
    return 0 if report is None else len(report.fused)


def _run(
    plan: Plan,
    name: str,
    model: Any,
    *,
    seed: int = SEED,
    steps: int | None = None,
    counted: bool = False,
) -> ArmRun:
    from heterolora.bench.cases.recorder import StepRecorder
    from heterolora.train.run import train

    load, arm = plan.load, ARMS[name]
    watch = harness.stopwatch_for(next(iter(load.inputs.values())).device)
    calls = OpCalls()
    recorder = StepRecorder(
        plan.recipe.untimed, watch, (lambda: calls.adapters["group_linear"]) if counted else None
    )
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if counted:
            stack.enter_context(calls)
        result = train(
            model,
            _data(load),
            output_dir=Path(folder) / "run",
            max_steps=steps or plan.recipe.steps,
            batch_size=_batch_size(load),
            seed=seed,
            fused=arm.fused,
            callbacks=[recorder],
        )
    if arm.fused and (result.report is None or result.report.declined):
        raise BenchError(f"{name}: not every layer could be fused: {result.report}")
    losses = torch.stack([loss.double() for loss in recorder.losses]).tolist()
    return ArmRun(losses, recorder.seconds, recorder.adapters_run, recorder.losses[0].dtype)


class _Taken:
    """The stopwatch of :func:`harness.paired` where a run has taken its own time."""

    def __init__(self, clock: str) -> None:
        self.clock = clock
        self.seconds = (0.0, 0.0)

    def start(self) -> None:
        pass

    def stop(self) -> tuple[float, float]:
        return self.seconds


def _adapted(plan: Plan, name: str, seed: int) -> Any:
    """The model of an arm before training, not fused; its frozen weights are those of the load."""
    from heterolora import unfuse
    from heterolora.search import adapt

    torch.manual_seed(seed)
    model = adapt(twin(plan.load).model, plan.allocations[ARMS[name].allocation])
    unfuse(model)
    return model


def _step(plan: Plan, name: str) -> Step:
    arm = ARMS[name]
    variant = "fused" if arm.fused else peers.BASELINE
    return peers.build_step(variant, twin(plan.load), plan.allocations[arm.allocation].ranks)


def _data(load: TrainingLoad) -> Any:
    """What `train` takes; a list of rows does for a data set of `datasets`."""
    from heterolora.data.text import TokenizedData

    splits: Any = {"train": load.rows}
    return TokenizedData(splits, None, to_longest, load.task, ())


def _batch_size(load: TrainingLoad) -> int:
    return len(load.inputs["input_ids"])


def _trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in adapter_parameters(model).values())
