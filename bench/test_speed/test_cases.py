"""The bench's registry under pytest-benchmark, one benchmark for each case and variant.

`pytest bench` runs the quick cases, `pytest bench --bench-case 'linears-*'` any others. It is meant
for watching one variant over time in a CI: pytest-benchmark times the variants one after another,
by wall clock. For their ratios use `heterolora bench`, which interleaves them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from heterolora.bench import runner
from heterolora.bench.cases import peers
from heterolora.bench.cases import registry as cases
from heterolora.bench.harness import record
from heterolora.bench.harness import timing as harness
from heterolora.bench.harness.parity import Parity
from heterolora.bench.harness.steps import Workload
from heterolora.bench.harness.timing import BenchError

pytest.importorskip("pytest_benchmark")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WARMUP = 2


@dataclass(frozen=True)
class Prepared:
    """A case that has been through its gate."""

    case: cases.Case
    load: Workload
    ranks: dict[str, int]
    parity: Parity
    skipped: dict[str, str]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    compiled = metafunc.config.getoption("--bench-compile")
    try:
        chosen = cases.select(metafunc.config.getoption("--bench-case"), quick=True)
    except BenchError as error:
        raise pytest.UsageError(f"--bench-case: {error}") from error
    pairs = [
        pytest.param(case.name, variant, id=f"{case.name}-{variant}")
        for case in chosen
        # Whole runs are no benchmark's single call.
        if case.recipe is None
        for variant in case.variants
        if compiled or variant not in peers.COMPILED
    ]
    metafunc.parametrize(("name", "variant"), pairs)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with harness.cpu_threads(1):
        yield


@pytest.fixture(scope="module")
def environment(one_thread: None) -> dict[str, Any]:
    return record.environment(DEVICE, [])


@pytest.fixture(scope="module")
def kept() -> dict[str, Prepared]:
    """The case whose variants are being timed: large models do not fit twice."""
    return {}


def prepare(case: cases.Case) -> Prepared:
    load = case.build(case.torch_dtype, DEVICE)
    ranks = case.ranks_of(load.targets)
    _, skipped = runner.variants(case, load, ranks, DEVICE, compiled=True)
    parity, _ = runner.gate(case, load, ranks)
    return Prepared(case, load, ranks, parity, skipped)


def test_case(
    name: str,
    variant: str,
    kept: dict[str, Prepared],
    environment: dict[str, Any],
    benchmark: Any,
) -> None:
    if name not in kept:
        kept.clear()
        kept[name] = prepare(cases.CASES[name])
    prepared = kept[name]
    case = prepared.case
    if variant in prepared.skipped:
        pytest.skip(prepared.skipped[variant])
    if not prepared.parity.green:
        pytest.fail(f"{case.name} is red, not timed. {prepared.parity.reason}", pytrace=False)
    step = runner.build(case, variant, prepared.load, prepared.ranks)

    def until_done() -> None:
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    for _ in range(WARMUP):
        until_done()
    benchmark.group = case.name
    benchmark.extra_info.update(
        case=case.name,
        variant=variant,
        shapes=dict(case.shapes),
        dtype=case.dtype,
        ranks=summary_of(prepared.ranks, case.ranks),
        repeats=prepared.load.repeats,
        device=environment["device"],
        threads=environment["threads"],
        versions=environment["versions"],
        commit=environment["commit"],
    )
    benchmark(until_done)


def summary_of(ranks: dict[str, int], name: str) -> dict[str, Any]:
    """The allocation's name, how many ranks, how many of them 0, lowest, highest and sum."""
    values = list(ranks.values())
    return {
        "allocation": name,
        "layers": len(values),
        "zeros": values.count(0),
        "lowest": min(values),
        "highest": max(values),
        "sum": sum(values),
    }
