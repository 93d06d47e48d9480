"""`heterolora bench --explain`: which path a group takes here, and what was measured of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from heterolora.bench.cases import peers
from heterolora.bench.harness.timing import BenchError
from heterolora.kernels.dispatch import Choice, decide
from heterolora.kernels.tuned.measured import GroupShape, LowRank, device_name, shipped_for

if TYPE_CHECKING:
    from rich.console import Console

    from heterolora.bench.cases.registry import Case

__all__ = ["CaseExplained", "GroupExplained", "as_json", "explain_case", "print_explained"]

SCHEMA_VERSION = 2
_KIND = "heterolora.bench.explain"


@dataclass(frozen=True)
class GroupExplained:
    """Groups of one shape.

    Attributes:
        modules: the names of each such group's layers.
        shape: what dispatch looks up.
        choice: what "auto" runs, and why.
    """

    modules: tuple[tuple[str, ...], ...]
    shape: GroupShape
    choice: Choice


@dataclass(frozen=True)
class CaseExplained:
    """One case on one device, by the name it is known by."""

    case: str
    description: str
    device: str
    groups: list[GroupExplained]


def explain_case(case: "Case", device: torch.device) -> CaseExplained:
    """The groups of `case`. The model is built on the CPU and run once to find them.

    Raises:
        BenchError: a case that is more than the training steps of one model.
    """
    if not case.described:
        raise BenchError(f"{case.name}: only training steps without shortcuts can be explained")
    name = device_name(device)
    groups = [
        GroupExplained(tuple(modules), shape, _choice(shape, name, device.type == "cuda"))
        for shape, modules in _shapes(case).items()
    ]
    return CaseExplained(case.name, case.description, name, groups)


def _choice(shape: GroupShape, device: str, on_gpu: bool) -> Choice:
    if not shape.live:
        return Choice("base", "no adapter")
    among = ("peft", "aten", "triton") if on_gpu else ("peft", "aten")
    if on_gpu and any(branch.dropout for branch in shape.live):
        among = ("peft", "triton")
    return decide(shape, shipped_for(device), among)


def _shapes(case: "Case") -> dict[GroupShape, list[tuple[str, ...]]]:
    """The distinct shapes among the case's groups, in model order, and who has them."""
    load = case.build(case.torch_dtype, torch.device("cpu"))
    ranks = case.ranks_of(load.targets)
    with_bias = {name: load.model.get_submodule(name).bias is not None for name in load.targets}
    shapes, tokens = load.targets, load.tokens
    groups = peers.build_step("fused", load, ranks).fuse_report.groups
    group_of = {name: group for group in groups for name in group}
    found: dict[GroupShape, list[tuple[str, ...]]] = {}
    for group in dict.fromkeys(group_of.get(name, (name,)) for name in shapes):
        shape = GroupShape(
            tokens,
            (shapes[group[0]][0],),
            tuple(shapes[name][1] for name in group),
            tuple(
                LowRank(ranks[name], i, dropout=case.dropout > 0) for i, name in enumerate(group)
            ),
            itemsize=case.torch_dtype.itemsize,
            # PEFT keeps adapters in float32.
            factor_itemsize=4,
            bias=any(with_bias[name] for name in group),
        )
        found.setdefault(shape, []).append(group)
    return found


def print_explained(out: "Console", explained: CaseExplained) -> None:
    """A line a group."""
    from rich.text import Text

    out.print(Text(f"{explained.case}: {explained.description}; {explained.device}", style="bold"))
    for group in explained.groups:
        shape = group.shape
        ranks = ", ".join(str(branch.rank) for branch in shape.branches)
        line = (
            f"{_label(group.modules)}: m {shape.m}, k {shape.sources[0]}, "
            f"n {', '.join(map(str, shape.sites))}, r {ranks}; {group.choice.path}: "
            f"{group.choice.reason}"
        )
        out.print(Text(line), soft_wrap=True)


def _label(groups: Sequence[tuple[str, ...]]) -> str:
    parent, _, first = groups[0][0].rpartition(".")
    inside = all(name.rpartition(".")[0] == parent for name in groups[0])
    others = [name.rpartition(".")[2] if inside else name for name in groups[0][1:]]
    label = " + ".join([f"{parent}.{first}" if parent else first, *others])
    return label if len(groups) == 1 else f"{label} and {len(groups) - 1} alike"


def as_json(explained: Sequence[CaseExplained]) -> dict[str, Any]:
    """All cases, in plain types."""
    return {
        "kind": _KIND,
        "schema_version": SCHEMA_VERSION,
        "cases": [
            {
                "case": case.case,
                "device": case.device,
                "groups": [
                    {
                        "modules": group.modules,
                        "shape": dataclasses.asdict(group.shape),
                        "chosen": group.choice.path,
                        "reason": group.choice.reason,
                    }
                    for group in case.groups
                ],
            }
            for case in explained
        ],
    }
