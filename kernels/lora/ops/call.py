"""A `Call` from what the user gives: checked, cast, and each distinct source once."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import spec
from ..dispatch import choose
from ..group import Branch, Call, Site

__all__ = ["added_call", "group_call"]


def group_call(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    seed: Tensor | None,
    implementation: str,
) -> Call:
    """The operands of `group_linear`, which documents the arguments and what is refused."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        sites = [
            Site(site.weight.to(dtype), None if site.bias is None else site.bias.to(dtype))
            for site in sites
        ]
    _check_x(x)
    _check_sites(x, sites)
    _check_branches(x, branches, [site.weight.shape[0] for site in sites], "site")
    return _call(x, sites, branches, seed, implementation)


def added_call(
    outputs: Sequence[Tensor],
    x: Tensor,
    branches: Sequence[Branch],
    seed: Tensor | None,
    implementation: str,
) -> Call:
    """The operands of `low_rank_add`, which says what is refused, in the dtype of the outputs."""
    _check_x(x)
    _check_outputs(x, outputs)
    _check_branches(x, branches, [y.shape[-1] for y in outputs], "output")
    return _call(x.to(outputs[0].dtype), (), branches, seed, implementation)


def _call(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    seed: Tensor | None,
    implementation: str,
) -> Call:
    factors = [factor for branch in branches for factor in (branch.a, branch.b)]
    chosen = choose(implementation, x, factors, sites, branches)
    sources, branch_source, dropout = [x], [], []
    b, scales = [], []
    for j, branch in enumerate(branches):
        source, p = _input(x, branch, j, seed, chosen)
        position = next((i for i, known in enumerate(sources) if known is source), len(sources))
        if position == len(sources):
            sources.append(source)
        branch_source.append(position)
        dropout.append(p)
        by_tensor = isinstance(branch.scale, Tensor)
        b.append(branch.b * branch.scale if by_tensor else branch.b)
        scales.append(1.0 if by_tensor else float(branch.scale))
    return Call(
        sources=sources,
        weights=[site.weight for site in sites],
        biases=[site.bias for site in sites],
        a=[branch.a for branch in branches],
        b=b,
        seed=seed if any(dropout) else None,
        scales=scales,
        branch_site=[branch.site for branch in branches],
        branch_source=branch_source,
        dropout=dropout,
        implementation=chosen,
    )


def _input(
    x: Tensor, branch: Branch, index: int, seed: Tensor | None, implementation: str
) -> tuple[Tensor, float]:
    """What a branch reads, in the dtype of x and masked, and the dropout left to the kernels."""
    source = x if branch.source is None else branch.source
    if source.dtype != x.dtype:
        source = source.to(x.dtype)
    mask, p = branch.mask, branch.dropout
    # Probabilities are multiples of 2^-16: the next one below 1 is the largest.
    if p and (seed is None or not 0 <= p <= 1 - 2**-16 or mask is not None):
        raise ValueError(
            f"branch {index}: dropout {p} needs a seed, 0 <= p <= 1 - 2^-16, and no mask"
        )
    if p and seed is not None and implementation == "aten":
        rows = math.prod(source.shape[:-1])
        mask = spec.dropout_mask(seed, index, rows, source.shape[-1], p)
        mask, p = mask.to(x.dtype).view(source.shape), 0.0
    return source if mask is None else source * mask, p


def _check_x(x: Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [..., k], got {x.dtype} {tuple(x.shape)}")


def _check_sites(x: Tensor, sites: Sequence[Site]) -> None:
    if not sites:
        raise ValueError("group_linear needs at least one site")
    for i, site in enumerate(sites):
        weight, bias = site.weight, site.bias
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"site {i}: weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}"
            )
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            raise ValueError(f"site {i}: weight and bias must be {x.dtype} like x")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"site {i}: bias {tuple(bias.shape)} does not fit the weight")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"site {i}: base weights are frozen here, but this one needs a grad")


def _check_outputs(x: Tensor, outputs: Sequence[Tensor]) -> None:
    first = outputs[0]
    for i, y in enumerate(outputs):
        if not y.is_floating_point() or (y.dtype, y.device) != (first.dtype, x.device):
            raise ValueError(
                f"output {i}: {y.dtype} on {y.device}, but all must be of one float dtype on "
                f"{x.device} like x; output 0 is {first.dtype}"
            )
        if y.dim() == 0 or y.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"output {i}: {tuple(y.shape)} differs from x {tuple(x.shape)} before the last dim"
            )


def _check_branches(x: Tensor, branches: Sequence[Branch], ns: Sequence[int], what: str) -> None:
    """Check every branch against the sites or outputs that they add to, n of each."""
    for j, branch in enumerate(branches):
        if not 0 <= branch.site < len(ns):
            raise ValueError(f"branch {j}: no {what} {branch.site} among {len(ns)}")
        source = x if branch.source is None else branch.source
        if source.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"source {tuple(source.shape)} differs from x {tuple(x.shape)} before the last dim"
            )
        k, rank, n = source.shape[-1], branch.a.shape[0], ns[branch.site]
        if tuple(branch.a.shape) != (rank, k) or tuple(branch.b.shape) != (n, rank):
            raise ValueError(
                f"branch {j}: A {tuple(branch.a.shape)} and B {tuple(branch.b.shape)} are not "
                f"[r, {k}] and [{n}, r]"
            )
