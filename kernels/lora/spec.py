"""The meaning of every op in plain PyTorch, any dtype up to float64: slow, obvious, the oracle."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Branch, Site, as_matrix

__all__ = [
    "PHILOX_ROUNDS",
    "BranchScore",
    "GroupGradients",
    "dropout_mask",
    "group_linear",
    "group_linear_backward",
    "group_score",
    "low_rank_add",
]

PHILOX_ROUNDS = 7
_LOW32 = 0xFFFFFFFF


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


@dataclass(frozen=True)
class BranchScore:
    """What saliency proxies need of the gradients dA and dB of one branch, without the gradients.

    The trace of a Gram matrix is the squared Frobenius norm, its eigenvalues are the squared
    singular values. The absolute sums are SNIP's: the gradient of all-ones masks on A and B.

    Attributes:
        gram_a: [r, r], dA dA^T.
        gram_b: [r, r], dB^T dB.
        abs_a: scalar, sum|A * dA|.
        abs_b: scalar, sum|B * dB|.
    """

    gram_a: Tensor
    gram_b: Tensor
    abs_a: Tensor
    abs_b: Tensor


def group_linear(
    x: Tensor, sites: Sequence[Site], branches: Sequence[Branch], seed: Tensor | None = None
) -> list[Tensor]:
    """``y_i = x W_i^T + b_i + sum_j s_j ((u_j * mask_j) A_j^T) B_j^T`` for every site i.

    Args:
        x: [..., k], read by every site.
        sites: the frozen layers, weights [n_i, k].
        branches: the low-rank additions, from x or from a source of their own.
        seed: int64 scalar; needed where a branch has dropout.

    Returns:
        [..., n_i] for each site.
    """
    outputs = []
    for index, site in enumerate(sites):
        y = x @ site.weight.T
        if site.bias is not None:
            y = y + site.bias
        for j, branch in enumerate(branches):
            if branch.site == index:
                u = _source(x, branch) * _mask(x, branch, j, seed)
                y = y + branch.scale * ((u @ branch.a.T) @ branch.b.T)
        outputs.append(y)
    return outputs


def low_rank_add(
    outputs: Sequence[Tensor], x: Tensor, branches: Sequence[Branch], seed: Tensor | None = None
) -> list[Tensor]:
    """``y_i + sum_j s_j ((u_j * mask_j) A_j^T) B_j^T``, for base layers that ran by themselves.

    Its gradients are those of :func:`group_linear_backward` without the term of the base, and dY
    itself for the outputs.

    Args:
        outputs: y_i, [..., n_i] for each site; not changed.
    """
    results = list(outputs)
    for j, branch in enumerate(branches):
        u = _source(x, branch) * _mask(x, branch, j, seed)
        part = branch.scale * ((u @ branch.a.T) @ branch.b.T)
        results[branch.site] = results[branch.site] + part
    return results


def group_linear_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    seed: Tensor | None = None,
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
    for j, branch in enumerate(branches):
        dy, mask = grads[branch.site], _mask(x, branch, j, seed)
        u = _source(x, branch) * mask
        s, ds = u @ branch.a.T, branch.scale * (dy @ branch.b)
        d_b.append(branch.scale * (as_matrix(dy).T @ as_matrix(s)))
        d_a.append(as_matrix(ds).T @ as_matrix(u))
        du = (ds @ branch.a) * mask
        if branch.source is None:
            dx = dx + du
        d_source.append(None if branch.source is None else du)
    d_bias = [
        None if site.bias is None else as_matrix(dy).sum(0)
        for dy, site in zip(grads, sites, strict=True)
    ]
    return GroupGradients(x=dx, source=d_source, bias=d_bias, a=d_a, b=d_b)


def group_score(
    grads: Sequence[Tensor],
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    seed: Tensor | None = None,
    previous_a: Sequence[Tensor] = (),
    previous_b: Sequence[Tensor] = (),
) -> list[BranchScore]:
    """Statistics of the gradients of A and B, summed over batches as in HeteroLoRA (2406.14956).

    ``dA = previous_a + dS^T (u * mask)`` and ``dB = previous_b + s dY^T S``, where dS and S are
    those of :func:`group_linear_backward`; see :class:`BranchScore` for what is made of them.

    Args:
        grads: dY_i of the last batch, [..., n_i] for each site.
        previous_a: [r, k_source] for each branch, the sum of dA over earlier batches; or empty.
        previous_b: [n, r] for each branch, the sum of dB over earlier batches; or empty.

    Returns:
        One for each branch, in the caller's order.
    """
    gradients = group_linear_backward(grads, x, sites, branches, seed)
    scores = []
    for j, branch in enumerate(branches):
        d_a, d_b = gradients.a[j], gradients.b[j]
        if previous_a:
            d_a, d_b = d_a + previous_a[j], d_b + previous_b[j]
        abs_a, abs_b = (branch.a * d_a).abs().sum(), (branch.b * d_b).abs().sum()
        scores.append(BranchScore(d_a @ d_a.T, d_b.T @ d_b, abs_a, abs_b))
    return scores


def dropout_mask(seed: Tensor, branch: int, rows: int, columns: int, p: float) -> Tensor:
    """The mask of one branch: 0 with probability p, else 1 / (1 - p), with p rounded to 2^-16.

    Philox-4x32 with 7 rounds, the fewest that pass BigCrush (Salmon et al., "Parallel random
    numbers: as easy as 1, 2, 3", 2011). One call, of counter (row, column // 8, branch, 0) and the
    seed as key, decides eight neighbouring columns by its eight 16-bit halves, low half first.

    Args:
        seed: int64 scalar.

    Returns:
        [rows, columns], float64, on the device of the seed.
    """
    device = seed.device
    row = torch.arange(rows, device=device)[:, None]
    block = torch.arange(-(-columns // 8), device=device)[None, :]
    c = [row + 0 * block, block + 0 * row, torch.full_like(row + block, branch), 0 * (row + block)]
    key = [seed & _LOW32, (seed >> 32) & _LOW32]
    for _ in range(PHILOX_ROUNDS):
        (high0, low0), (high1, low1) = _multiply(c[0], 0xD2511F53), _multiply(c[2], 0xCD9E8D57)
        c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _LOW32, (key[1] + 0xBB67AE85) & _LOW32]
    halves = torch.stack([part for word in c for part in (word & 0xFFFF, word >> 16)], dim=-1)
    threshold = round(p * 65536)
    keep = halves.view(rows, -1)[:, :columns] >= threshold
    return keep.double() * (65536 / (65536 - threshold))


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, which does not fit an int64."""
    low = (a & 0xFFFF) * b
    high = (a >> 16) * b + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _source(x: Tensor, branch: Branch) -> Tensor:
    return x if branch.source is None else branch.source


def _mask(x: Tensor, branch: Branch, index: int, seed: Tensor | None) -> Tensor | float:
    if branch.mask is not None:
        return branch.mask
    if not branch.dropout:
        return 1.0
    if seed is None:
        raise ValueError(f"branch {index} has dropout, which needs a seed")
    u = _source(x, branch)
    mask = dropout_mask(seed, index, as_matrix(u).shape[0], u.shape[-1], branch.dropout)
    return mask.to(u.dtype).view(u.shape)
