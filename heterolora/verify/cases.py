"""The cases that rungs 2, 3 and 5 share, and what becomes of one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from heterolora.verify.checks import check_parity, check_repeats, guarded
from heterolora.verify.groups import GROUPS, LARGE, SEEDED
from heterolora.verify.operations import OPERATIONS

__all__ = ["Verdict", "parity_cases", "repeat_cases"]

# One of everything: mixed ranks, chunks of a rank above 128, a split sum, shortcuts, dropout.
_FEW = ("ranks_1_to_4", "rank_160_beside_17", "split_k", "shortcuts", "dropout_large")


class Verdict(NamedTuple):
    """What became of one check.

    Attributes:
        name: unique within its rung.
        problem: what is wrong; None if it holds.
        skipped: why it could not run here; None if it ran.
    """

    name: str
    problem: str | None = None
    skipped: str | None = None


def parity_cases(
    implementation: str, device: str, dtypes: Sequence[str], *, quick: bool = False
) -> Iterator[Verdict]:
    """Every op against the specification.

    Args:
        dtypes: names of torch dtypes.
        quick: fewer of the large groups, and only those for ops other than `group_linear`.
    """
    few = {name: LARGE[name] for name in _FEW}
    for operation in OPERATIONS:
        groups = {**GROUPS, **SEEDED, **(few if quick else LARGE)}
        if operation != "group_linear":
            groups = few if quick else {**SEEDED, **few, "rank_zero": GROUPS["rank_zero"]}
        for name, group in groups.items():
            for label in dtypes:
                # Statistics are sums of squares, which overflow in float16 as specified.
                if operation == "group_score" and label == "float16":
                    continue
                dtype: torch.dtype = getattr(torch, label)
                problem = guarded(
                    check_parity, group, dtype, implementation, operation=operation, device=device
                )
                yield Verdict(f"{operation} {name} {label}", problem)


def repeat_cases(implementation: str, device: str, dtype: torch.dtype) -> Iterator[Verdict]:
    """Every op, three times over."""
    for operation in OPERATIONS:
        for name in _FEW:
            problem = guarded(
                check_repeats,
                LARGE[name],
                dtype,
                implementation,
                operation=operation,
                device=device,
            )
            yield Verdict(f"{operation} {name} repeats", problem)
