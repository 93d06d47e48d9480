"""Registration with torch: one op for a group's forward, one for its backward, both opaque."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..aten import linear as aten
from ..buckets import BucketLayout, bucket, bucket_layout
from ..dispatch.paths import choose
from ..group import Branch, GroupLayout, Site, group_layout
from .call import operands

__all__ = ["group_linear"]

_LIBRARY = torch.library.Library("heterolora", "DEF")
_LIBRARY.define(
    "group_linear(Tensor[] sources, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, "
    "float[] scales, int[] branch_site, int[] branch_source, float[] dropout, Tensor? seed, "
    "str implementation) -> (Tensor[], Tensor)"
)
_LIBRARY.define(
    "group_linear_backward(Tensor?[] grads, Tensor[] sources, Tensor[] weights, Tensor[] a, "
    "Tensor[] b, Tensor s, float[] scales, int[] branch_site, int[] branch_source, "
    "float[] dropout, Tensor? seed, str implementation, bool[] needs) -> Tensor[]"
)


def group_linear(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    *,
    seed: Tensor | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """Apply all sites that read x, each with its low-rank branches, as one operation.

    ``y_i = x W_i^T + b_i + sum_j s_j ((u_j * mask_j) A_j^T) B_j^T``; :mod:`.spec` is its meaning.
    Kept for the backward pass: each source once, and S = u A^T of all branches, packed.
    Differentiable once in x, the sources, the biases, A and B; the weights are frozen. Under
    autocast x, the weights and the biases are cast as `torch.nn.functional.linear` casts them.

    Args:
        x: [..., k], float64, float32, bfloat16 or float16.
        sites: the frozen layers, weights [n_i, k] in the dtype of x.
        branches: the low-rank additions; A and B may be float32 whatever the dtype of x. Ranks
            differ freely; rank 0 costs nothing.
        seed: int64 scalar on the device of x, needed where a branch has dropout. The same seed
            gives the same masks on every implementation.
        implementation: "auto" (`dispatch.choose`), "aten" or "triton".

    Returns:
        [..., n_i] for each site, in the dtype of x.

    Raises:
        ValueError: shapes, dtypes or indices do not fit, a weight requires a gradient, dropout
            without a seed, or an implementation that cannot run here.
    """
    arguments = _prepare(x, sites, branches, seed, implementation)
    outputs, _ = torch.ops.heterolora.group_linear(*arguments)
    return outputs


def _prepare(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    seed: Tensor | None,
    implementation: str,
) -> tuple[Any, ...]:
    """The op's arguments: checked, cast under autocast, and each distinct source once."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        sites = [
            Site(site.weight.to(dtype), None if site.bias is None else site.bias.to(dtype))
            for site in sites
        ]
    factors = [f for branch in branches for f in (branch.a, branch.b)]
    chosen = choose(implementation, x, factors, sites, branches)
    given = operands(x, branches, seed, chosen)
    _check(x, sites, branches, given.sources)
    weights, biases = [site.weight for site in sites], [site.bias for site in sites]
    return (given.sources, weights, biases, *given[1:])


def _check(
    x: Tensor, sites: Sequence[Site], branches: Sequence[Branch], sources: Sequence[Tensor]
) -> None:
    if not sites:
        raise ValueError("group_linear needs at least one site")
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [..., k], got {x.dtype} {tuple(x.shape)}")
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
    for source in sources:
        if source.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"source {tuple(source.shape)} differs from x {tuple(x.shape)} before the last dim"
            )
    for j, branch in enumerate(branches):
        if not 0 <= branch.site < len(sites):
            raise ValueError(f"branch {j}: no site {branch.site} among {len(sites)}")
        k = (x if branch.source is None else branch.source).shape[-1]
        rank, n = branch.a.shape[0], sites[branch.site].weight.shape[0]
        if tuple(branch.a.shape) != (rank, k) or tuple(branch.b.shape) != (n, rank):
            raise ValueError(
                f"branch {j}: A {tuple(branch.a.shape)} and B {tuple(branch.b.shape)} are not "
                f"[r, {k}] and [{n}, r]"
            )


def _layout(
    sources: Sequence[Tensor],
    a: Sequence[Tensor],
    branch_site: Sequence[int],
    branch_source: Sequence[int],
    sites: int,
) -> GroupLayout:
    ranks = _widths(sources[0], a)
    return group_layout(ranks, branch_site, branch_source, sites=sites, sources=len(sources))


def _widths(x: Tensor, a: Sequence[Tensor]) -> list[int]:
    """Columns of each branch in the S of `aten`."""
    ranks = [factor.shape[0] for factor in a]
    return [bucket(rank) for rank in ranks] if aten.pads_ranks(x) else ranks


def _buckets(
    a: Sequence[Tensor],
    branch_site: Sequence[int],
    branch_source: Sequence[int],
    dropout: Sequence[float],
    sites: int,
) -> BucketLayout:
    ranks = [factor.shape[0] for factor in a]
    return bucket_layout(ranks, branch_site, branch_source, [p > 0 for p in dropout], sites=sites)


def _forward(  # type: ignore[no-untyped-def]
    sources,
    weights,
    biases,
    a,
    b,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
):
    if implementation == "triton":
        from ..gpu import passes as fused

        buckets = _buckets(a, branch_site, branch_source, dropout, len(weights))
        with fused.on_device(sources[0]):
            return fused.group_linear(
                sources, weights, biases, a, b, scales, buckets, dropout, seed
            )
    layout = _layout(sources, a, branch_site, branch_source, len(weights))
    return aten.group_linear(sources, weights, biases, a, b, scales, layout)


def _backward(  # type: ignore[no-untyped-def]
    grads,
    sources,
    weights,
    a,
    b,
    s,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
    needs,
):
    if implementation == "triton":
        from ..gpu import passes as fused

        buckets = _buckets(a, branch_site, branch_source, dropout, len(grads))
        with fused.on_device(s):
            return fused.group_linear_backward(
                grads, sources, weights, a, b, s, scales, buckets, dropout, seed, needs
            )
    layout = _layout(sources, a, branch_site, branch_source, len(grads))
    arguments = (grads, sources, weights, a, b, s, scales, layout, needs)
    if not torch.is_autocast_enabled(s.device.type):
        return aten.group_linear_backward(*arguments)
    # Whoever calls backward may do so under an autocast that the forward pass was not under.
    with torch.autocast(s.device.type, enabled=False):
        return aten.group_linear_backward(*arguments)


def _forward_fake(  # type: ignore[no-untyped-def]
    sources,
    weights,
    biases,
    a,
    b,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
):
    x = sources[0]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    args = (a, branch_site, branch_source, dropout, implementation, len(weights))
    return outputs, _fake_s(x, *args)


def _fake_s(  # type: ignore[no-untyped-def]
    x, a, branch_site, branch_source, dropout, implementation, sites
):
    m = math.prod(x.shape[:-1])
    if implementation == "triton":
        return x.new_empty(m, _buckets(a, branch_site, branch_source, dropout, sites).columns)
    # Column by column in memory, as `aten` writes it.
    return x.new_empty(sum(_widths(x, a)), m).t()


def _backward_fake(  # type: ignore[no-untyped-def]
    grads,
    sources,
    weights,
    a,
    b,
    s,
    scales,
    branch_site,
    branch_source,
    dropout,
    seed,
    implementation,
    needs,
):
    biases = [weight.new_empty(weight.shape[0]) for weight in weights]
    like = [*(source.new_empty(source.shape) for source in sources), *biases]
    like += [torch.empty_like(factor) for factor in (*a, *b)]
    return [grad for grad, need in zip(like, needs, strict=True) if need]


class _GroupLinear(torch.autograd.Function):
    """Autograd over the flat list of tensors; the op below autograd does the work."""

    @staticmethod
    def forward(ctx: Any, meta: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        q, p, t, options = meta
        sources, weights = list(tensors[:q]), list(tensors[q : q + p])
        biases = list(tensors[q + p : q + 2 * p])
        a = list(tensors[q + 2 * p : q + 2 * p + t])
        b = list(tensors[q + 2 * p + t : q + 2 * p + 2 * t])
        seed = tensors[-1]
        *lists, implementation = options
        with torch._C._AutoDispatchBelowAutograd():
            outputs, s = torch.ops.heterolora.group_linear(
                sources, weights, biases, a, b, *lists, seed, implementation
            )
        ctx.meta = meta
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(s)
        ctx.save_for_backward(*sources, *weights, *a, *b, s, seed)
        return (*outputs, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        q, p, _, _ = ctx.meta
        needed = ctx.needs_input_grad[1:]
        # The weights lie between the sources and the biases, and never get a gradient.
        needs = [*needed[:q], *needed[q + p : -1]]
        flat = _gradients(_saved(ctx), ctx.meta, grads, needs)
        return (None, *flat[:q], *[None] * p, *flat[q:], None)


def _refuse_second_derivative(operation: str) -> None:
    # torch's once_differentiable notices only a dY that needs a gradient, not A, B or x.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation} can be differentiated once: call backward without create_graph=True, "
            "or heterolora.unfuse(model) first"
        )


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What a forward pass kept: sources, weights, A, B, S and the seed.

    To be called once in a backward pass: under checkpointing a tensor is unpacked only once.
    """
    _refuse_second_derivative("group_linear")
    q, p, t, _ = ctx.meta
    *saved, s, seed = ctx.saved_tensors
    return saved[:q], saved[q : q + p], saved[q + p : q + p + t], saved[q + p + t :], s, seed


def _gradients(
    saved: tuple[Any, ...],
    meta: tuple[Any, ...],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """One entry for each source, bias, A and B: its gradient, or None where it is not needed."""
    sources, weights, a, b, s, seed = saved
    _, p, _, (*lists, implementation) = meta
    found = torch.ops.heterolora.group_linear_backward(
        list(grads[:p]), sources, weights, a, b, s, *lists, seed, implementation, needs
    )
    rest = iter(found)
    return [next(rest) if need else None for need in needs]


def _flat(  # type: ignore[no-untyped-def]
    sources, weights, biases, a, b, *options_and_seed
):
    """The op's arguments as the autograd function takes them: all that is no tensor comes first."""
    *lists, seed, implementation = options_and_seed
    meta = (len(sources), len(weights), len(a), (*lists, implementation))
    return meta, *sources, *weights, *biases, *a, *b, seed


def _autograd(sources, weights, biases, a, b, *options_and_seed):  # type: ignore[no-untyped-def]
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.heterolora.group_linear(
                sources, weights, biases, a, b, *options_and_seed
            )
    *outputs, s = _GroupLinear.apply(*_flat(sources, weights, biases, a, b, *options_and_seed))
    return outputs, s


_LIBRARY.impl("group_linear", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("group_linear", _autograd, "Autograd")
_LIBRARY.impl("group_linear_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("heterolora::group_linear", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("heterolora::group_linear_backward", _backward_fake, lib=_LIBRARY)
