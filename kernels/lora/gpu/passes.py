"""The group ops by the Triton kernels: what each launches, in which order, on which buffers.

Forward, three launches: pack, shrink, expand. Backward, six: pack, the pass over every dY, a reduce
of dS, dX, the pass over the sources, a reduce of dA and dB (two, if these differ in dtype).

Arguments and results are those of :mod:`..aten`; `launch`, which it has not, holds tiles and
options, and None takes the shipped ones.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..aten.score import branch_score, statistics_dtype
from ..group import BucketLayout, Call, as_matrix, bucket, bucket_layout, split
from .da import da
from .dx import dx
from .dy import dy
from .expand import expand
from .expand_tma import describable, expand_tma
from .launch import Launch, launch_for
from .pack import pack
from .reduce import Part, Sum, reduce_splits
from .score import LARGEST_RANK, score
from .shrink import shrink
from .tables import Pass

__all__ = ["empty_s", "group_linear", "group_linear_backward", "group_score", "low_rank_add"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _on_its_device(
    run: Callable[Concatenate[Call, _P], _T],
) -> Callable[Concatenate[Call, _P], _T]:
    """Makes the device of the call the current one, on which Triton launches, whatever it was."""

    @functools.wraps(run)
    def there(call: Call, *args: _P.args, **options: _P.kwargs) -> _T:
        x = call.sources[0]
        if not x.is_cuda:
            return run(call, *args, **options)
        with torch.cuda.device(x.device):
            return run(call, *args, **options)

    return there


def empty_s(call: Call) -> Tensor:
    """S [m, columns] of a call, not yet written."""
    x = call.sources[0]
    return x.new_empty(math.prod(x.shape[:-1]), sum(bucket(rank) for rank in call.ranks))


@_on_its_device
def group_linear(call: Call, launch: Launch | None = None) -> tuple[list[Tensor], Tensor]:
    """Forward of a group.

    Returns:
        The outputs [..., n_i] in the dtype of x, and S [m, columns].
    """
    x = call.sources[0]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in call.weights]
    return outputs, _write(call, outputs, launch)


@_on_its_device
def low_rank_add(call: Call, outputs: Sequence[Tensor], launch: Launch | None = None) -> Tensor:
    """Add the low-rank parts to what the base layers wrote, in place.

    Returns:
        S [m, columns].
    """
    return _write(call, outputs, launch)


def _write(call: Call, outputs: Sequence[Tensor], launch: Launch | None) -> Tensor:
    """Write the outputs, or add to them where the call has no weights; returns S."""
    launch = launch or launch_for(call.sources[0])
    sources = [_row_major(source) for source in call.sources]
    outs = [output.view(sources[0].shape[0], output.shape[-1]) for output in outputs]
    group = _pass(call, sources, launch, [*sources, *call.weights, *outs], len(outputs))
    s, parts = shrink(group)
    layout, x = group.layout, sources[0]
    if not call.weights and not layout.columns:
        return s
    if (
        launch.tma
        and parts is None
        and layout.columns
        and call.weights
        and describable(x, s, *call.weights, *outs)
    ):
        expand_tma(group, s, outs)
    else:
        expand(group, s, parts, outs)
    return s


@_on_its_device
def group_linear_backward(
    call: Call,
    grads: Sequence[Tensor | None],
    s: Tensor,
    needs: Sequence[bool],
    launch: Launch | None = None,
) -> list[Tensor]:
    """Backward of a group, only the gradients asked for. The same bits for the same arguments.

    Returns:
        The gradients whose flag is set, in the order of `needs`; those of A and B in their
        parameter's dtype.
    """
    launch = launch or launch_for(s)
    q, p, t = len(call.sources), len(call.weights), len(call.a)
    need_source, need_bias, need_a, need_b = split(needs, q, p, t, t)
    sources = [_row_major(source) for source in call.sources]
    dys = _dys(call, grads, s)
    d_source, d_a, d_b = (
        [_room(like) if need else like for like, need in zip(some, flags, strict=True)]
        for some, flags in ((sources, need_source), (call.a, need_a), (call.b, need_b))
    )
    group = _pass(call, sources, launch, [*sources, *d_source, *dys, *call.weights], len(grads))
    layout, m = group.layout, sources[0].shape[0]
    wanted = [i for i in range(q) if need_source[i]]
    reads = {segment.source for segment in layout.segments}
    need_ds = any(need_a) or bool(reads.intersection(wanted))
    if not m or not layout.columns:
        for factor, need in zip((*d_a, *d_b), (*need_a, *need_b), strict=True):
            if need:
                factor.zero_()
    # Where no dS is needed none is read, but `dx` takes the number of rows from it.
    ds, sums = s, []
    if m and layout.columns and (need_ds or any(need_b)):
        computed, parts = dy(group, dys, s, need_ds=need_ds, need_db=any(need_b))
        ds = computed if need_ds else s
        sums += _sums(parts, d_b, need_b, layout, call.scales, dim=1)
    if m and wanted:
        dx(group, dys, ds, [d_source[i] for i in wanted], wanted)
    if m and layout.columns and any(need_a):
        sums += _sums(da(group, ds), d_a, need_a, layout, [1.0] * t, dim=0)
    reduce_splits(sums, launch)
    d_bias = [grad.sum(0) if need else grad for grad, need in zip(dys, need_bias, strict=False)]
    d_source = [
        grad.reshape(source.shape) for grad, source in zip(d_source, call.sources, strict=True)
    ]
    flat = [*d_source, *d_bias, *d_a, *d_b]
    return [grad for grad, need in zip(flat, needs, strict=True) if need]


@_on_its_device
def group_score(
    call: Call,
    grads: Sequence[Tensor | None],
    s: Tensor,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
    launch: Launch | None = None,
) -> list[Tensor]:
    """Backward of a group that measures the gradients of A and B.

    Returns:
        The gradients whose flag is set, in that order; then gram_a, gram_b, abs_a and abs_b of the
        first branch, of the second, and so on. No gradient of A or B is written, except of ranks
        above `score.LARGEST_RANK`.
    """
    launch, ranks = launch or launch_for(s), call.ranks
    if max(ranks, default=0) > LARGEST_RANK or not s.numel():
        return _score_from_gradients(call, grads, s, needs, previous_a, previous_b, launch)
    sources = [_row_major(source) for source in call.sources]
    dys = _dys(call, grads, s)
    wanted = [i for i in range(len(sources)) if needs[i]]
    outs = [_room(sources[i]) for i in wanted]
    group = _pass(call, sources, launch, [*sources, *outs, *dys, *call.weights], len(grads))
    ds, _ = dy(group, dys, s, need_ds=True, need_db=False)
    if wanted:
        dx(group, dys, ds, outs, wanted)
    results = [out.reshape(call.sources[i].shape) for i, out in zip(wanted, outs, strict=True)]
    need_bias = needs[len(sources) :]
    results += [grad.sum(0) for grad, need in zip(dys, need_bias, strict=False) if need]
    grams_a, sums_a = score(group, sources, ds, previous_a, by_rank=True)
    grams_b, sums_b = score(group, dys, s, previous_b, by_rank=False)
    scores = zip(grams_a, grams_b, sums_a, sums_b, strict=True)
    zero = functools.partial(s.new_zeros, dtype=statistics_dtype(s.dtype))
    for rank in ranks:
        results += next(scores) if rank else (zero((0, 0)), zero((0, 0)), zero(()), zero(()))
    return results


def _score_from_gradients(
    call: Call,
    grads: Sequence[Tensor | None],
    s: Tensor,
    needs: Sequence[bool],
    previous_a: Sequence[Tensor],
    previous_b: Sequence[Tensor],
    launch: Launch,
) -> list[Tensor]:
    t, dtype = len(call.a), statistics_dtype(s.dtype)
    # Factors of the wider dtype, whose gradients then are not rounded.
    wide = call._replace(a=[a.to(dtype) for a in call.a], b=[b.to(dtype) for b in call.b])
    flat = group_linear_backward(wide, grads, s, [*needs, *[True] * (2 * t)], launch)
    others, d_as, d_bs = split(flat, len(flat) - 2 * t, t, t)
    results = [*others]
    for j, (d_a, d_b) in enumerate(zip(d_as, d_bs, strict=True)):
        if previous_a:
            d_a, d_b = d_a + previous_a[j], d_b + previous_b[j]
        of_branch = branch_score(call.a[j], call.b[j], d_a, d_b)
        results += [of_branch.gram_a, of_branch.gram_b, of_branch.abs_a, of_branch.abs_b]
    return results


def _dys(call: Call, grads: Sequence[Tensor | None], s: Tensor) -> list[Tensor]:
    """dY of every site as [m, n]; an output nothing depends on is rare and gets zeros."""
    dys = []
    for i, grad in enumerate(grads):
        if grad is not None:
            dys.append(_row_major(grad))
        elif call.weights:
            dys.append(s.new_zeros(s.shape[0], call.weights[i].shape[0]))
        else:
            ns = [b.shape[0] for b, site in zip(call.b, call.branch_site, strict=True) if site == i]
            dys.append(s.new_zeros(s.shape[0], max(ns, default=0)))
    return dys


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
    sums = []
    for j, (grad, need) in enumerate(zip(grads, needed, strict=True)):
        first, rank = layout.branch[j].start, grad.shape[dim]
        for part in parts if need else ():
            low, high = max(part.start, first), min(part.stop, first + rank)
            if low < high:
                skip = (low - part.start) * (part.part_stride if dim == 0 else 1)
                out = grad.narrow(dim, low - first, high - low)
                sums.append(Sum(out, part.parts[skip:], *part[3:], float(scales[j])))
    return sums


def _pass(
    call: Call,
    sources: Sequence[Tensor],
    launch: Launch,
    matrices: Sequence[Tensor],
    sites: int,
) -> Pass:
    """Pack the factors, and gather what the launches after it share.

    Args:
        matrices: all that the kernels will address, S aside; the first has m rows.
    """
    dropped = [p > 0 for p in call.dropout]
    layout = bucket_layout(call.ranks, call.branch_site, call.branch_source, dropped, sites=sites)
    index64 = _index64(launch, layout, matrices)
    return Pass(call, sources, layout, pack(call, layout, launch), launch, index64)


def _row_major(t: Tensor) -> Tensor:
    """[..., k] as [m, k] with a last stride of 1, copied only if it has none such."""
    t = as_matrix(t)
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _room(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


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
