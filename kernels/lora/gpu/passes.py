"""The group ops by the Triton kernels: what each launches, in which order, on which buffers.

Forward, three launches: pack, shrink, expand. Backward, six: pack, the pass over every dY, a reduce
of dS, dX, the pass over the sources, a reduce of dA and dB (two, if these differ in dtype).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..aten.score import branch_score, statistics_dtype
from ..buckets import BucketLayout
from .dx import dx
from .dy import Part, grads_of_a, grads_of_s_and_b
from .expand import expand
from .expand_tma import describable, expand_tma
from .launch import Launch, launch_for
from .pack import Packed, pack
from .reduce import Sum, reduce_splits
from .score import LARGEST_RANK, score
from .shrink import shrink
from .tables import chunks, segments

__all__ = ["group_linear", "group_linear_backward", "group_score", "low_rank_add", "on_device"]


def group_linear(
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    launch: Launch | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Forward of a group; arguments as `aten.group_linear`.

    Args:
        layout: the padded packing of S.
        dropout: probability of zeroing an element of its source, for each branch.
        seed: int64 scalar on the device, if any probability is above 0.
        launch: tiles and options; None takes the shipped ones.

    Returns:
        The outputs [..., n_i] in the dtype of x, and S [m, layout.columns].
    """
    x = sources[0]
    launch = launch or launch_for(x)
    rows = [_rows(source) for source in sources]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    outs = [output.view(rows[0].shape[0], output.shape[-1]) for output in outputs]
    index64 = _index64(launch, layout, [*rows, *weights, *outs])
    packed = _pack(a, b, scales, layout, x, launch)
    s, parts = shrink(rows, packed, layout, dropout, seed, launch, index64=index64)
    descriptors = launch.tma and parts is None and layout.columns
    if descriptors and describable(rows[0], s, *weights, *outs):
        expand_tma(rows[0], s, packed, weights, biases, outs, layout, launch)
    else:
        expand(rows[0], s, parts, packed, weights, biases, outs, layout, launch, index64=index64)
    return outputs, s


def low_rank_add(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """Add the low-rank parts to what the base layers wrote, in place.

    Args:
        outputs: [..., n_i] of each site, dense.
        sources, a, b, scales, layout, dropout, seed, launch: as `group_linear`.

    Returns:
        S [m, layout.columns].
    """
    x = sources[0]
    launch = launch or launch_for(x)
    rows = [_rows(source) for source in sources]
    outs = [output.view(rows[0].shape[0], output.shape[-1]) for output in outputs]
    index64 = _index64(launch, layout, [*rows, *outs])
    packed = _pack(a, b, scales, layout, x, launch)
    s, parts = shrink(rows, packed, layout, dropout, seed, launch, index64=index64)
    if layout.columns:
        expand(rows[0], s, parts, packed, (), (), outs, layout, launch, index64=index64)
    return s


def group_linear_backward(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
    launch: Launch | None = None,
) -> list[Tensor]:
    """Backward of a group, only the gradients asked for; arguments as `aten.group_linear_backward`.

    Args:
        weights: empty where the base layers compute their own part.
        s: [m, layout.columns] as the forward pass returned it.
        layout, dropout, seed, launch: as `group_linear`.

    Returns:
        The gradients whose flag is set, in the order of `needs`; those of A and B in their
        parameter's dtype. The same bits for the same arguments.
    """
    launch = launch or launch_for(s)
    q, p, t = len(sources), len(weights), len(a)
    need_source, need_bias = needs[:q], needs[q : q + p]
    need_a, need_b = needs[q + p : q + p + t], needs[q + p + t :]
    rows = [_rows(source) for source in sources]
    m, ks = rows[0].shape[0], [r.shape[1] for r in rows]
    dys = _grad_rows(grads, weights, b, layout, s)
    d_source, d_a, d_b = (
        [_room(t) if need else t for t, need in zip(some, flags, strict=True)]
        for some, flags in ((rows, need_source), (a, need_a), (b, need_b))
    )
    index64 = _index64(launch, layout, [*rows, *d_source, *dys, *weights])
    wanted = [i for i in range(q) if need_source[i]]
    reads = {segment.source for segment in layout.segments}
    need_ds = any(need_a) or bool(reads.intersection(wanted))
    if not m or not layout.columns:
        for factor, need in zip((*d_a, *d_b), needs[q + p :], strict=True):
            if need:
                factor.zero_()
    packed = _pack(a, b, scales, layout, s, launch)
    # Where no dS is needed none is read, but `dx` takes the number of rows from it.
    ds, sums = s, []
    if m and layout.columns and (need_ds or any(need_b)):
        computed, parts = grads_of_s_and_b(
            dys, s, packed, layout, launch, need_ds=need_ds, need_db=any(need_b), index64=index64
        )
        ds = computed if need_ds else s
        sums += _sums(parts, d_b, need_b, layout, scales, dim=1)
    if m and wanted:
        table = segments(layout, packed, ks, dropout) if reads.intersection(wanted) else None
        outs = [d_source[i] for i in wanted]
        dx(dys, weights, ds, packed, table, seed, outs, wanted, launch, index64=index64)
    if m and layout.columns and any(need_a):
        table = chunks(layout, packed, ks, dropout)
        parts = grads_of_a(rows, ds, table, seed, launch, index64=index64)
        sums += _sums(parts, d_a, need_a, layout, [1.0] * t, dim=0)
    reduce_splits(sums, launch)
    d_bias = [dy.sum(0) if need else dy for dy, need in zip(dys, need_bias, strict=False)]
    d_source = [grad.reshape(source.shape) for grad, source in zip(d_source, sources, strict=True)]
    flat = [*d_source, *d_bias, *d_a, *d_b]
    return [grad for grad, need in zip(flat, needs, strict=True) if need]


def group_score(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
    launch: Launch | None = None,
) -> list[Tensor]:
    """Backward of a group that measures the gradients of A and B; as `aten_score.group_score`.

    Args:
        grads, sources, weights, a, b, s: as `group_linear_backward`.
        needs: one flag for each source, then each site's bias.
        previous_a, previous_b: for each branch what to add to dA and dB; or empty.

    Returns:
        The gradients whose flag is set, in that order; then gram_a, gram_b, abs_a and abs_b of the
        first branch, of the second, and so on. No gradient of A or B is written, except of ranks
        above `score.LARGEST_RANK`.
    """
    launch = launch or launch_for(s)
    if max((factor.shape[0] for factor in a), default=0) > LARGEST_RANK or not s.numel():
        return _score_from_gradients(
            grads, sources, weights, a, b, s, scales, layout, dropout, seed, needs,
            previous_a, previous_b, launch,
        )  # fmt: skip
    rows = [_rows(source) for source in sources]
    dys = _grad_rows(grads, weights, b, layout, s)
    wanted = [i for i in range(len(sources)) if needs[i]]
    outs = [_room(rows[i]) for i in wanted]
    index64 = _index64(launch, layout, [*rows, *outs, *dys, *weights])
    packed = _pack(a, b, scales, layout, s, launch)
    ds, _ = grads_of_s_and_b(
        dys, s, packed, layout, launch, need_ds=True, need_db=False, index64=index64
    )
    if wanted:
        reads = {segment.source for segment in layout.segments}.intersection(wanted)
        ks = [r.shape[1] for r in rows]
        table = segments(layout, packed, ks, dropout) if reads else None
        dx(dys, weights, ds, packed, table, seed, outs, wanted, launch, index64=index64)
    found = [out.reshape(sources[i].shape) for i, out in zip(wanted, outs, strict=True)]
    need_bias = needs[len(sources) :]
    found += [dy.sum(0) for dy, need in zip(dys, need_bias, strict=False) if need]
    ranked = [j for j in range(len(a)) if a[j].shape[0]]
    scores = [
        s.new_zeros(shape, dtype=statistics_dtype(s.dtype))
        for _ in a
        for shape in ((0, 0), (0, 0), (), ())
    ]
    for by_rank, factors, previous in ((True, a, previous_a), (False, b, previous_b)):
        grams, sums = score(
            [rows[layout.source_of[j]] if by_rank else dys[layout.site_of[j]] for j in ranked],
            ds if by_rank else s,
            _alike([factors[j].contiguous() for j in ranked]),
            [previous[j].contiguous() for j in ranked] if previous else [],
            [1.0 if by_rank else scales[j] for j in ranked],
            ranked,
            [dropout[j] if by_rank else 0.0 for j in ranked],
            seed,
            layout,
            launch,
            by_rank=by_rank,
            index64=index64,
        )
        for j, gram, total in zip(ranked, grams, sums, strict=True):
            scores[4 * j + (0 if by_rank else 1)] = gram
            scores[4 * j + (2 if by_rank else 3)] = total
    return found + scores


def _score_from_gradients(
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    s: Tensor,
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
    launch: Launch,
) -> list[Tensor]:
    dtype, t = statistics_dtype(s.dtype), len(a)
    # Factors of the wider dtype, whose gradients then are not rounded.
    wide_a, wide_b = ([factor.to(dtype) for factor in some] for some in (a, b))
    flags = [*needs, *[True] * (2 * t)]
    found = group_linear_backward(
        grads, sources, weights, wide_a, wide_b, s, scales, layout, dropout, seed, flags, launch
    )
    others = len(found) - 2 * t
    flat = found[:others]
    for j in range(t):
        d_a, d_b = found[others + j], found[others + t + j]
        if previous_a:
            d_a, d_b = d_a + previous_a[j], d_b + previous_b[j]
        of_branch = branch_score(a[j], b[j], d_a, d_b)
        flat += [of_branch.gram_a, of_branch.gram_b, of_branch.abs_a, of_branch.abs_b]
    return flat


def _grad_rows(
    grads: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    b: Sequence[Tensor],
    layout: BucketLayout,
    s: Tensor,
) -> list[Tensor]:
    """dY of every site as [m, n]; an output nothing depends on is rare and gets zeros."""
    found = []
    for i, grad in enumerate(grads):
        if grad is not None:
            found.append(_rows(grad))
            continue
        ns = [f.shape[0] for f, site in zip(b, layout.site_of, strict=True) if site == i]
        found.append(
            s.new_zeros(s.shape[0], weights[i].shape[0] if weights else max(ns, default=0))
        )
    return found


def _sums(
    parts: Sequence[Part],
    grads: Sequence[Tensor],
    needed: Sequence[bool],
    layout: BucketLayout,
    scales: Sequence[float],
    *,
    dim: int,
) -> list[Sum]:
    """Which parts add up to which rows (dim 0) or columns (dim 1) of which branch's gradient."""
    found = []
    for j, (grad, need) in enumerate(zip(grads, needed, strict=True)):
        first, rank = layout.branch[j].start, grad.shape[dim]
        for part in parts if need else ():
            low, high = max(part.start, first), min(part.stop, first + rank)
            if low < high:
                skip = (low - part.start) * (part.part_stride if dim == 0 else 1)
                out = grad.narrow(dim, low - first, high - low)
                found.append(Sum(out, part.parts[skip:], *part[3:], float(scales[j])))
    return found


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of x the current one, on which Triton launches, whatever it was."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _pack(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: BucketLayout,
    x: Tensor,
    launch: Launch,
) -> Packed:
    return pack(_alike(a), _alike(b), scales, layout, x, launch)


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors in one dtype: a problem table holds pointers of one type."""
    dtypes = {factor.dtype for factor in factors}
    return list(factors) if len(dtypes) < 2 else [factor.float() for factor in factors]


def _rows(t: Tensor) -> Tensor:
    """[..., k] as [m, k] with a last stride of 1, copied only if it has none such."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _room(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _index64(launch: Launch, layout: BucketLayout, matrices: Sequence[Tensor]) -> bool:
    """Whether an offset into S or any of these matrices can pass 2^31; their first has m rows."""
    if launch.index64 is not None:
        return launch.index64
    # Tiles overhang the edge by less than 2^10 rows, whose masked addresses are computed too.
    if (matrices[0].shape[0] + 1024) * layout.columns >= 2**31:
        return True
    for matrix in matrices:
        (rows, columns), (down, along) = matrix.shape, matrix.stride()
        if (rows + 1024) * down >= 2**31 or (columns + 1024) * along >= 2**31:
            return True
    return False
