"""The ops, each as a function from a group to named results, as implemented or as specified."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from heterolora.kernels import group_linear, group_linear_scored, low_rank_add, spec
from heterolora.verify.groups import Draw, Group, dropout_seed, leaves, named_leaves

__all__ = [
    "OPERATIONS",
    "Operation",
    "Results",
    "base_outputs",
    "outputs_and_gradients",
    "statistics",
]

Results = tuple[list[Tensor], list[Tensor]]


class Operation(NamedTuple):
    """One op.

    Attributes:
        run: (group, implementation or "spec", dY or None for random ones) -> (results, dY).
        names: what each result is.
        calls: how often ops of this package run, forward and backward.
    """

    run: Callable[[Group, str, list[Tensor] | None], Results]
    names: Callable[[Group], list[str]]
    calls: Callable[[Group], int]


def outputs_and_gradients(
    group: Group, implementation: str, grads: list[Tensor] | None = None
) -> Results:
    """Outputs of `group_linear` and the gradients of `leaves`, and the dY they were computed with.

    Args:
        implementation: of the op, or "spec".
        grads: dY of each site; random if not given.
    """
    seed = dropout_seed(group[0].device.type)
    if implementation == "spec":
        outputs = spec.group_linear(*group, seed)
    else:
        outputs = group_linear(*group, seed=seed, implementation=implementation)
    return _with_gradients(group, outputs, grads)


def base_outputs(group: Group) -> list[Tensor]:
    """What `low_rank_add` adds to: rows that are all equal, the bias or a column of the weight."""
    x, sites, _ = group
    rows = [site.weight[:, 0] if site.bias is None else site.bias for site in sites]
    return [row.expand(*x.shape[:-1], row.shape[0]).clone() for row in rows]


def _added(group: Group, implementation: str, grads: list[Tensor] | None = None) -> Results:
    x, _, branches = group
    seed = dropout_seed(x.device.type)
    if implementation == "spec":
        outputs = spec.low_rank_add(base_outputs(group), x, branches, seed)
    else:
        outputs = low_rank_add(
            base_outputs(group), x, branches, seed=seed, implementation=implementation
        )
    return _with_gradients(group, outputs, grads)


def _with_gradients(group: Group, outputs: list[Tensor], grads: list[Tensor] | None) -> Results:
    grads = grads or _grads(group, outputs)
    able = [i for i, y in enumerate(outputs) if y.requires_grad]
    found = torch.autograd.grad(
        [outputs[i] for i in able],
        leaves(group),
        [grads[i] for i in able],
        materialize_grads=True,
    )
    return [*outputs, *found], grads


def _scored(group: Group, implementation: str, grads: list[Tensor] | None = None) -> Results:
    """Statistics of the second of two batches, the first of which gave a sum of twos."""
    x, sites, branches = group
    branches = [replace(branch, scale=float(branch.scale)) for branch in branches]
    seed = dropout_seed(x.device.type)
    earlier = [(torch.full_like(b.a, 2.0), torch.full_like(b.b, 2.0)) for b in branches]
    sums_a, sums_b = [pair[0] for pair in earlier], [pair[1] for pair in earlier]
    if implementation == "spec":
        outputs = spec.group_linear(x, sites, branches, seed)
        grads = grads or _grads(group, outputs)
        with torch.no_grad():
            scores = spec.group_score(grads, x, sites, branches, seed, sums_a, sums_b)
        return [part for score in scores for part in statistics(score)], grads
    records: list[list[spec.BranchScore | None]] = []
    outputs = group_linear_scored(
        x,
        sites,
        branches,
        records.append,
        previous=earlier,
        seed=seed,
        implementation=implementation,
    )
    grads = grads or _grads(group, outputs)
    torch.autograd.grad(outputs, [x], grads)
    (found,) = records
    return [part for score in found if score for part in statistics(score)], grads


def statistics(score: spec.BranchScore) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the order of `Operation.names`."""
    return score.gram_a, score.gram_b, score.abs_a, score.abs_b


def _grads(group: Group, outputs: list[Tensor]) -> list[Tensor]:
    draw = Draw(group[0].dtype, device=group[0].device.type, seed=1)
    return [draw.tensor(*y.shape, grad=False) for y in outputs]


def _result_names(group: Group) -> list[str]:
    outputs = [f"output {i}" for i in range(len(group[1]))]
    return outputs + list(named_leaves(group).values())


def _score_names(group: Group) -> list[str]:
    fields = ("Gram of dA", "Gram of dB", "sum |A dA|", "sum |B dB|")
    return [f"{field} of branch {j}" for j in range(len(group[2])) for field in fields]


def _two(group: Group) -> int:
    return 2


def _two_if_any(group: Group) -> int:
    """Nothing to add is no call, and hands dY on by itself."""
    return 2 if any(branch.a.shape[0] for branch in group[2]) else 0


OPERATIONS = {
    "group_linear": Operation(outputs_and_gradients, _result_names, _two),
    "low_rank_add": Operation(_added, _result_names, _two_if_any),
    "group_score": Operation(_scored, _score_names, _two),
}
