"""The branches of a group as the flat lists an op takes: each source once, scales as numbers."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .. import spec
from ..group import Branch

__all__ = ["Operands", "operands"]


class Operands(NamedTuple):
    """The part of an op's arguments that comes from the branches, one entry a branch but for
    `sources`, the distinct tensors they read, x first.
    """

    sources: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    scales: list[float]
    site: list[int]
    source: list[int]
    dropout: list[float]
    seed: Tensor | None
    implementation: str


def operands(x: Tensor, branches: Sequence[Branch], seed: Tensor | None, chosen: str) -> Operands:
    """Cast every source to the dtype of x and apply the masks.

    Args:
        chosen: what `dispatch.choose` said, "aten" or "triton".

    Raises:
        ValueError: dropout without a seed, beside a mask, or of everything.
    """
    sources, position_of, dropout = [x], [], []
    for j, branch in enumerate(branches):
        source = x if branch.source is None else branch.source
        if source.dtype != x.dtype:
            source = source.to(x.dtype)
        mask, p = branch.mask, branch.dropout
        # Probabilities are multiples of 2^-16: the next one below 1 is the largest.
        if p and (seed is None or not 0 <= p <= 1 - 2**-16 or mask is not None):
            raise ValueError(
                f"branch {j}: dropout {p} needs a seed, 0 <= p <= 1 - 2^-16, and no mask"
            )
        if p and seed is not None and chosen == "aten":
            rows = math.prod(source.shape[:-1])
            mask = spec.dropout_mask(seed, j, rows, source.shape[-1], p)
            mask, p = mask.to(x.dtype).view(source.shape), 0.0
        if mask is not None:
            source = source * mask
        dropout.append(p)
        position = next((i for i, known in enumerate(sources) if known is source), len(sources))
        if position == len(sources):
            sources.append(source)
        position_of.append(position)
    b, scales = [], []
    for branch in branches:
        by_tensor = isinstance(branch.scale, Tensor)
        b.append(branch.b * branch.scale if by_tensor else branch.b)
        scales.append(1.0 if by_tensor else float(branch.scale))
    return Operands(
        sources=sources,
        a=[branch.a for branch in branches],
        b=b,
        scales=scales,
        site=[branch.site for branch in branches],
        source=position_of,
        dropout=dropout,
        seed=seed if any(dropout) else None,
        implementation=chosen,
    )
