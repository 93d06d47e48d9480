"""The meaning of every op in plain PyTorch, any dtype up to float64: slow, obvious, the oracle."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import Branch, Site

__all__ = ["GroupGradients", "group_linear", "group_linear_backward"]


@dataclass(frozen=True)
class GroupGradients:
    """Gradients of a group, one entry for each input in the caller's order.

    Attributes:
        x: same shape as x.
        source: one per branch, shaped like its source; None where the source is x: see `x`.
        bias: [n], one per site; None for a site without bias.
        a: [r, k_source], one per branch.
        b: [n, r], one per branch.
    """

    x: Tensor
    source: list[Tensor | None]
    bias: list[Tensor | None]
    a: list[Tensor]
    b: list[Tensor]


def group_linear(x: Tensor, sites: Sequence[Site], branches: Sequence[Branch]) -> list[Tensor]:
    """``y_i = x W_i^T + b_i + sum_j s_j ((u_j * mask_j) A_j^T) B_j^T`` for every site i.

    Args:
        x: [..., k], read by every site.
        sites: the frozen layers, weights [n_i, k].
        branches: the low-rank additions, from x or from a source of their own.

    Returns:
        [..., n_i] for each site.
    """
    outputs = []
    for index, site in enumerate(sites):
        y = x @ site.weight.T
        if site.bias is not None:
            y = y + site.bias
        for branch in branches:
            if branch.site == index:
                u = _masked(_source(x, branch), branch)
                y = y + branch.scale * ((u @ branch.a.T) @ branch.b.T)
        outputs.append(y)
    return outputs


def group_linear_backward(
    grads: Sequence[Tensor], x: Tensor, sites: Sequence[Site], branches: Sequence[Branch]
) -> GroupGradients:
    """Gradients of :func:`group_linear` written out, not derived by autograd.

    With ``S = (u * mask) A^T`` and ``dS = s dY B``: ``dB = s dY^T S``, ``dA = dS^T (u * mask)``,
    ``du = (dS A) * mask``, ``dx = sum_i dY_i W_i`` plus the du of the branches that read x.

    Args:
        grads: dY_i, [..., n_i] for each site.
    """
    dx = sum((dy @ site.weight for dy, site in zip(grads, sites, strict=True)), torch.zeros_like(x))
    d_source: list[Tensor | None] = []
    d_a, d_b = [], []
    for branch in branches:
        dy = grads[branch.site]
        u = _masked(_source(x, branch), branch)
        s, ds = u @ branch.a.T, branch.scale * (dy @ branch.b)
        d_b.append(branch.scale * (_rows(dy).T @ _rows(s)))
        d_a.append(_rows(ds).T @ _rows(u))
        du = _masked(ds @ branch.a, branch)
        if branch.source is None:
            dx = dx + du
        d_source.append(None if branch.source is None else du)
    d_bias = [
        None if site.bias is None else _rows(dy).sum(0)
        for dy, site in zip(grads, sites, strict=True)
    ]
    return GroupGradients(x=dx, source=d_source, bias=d_bias, a=d_a, b=d_b)


def _source(x: Tensor, branch: Branch) -> Tensor:
    return x if branch.source is None else branch.source


def _masked(u: Tensor, branch: Branch) -> Tensor:
    return u if branch.mask is None else u * branch.mask


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
