"""The group ops by matmul and addmm: the CPU path, and the baseline a Triton kernel has to beat.

The low-rank product is written first and the base matmul accumulates onto it (beta = 1), or the
other way round where oneDNN computes the base; so no intermediate of the size of the output is ever
made. A and B are cast to the dtype of x; x, the large one, never is. S and dS lie in memory column
by column, because a CPU is faster at products with a few long rows than with a few long columns.

In bfloat16 and float16 a CPU computes with ranks padded to the kernels' buckets (`pads_ranks`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import Columns, GroupLayout
from . import onednn

__all__ = ["group_linear", "group_linear_backward", "low_rank_add", "pads_ranks"]


def pads_ranks(x: Tensor) -> bool:
    """Whether ranks are padded to `buckets.bucket` for an x of this dtype and device.

    oneDNN, which computes 16-bit products on a CPU, compiles code for every combination of sizes
    and keeps the latest 1,024. Batches of different lengths times mixed ranks are more than that: a
    training step of MiniLM was measured to take 1.3 times as long as with uniform ranks, most of
    the difference spent compiling. A product with 16 columns takes about as long as one with four.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


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
        products = [
            (_columns(s, layout.branch[j]), _b_t(b[j], layout.branch[j], x.dtype), scales[j])
            for j in branches
        ]
        if onednn.preferred(x, weight):
            y = onednn.linear(x, weight, bias)
        else:
            y = x.new_empty(x.shape[0], weight.shape[0])
            products.append((x, weight.t(), 1.0))
            left, right, scale = products.pop(0)
            if bias is None:
                y.addmm_(left, right, beta=0, alpha=scale)
            else:
                torch.addmm(bias, left, right, alpha=scale, out=y)
        for left, right, scale in products:
            y.addmm_(left, right, alpha=scale)
        # Not a view for autograd, which else would not let the caller change the output in place.
        outputs.append(torch.ops.aten._unsafe_view(y, [*sources[0].shape[:-1], y.shape[1]]))
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
            columns = layout.branch[j]
            rows.addmm_(_columns(s, columns), _b_t(b[j], columns, s.dtype), alpha=scales[j])
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
    d_b: list[Tensor | None] = [None] * t
    for grad, branches in zip(dy, layout.by_site, strict=True):
        for j in branches:
            columns = layout.branch[j]
            if grad is None:
                _columns(ds, columns).zero_()
                continue
            scaled = _scaled_b_t(b[j], scales[j], columns, s.dtype)
            torch.mm(grad, scaled.t(), out=_columns(ds, columns))
            if need_b[j]:
                # As (S^T dY)^T: on a CPU the wide product is up to six times faster than the tall.
                d_b_t = s.new_empty(columns.width, b[j].shape[0])
                d_b_t.addmm_(_columns(s, columns).t(), grad, beta=0, alpha=scales[j])
                d_b[j] = _like(b[j]).copy_(d_b_t[: b[j].shape[1]].t())

    d_a: list[Tensor | None] = [None] * t
    d_source: list[Tensor | None] = [None] * q
    for i, (source, branches) in enumerate(zip(sources, layout.by_source, strict=True)):
        span = layout.source[i]
        if any(need_a[j] for j in branches):
            stacked = torch.mm(_columns(ds, span).t(), _rows(source))
            for j in branches:
                if need_a[j]:
                    part = stacked[layout.branch[j].start - span.start :][: a[j].shape[0]]
                    # Autograd keeps this as .grad; a view would keep the whole stack with it.
                    d_a[j] = part.to(a[j].dtype, copy=len(part) < len(stacked))
        if need_source[i]:
            low_rank = None
            if branches:
                low_rank = _columns(ds, span), _stack(a, branches, layout, s.dtype)
            found = _d_source(low_rank, bases if i == 0 else ())
            d_source[i] = s.new_zeros(source.shape) if found is None else found.view(source.shape)

    d_bias = [
        None if not need else weight.new_zeros(weight.shape[0]) if grad is None else grad.sum(0)
        for need, (grad, weight) in zip(need_bias, bases, strict=True)
    ]
    for grads_of, factors, flags in ((d_a, a, need_a), (d_b, b, need_b)):
        for j, factor in enumerate(factors):
            if flags[j] and grads_of[j] is None:
                grads_of[j] = torch.zeros_like(factor)
    return [grad for grad in (*d_source, *d_bias, *d_a, *d_b) if grad is not None]


def _d_source(
    low_rank: tuple[Tensor, Tensor] | None, bases: Sequence[tuple[Tensor | None, Tensor]]
) -> Tensor | None:
    """dS A + sum of dY_i W_i [m, k], or None where nothing depends on the source.

    Args:
        low_rank: dS [m, columns] and the stacked A [columns, k].
        bases: dY [m, n_i] or None, and W [n_i, k].
    """
    live = [(dy, weight) for dy, weight in bases if dy is not None]
    if live and all(onednn.preferred(dy, weight) for dy, weight in live):
        (dy, weight), *others = live
        total = onednn.matmul(dy, weight)
        for dy, weight in others:
            total = onednn.add_matmul(total, dy, weight)
        return total if low_rank is None else total.addmm_(*low_rank)
    products = live if low_rank is None else [low_rank, *live]
    if not products:
        return None
    total = torch.mm(*products[0])
    for left, right in products[1:]:
        total.addmm_(left, right)
    return total


def _shrink(sources: Sequence[Tensor], a: Sequence[Tensor], layout: GroupLayout) -> Tensor:
    x = _rows(sources[0])
    s = x.new_empty(layout.columns, x.shape[0]).t()
    for source, branches, span in zip(sources, layout.by_source, layout.source, strict=True):
        if branches:
            stacked = _stack(a, branches, layout, x.dtype)
            torch.mm(_rows(source), stacked.t(), out=_columns(s, span))
    return s


def _columns(s: Tensor, span: Columns) -> Tensor:
    return s if span.stop - span.start == s.shape[1] else s[:, span.start : span.stop]


def _like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _stack(
    a: Sequence[Tensor], branches: Sequence[int], layout: GroupLayout, dtype: torch.dtype
) -> Tensor:
    """The A of these branches [columns, k], zero in columns that no rank uses."""
    factors = [a[j] for j in branches]
    widths = [layout.branch[j].width for j in branches]
    if all(len(factor) == width for factor, width in zip(factors, widths, strict=True)):
        return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)
    stacked = factors[0].new_zeros(sum(widths), factors[0].shape[1], dtype=dtype)
    for factor, rows in zip(factors, stacked.split(widths), strict=True):
        rows[: len(factor)].copy_(factor)
    return stacked


def _b_t(b: Tensor, columns: Columns, dtype: torch.dtype) -> Tensor:
    """B^T [columns, n], zero in columns that no rank uses."""
    if b.shape[1] == columns.width:
        return b.to(dtype).t()
    padded = b.new_zeros(columns.width, b.shape[0], dtype=dtype)
    padded[: b.shape[1]].copy_(b.t())
    return padded


def _scaled_b_t(b: Tensor, scale: float, columns: Columns, dtype: torch.dtype) -> Tensor:
    """B^T [columns, n] times the scale, contiguous, rounded once, zero where no rank is.

    Transposed in memory because dY B is up to three times faster on a CPU when B's columns are
    contiguous.
    """
    rank = b.shape[1]
    scaled = b.new_empty(columns.width, b.shape[0], dtype=dtype)
    torch.mul(b.t(), scale, out=scaled[:rank])
    if rank < columns.width:
        scaled[rank:].zero_()
    return scaled
