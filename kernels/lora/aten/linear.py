"""The group ops by matmul and addmm: the CPU path, and the baseline a Triton kernel has to beat.

The low-rank product is written first and the base matmul accumulates onto it (beta = 1), or the
other way round where oneDNN computes the base; so no intermediate of the size of the output is ever
made. A and B are cast to the dtype of x; x, the large one, never is. S and dS lie in memory column
by column, because a CPU is faster at products with a few long rows than with a few long columns.

In bfloat16 and float16 a CPU computes with ranks padded to the kernels' buckets (`_pads_ranks`).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..group import Call, Columns, GroupLayout, as_matrix, bucket, group_layout, split
from . import onednn

__all__ = [
    "empty_s",
    "group_linear",
    "group_linear_backward",
    "layout_of",
    "low_rank_add",
    "shrink",
]


def _pads_ranks(x: Tensor) -> bool:
    """Whether ranks are padded to `group.bucket` for an x of this dtype and device.

    oneDNN, which computes 16-bit products on a CPU, compiles code for every combination of sizes
    and keeps the latest 1,024. Batches of different lengths times mixed ranks are more than that: a
    training step of MiniLM was measured to take 1.3 times as long as with uniform ranks, most of
    the difference spent compiling. A product with 16 columns takes about as long as one with four.
    """
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def empty_s(call: Call) -> Tensor:
    """S [m, columns] of a call, not yet written: column by column in memory."""
    return _column_major(call.sources[0], sum(_widths(call)))


def group_linear(call: Call) -> tuple[list[Tensor], Tensor]:
    """Forward of a group.

    Returns:
        The outputs [..., n_i] in the dtype of x, and S [m, columns] for the backward pass.
    """
    x, scales = as_matrix(call.sources[0]), call.scales
    layout = layout_of(call, len(call.weights))
    s = shrink(call, layout)
    outputs = []
    for weight, bias, branches in zip(call.weights, call.biases, layout.by_site, strict=True):
        products = [
            (_columns(s, layout.branch[j]), _b_t(call.b[j], layout.branch[j], x.dtype), scales[j])
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
        shape = [*call.sources[0].shape[:-1], y.shape[1]]
        outputs.append(torch.ops.aten._unsafe_view(y, shape))
    return outputs, s


def low_rank_add(call: Call, outputs: Sequence[Tensor]) -> Tensor:
    """The branches alone, accumulated into the outputs of the base layers.

    Args:
        call: without weights; its sources in the dtype of the outputs.
        outputs: [..., n_i] for each site, contiguous, changed in place.

    Returns:
        S [m, columns] for the backward pass.
    """
    layout = layout_of(call, len(outputs))
    s = shrink(call, layout)
    for y, branches in zip(outputs, layout.by_site, strict=True):
        rows = y.view(s.shape[0], y.shape[-1])
        for j in branches:
            columns = layout.branch[j]
            b_t = _b_t(call.b[j], columns, s.dtype)
            rows.addmm_(_columns(s, columns), b_t, alpha=call.scales[j])
    return s


def group_linear_backward(
    call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool]
) -> list[Tensor]:
    """Backward of a group: only the gradients asked for.

    Args:
        call: as in the forward pass. Without weights, where the base layers ran by themselves:
            their part of dX is not ours then, and neither are their biases.
        grads: dY [..., n_i] for each site; None for an output that nothing depends on.
        s: [m, columns] as the forward pass returned it.
        needs: one flag for each source, then each weight's bias, then each A, then each B.

    Returns:
        The gradients whose flag is set, in that order; those of A and B in their parameter's dtype.
    """
    a, b = call.a, call.b
    layout = layout_of(call, len(grads))
    dy = [None if grad is None else as_matrix(grad) for grad in grads]
    bases = list(zip(dy, call.weights, strict=True)) if call.weights else []
    need_source, need_bias, need_a, need_b = split(
        needs, len(call.sources), len(call.weights), len(a), len(b)
    )

    ds = torch.empty_like(s)
    d_b: list[Tensor | None] = [None] * len(b)
    for grad, branches in zip(dy, layout.by_site, strict=True):
        for j in branches:
            columns = layout.branch[j]
            if grad is None:
                _columns(ds, columns).zero_()
                continue
            scaled = _scaled_b_t(b[j], call.scales[j], columns, s.dtype)
            torch.mm(grad, scaled.t(), out=_columns(ds, columns))
            if need_b[j]:
                # As (S^T dY)^T: on a CPU the wide product is up to six times faster than the tall.
                d_b_t = s.new_empty(columns.width, b[j].shape[0])
                d_b_t.addmm_(_columns(s, columns).t(), grad, beta=0, alpha=call.scales[j])
                own = torch.empty_like(b[j], memory_format=torch.contiguous_format)
                d_b[j] = own.copy_(_first(d_b_t, b[j].shape[1]).t())

    d_a: list[Tensor | None] = [None] * len(a)
    d_source: list[Tensor | None] = [None] * len(call.sources)
    for i, (source, branches) in enumerate(zip(call.sources, layout.by_source, strict=True)):
        span = layout.source[i]
        if any(need_a[j] for j in branches):
            stacked = torch.mm(_columns(ds, span).t(), as_matrix(source))
            for j in branches:
                if need_a[j]:
                    part = stacked[layout.branch[j].start - span.start :][: a[j].shape[0]]
                    # Autograd keeps this as .grad; a view would keep the whole stack with it.
                    d_a[j] = part.to(a[j].dtype, copy=part.shape[0] < stacked.shape[0])
        if need_source[i]:
            low_rank = None
            if branches:
                low_rank = _columns(ds, span), _stack(a, branches, layout, s.dtype)
            d_u = _d_source(low_rank, bases if i == 0 else ())
            d_source[i] = s.new_zeros(source.shape) if d_u is None else d_u.view(source.shape)

    d_bias = [
        None if not need else weight.new_zeros(weight.shape[0]) if grad is None else grad.sum(0)
        for need, (grad, weight) in zip(need_bias, bases, strict=True)
    ]
    for grads_of, factors, flags in ((d_a, a, need_a), (d_b, b, need_b)):
        for j, factor in enumerate(factors):
            if flags[j] and grads_of[j] is None:
                grads_of[j] = torch.zeros_like(factor)
    return [grad for grad in (*d_source, *d_bias, *d_a, *d_b) if grad is not None]


def _column_major(x: Tensor, columns: int) -> Tensor:
    return x.new_empty(columns, math.prod(x.shape[:-1])).t()


def _widths(call: Call) -> list[int]:
    """The columns of S that each branch takes."""
    ranks = call.ranks
    return [bucket(rank) for rank in ranks] if _pads_ranks(call.sources[0]) else ranks


def layout_of(call: Call, sites: int) -> GroupLayout:
    """Where each branch of a group of so many sites lies in S."""
    return group_layout(
        _widths(call),
        call.branch_site,
        call.branch_source,
        sites=sites,
        sources=len(call.sources),
    )


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


def shrink(call: Call, layout: GroupLayout) -> Tensor:
    """S [m, columns]: u A^T of every branch."""
    s = _column_major(call.sources[0], layout.columns)
    for source, branches, span in zip(call.sources, layout.by_source, layout.source, strict=True):
        if branches:
            stacked = _stack(call.a, branches, layout, s.dtype)
            torch.mm(as_matrix(source), stacked.t(), out=_columns(s, span))
    return s


def _columns(s: Tensor, span: Columns) -> Tensor:
    return s if span.stop - span.start == s.shape[1] else s[:, span.start : span.stop]


def _first(t: Tensor, rows: int) -> Tensor:
    return t if rows == t.shape[0] else t[:rows]


def _stack(
    a: Sequence[Tensor], branches: Sequence[int], layout: GroupLayout, dtype: torch.dtype
) -> Tensor:
    """The A of these branches [columns, k], zero in columns that no rank uses."""
    factors = [a[j] for j in branches]
    ranks, widths = [a[j].shape[0] for j in branches], [layout.branch[j].width for j in branches]
    if ranks == widths:
        return (factors[0] if len(factors) == 1 else torch.cat(factors)).to(dtype)
    stacked = factors[0].new_zeros(sum(widths), factors[0].shape[1], dtype=dtype)
    for factor, rank, rows in zip(factors, ranks, stacked.split(widths), strict=True):
        rows[:rank].copy_(factor)
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
    torch.mul(b.t(), scale, out=_first(scaled, rank))
    if rank < columns.width:
        scaled[rank:].zero_()
    return scaled
