"""The group ops by matmul and addmm: the CPU path, and the baseline a Triton kernel has to beat.

The low-rank product is written first and the base matmul accumulates onto it (beta = 1), so no
intermediate of the size of the output is ever made. A and B are cast to the dtype of x; x, the
large one, never is.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import GroupLayout

__all__ = ["group_linear", "group_linear_backward", "low_rank_add"]


def group_linear(
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: GroupLayout,
) -> tuple[list[Tensor], Tensor]:
    """Forward of a group.

    Args:
        sources: distinct inputs [..., k_i] with equal leading dimensions; the first is x.
        weights: [n_i, k] for each site, in the dtype of x.
        biases: [n_i] or None for each site, in the dtype of x.
        a: [r_j, k_source] for each branch, any float dtype.
        b: [n_site, r_j] for each branch, any float dtype.
        scales: for each branch.
        layout: packing of the branches in S.

    Returns:
        The outputs [..., n_i] in the dtype of x, and S [m, layout.columns] for the backward pass.
    """
    x = _rows(sources[0])
    s = _shrink(sources, a, layout)
    outputs = []
    for weight, bias, branches in zip(weights, biases, layout.by_site, strict=True):
        # Written through a view: the output itself must not be one, or autograd would refuse to
        # let the caller change it in place.
        y = x.new_empty(*sources[0].shape[:-1], weight.shape[0])
        rows = _rows(y)
        products = [
            (s[:, slice(*layout.branch[j])], _scaled_b_t(b[j], scales[j], x.dtype))
            for j in branches
        ]
        products.append((x, weight.t()))
        if bias is None:
            torch.mm(*products[0], out=rows)
        else:
            torch.addmm(bias, *products[0], out=rows)
        for left, right in products[1:]:
            rows.addmm_(left, right)
        outputs.append(y)
    return outputs, s


def low_rank_add(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: GroupLayout,
) -> Tensor:
    """The branches alone, accumulated into the outputs of the base layers.

    Args:
        outputs: [..., n_i] for each site, contiguous, changed in place.
        sources: distinct inputs [..., k_i] with equal leading dimensions, in the outputs' dtype.

    Returns:
        S [m, layout.columns] for the backward pass.
    """
    s = _shrink(sources, a, layout)
    for y, branches in zip(outputs, layout.by_site, strict=True):
        rows = y.view(s.shape[0], y.shape[-1])
        for j in branches:
            columns = slice(*layout.branch[j])
            rows.addmm_(s[:, columns], _scaled_b_t(b[j], scales[j], s.dtype))
    return s


def group_linear_backward(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: GroupLayout,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Backward of a group: only the gradients asked for.

    Args:
        grads: dY [..., n_i] for each site; None for an output that nothing depends on.
        weights: as in the forward pass; none at all where the base layers ran by themselves, whose
            part of dX is not ours then, and neither are their biases.
        s: [m, layout.columns] as the forward pass returned it.
        needs: one flag for each source, then each site's bias, then each A, then each B.

    Returns:
        The gradients whose flag is set, in that order; those of A and B in their parameter's dtype.
    """
    dy = [None if grad is None else _rows(grad) for grad in grads]
    bases = list(zip(dy, weights, strict=True)) if weights else []
    q, p, t = len(sources), len(weights), len(a)
    need_source, need_bias = needs[:q], needs[q : q + p]
    need_a, need_b = needs[q + p : q + p + t], needs[q + p + t :]

    ds = torch.empty_like(s)
    d_b = [torch.zeros_like(b[j]) if need_b[j] else None for j in range(t)]
    for grad, branches in zip(dy, layout.by_site, strict=True):
        for j in branches:
            columns = slice(*layout.branch[j])
            if grad is None:
                ds[:, columns].zero_()
                continue
            torch.mm(grad, _scaled_b_t(b[j], scales[j], s.dtype).t(), out=ds[:, columns])
            if need_b[j]:
                # As (S^T dY)^T: on a CPU the wide product is up to six times faster than the tall.
                d_b_t = torch.mm(s[:, columns].t(), grad)
                torch.mul(d_b_t.to(b[j].dtype).t(), scales[j], out=d_b[j])

    d_a = [torch.zeros_like(a[j]) if need_a[j] else None for j in range(t)]
    d_source: list[Tensor | None] = [None] * q
    for i, (source, branches) in enumerate(zip(sources, layout.by_source, strict=True)):
        start, stop = layout.source[i]
        if any(need_a[j] for j in branches):
            stacked = torch.mm(ds[:, start:stop].t(), _rows(source))
            for j in branches:
                if need_a[j]:
                    part = stacked[layout.branch[j].start - start : layout.branch[j].stop - start]
                    # Autograd keeps this as .grad; a view would keep the whole stack with it.
                    d_a[j] = part.to(a[j].dtype, copy=len(branches) > 1)
        if need_source[i]:
            grad = None
            if branches:
                grad = torch.mm(ds[:, start:stop], _stack([a[j] for j in branches], s.dtype))
            for grad_output, weight in bases if i == 0 else ():
                if grad_output is None:
                    continue
                if grad is None:
                    grad = torch.mm(grad_output, weight)
                else:
                    grad.addmm_(grad_output, weight)
            if grad is None:
                grad = s.new_zeros(source.shape)
            d_source[i] = grad.view(source.shape)

    d_bias = [
        None if not need else weight.new_zeros(weight.shape[0]) if grad is None else grad.sum(0)
        for need, (grad, weight) in zip(need_bias, bases, strict=True)
    ]
    return [grad for grad in (*d_source, *d_bias, *d_a, *d_b) if grad is not None]


def _shrink(sources: Sequence[Tensor], a: Sequence[Tensor], layout: GroupLayout) -> Tensor:
    x = _rows(sources[0])
    s = x.new_empty(x.shape[0], layout.columns)
    for source, branches, columns in zip(sources, layout.by_source, layout.source, strict=True):
        if branches:
            stacked = _stack([a[j] for j in branches], x.dtype)
            torch.mm(_rows(source), stacked.t(), out=s[:, slice(*columns)])
    return s


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _stack(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(dtype)


def _scaled_b_t(b: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """B^T [r, n] times the scale, contiguous.

    Scaled in the parameter's own precision: B is small, and rounding it twice is not. Transposed in
    memory because dY B is up to three times faster on a CPU when B's columns are contiguous.
    """
    scaled = b.new_empty(b.shape[1], b.shape[0])
    return torch.mul(b.t(), scale, out=scaled).to(dtype)
