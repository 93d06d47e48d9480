"""Low-rank branches accumulated into outputs that the base layers computed themselves.

For base layers whose weight the group op cannot read: 8-bit, 4-bit, fp8, any forward of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..aten import linear as aten
from ..dispatch.paths import choose
from ..group import Branch
from .call import operands
from .linear import _buckets, _fake_s, _gradients, _layout, _refuse_second_derivative

__all__ = ["low_rank_add"]

_LIBRARY = torch.library.Library("heterolora", "FRAGMENT")
_LIBRARY.define(
    "low_rank_add_(Tensor(a!)[] outputs, Tensor[] sources, Tensor[] a, Tensor[] b, float[] scales, "
    "int[] branch_site, int[] branch_source, float[] dropout, Tensor? seed, str implementation) "
    "-> Tensor"
)


def low_rank_add(
    outputs: Sequence[Tensor],
    x: Tensor,
    branches: Sequence[Branch],
    *,
    seed: Tensor | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """Add the low-rank branches of a group to what its base layers returned, as one operation.

    ``y_i += sum_j s_j ((u_j * mask_j) A_j^T) B_j^T``; `spec.low_rank_add` is its meaning.
    Differentiable once in the outputs, x, the sources, A and B: dY goes on to the graph of the base
    layer unchanged. The dtype of the outputs is the one computed in, under autocast too; x and the
    sources are cast to it.

    The sum is written into the memory of the outputs, so use only what is returned. It goes to a
    copy instead where memory of others would change or autograd could not follow:

    - a leaf that requires a gradient, or a tensor made in inference mode and used outside of it;
    - a view other than of a whole product, and what is not contiguous, an expanded tensor included;
    - memory that a source or another output uses as well;
    - the result of a function that keeps it for its own backward pass, or of an
      `autograd.Function` that saved any tensor, since which cannot be told;
    - under `torch.compile`, which decides by itself what to copy.

    An output that other code keeps (a hook, another node of the graph) looks like any other; clone
    it first.

    Args:
        outputs: [..., n_i] for each site, of one dtype: float64, float32, bfloat16 or float16.
        x: [..., k], with the leading dimensions of the outputs.
        branches: as in `group_linear`; `Branch.site` is an index into `outputs`.
        seed: int64 scalar on the device of x, needed where a branch has dropout.
        implementation: "auto" (`dispatch.choose`), "aten" or "triton".

    Returns:
        [..., n_i] for each site, in the memory of the outputs but for the copies above.

    Raises:
        ValueError: shapes, dtypes, devices or indices do not fit, dropout without a seed, or an
            implementation that cannot run here.
    """
    if not outputs:
        raise ValueError("low_rank_add needs at least one output")
    dtype = outputs[0].dtype
    _check(outputs, x, branches)
    if not any(branch.a.shape[0] for branch in branches):
        return list(outputs)
    factors = [f for branch in branches for f in (branch.a, branch.b)]
    x_cast = x.to(dtype)
    given = operands(x_cast, branches, seed, choose(implementation, x_cast, factors))
    read = [x, *given.sources, *(b.source for b in branches if b.source is not None)]
    targets = _targets(outputs, read)
    torch.ops.heterolora.low_rank_add_(targets, *given)
    return [
        t.view(y.shape) if t.dim() != y.dim() else t for t, y in zip(targets, outputs, strict=True)
    ]


def _check(outputs: Sequence[Tensor], x: Tensor, branches: Sequence[Branch]) -> None:
    first = outputs[0]
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [..., k], got {x.dtype} {tuple(x.shape)}")
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
    for j, branch in enumerate(branches):
        if not 0 <= branch.site < len(outputs):
            raise ValueError(f"branch {j}: no output {branch.site} among {len(outputs)}")
        source = x if branch.source is None else branch.source
        if source.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"source {tuple(source.shape)} differs from x {tuple(x.shape)} before the last dim"
            )
        k, rank, n = source.shape[-1], branch.a.shape[0], outputs[branch.site].shape[-1]
        if tuple(branch.a.shape) != (rank, k) or tuple(branch.b.shape) != (n, rank):
            raise ValueError(
                f"branch {j}: A {tuple(branch.a.shape)} and B {tuple(branch.b.shape)} are not "
                f"[r, {k}] and [{n}, r]"
            )


def _targets(outputs: Sequence[Tensor], read: Sequence[Tensor]) -> list[Tensor]:
    """Tensors with the values of the outputs that may be written to: they themselves, or copies.

    A linear layer's output is often a view of the whole [m, n] product; then it is the product that
    is written to, as autograd allows no in-place change of several views in one function.
    """
    if torch.compiler.is_compiling():
        return [y.clone(memory_format=torch.contiguous_format) for y in outputs]
    taken = {t.untyped_storage()._cdata for t in read}
    targets = []
    for y in outputs:
        whole = y._base if y._base is not None else y
        storage = whole.untyped_storage()._cdata
        if storage in taken or not (_covers(whole, y) and _writable(whole) and _unsaved(y)):
            whole = y.clone(memory_format=torch.contiguous_format)
        taken.add(storage)
        targets.append(whole)
    return targets


def _covers(whole: Tensor, y: Tensor) -> bool:
    """Whether `whole` is y, or y is nothing but a `view` of it with the same rows in order."""
    if not (
        whole.is_contiguous()
        and y.is_contiguous()
        and whole.numel() == y.numel()
        and whole.shape[-1:] == y.shape[-1:]
        and whole.dtype == y.dtype
    ):
        return False
    node: Any = y.grad_fn
    if whole is y or node is None:
        return node is whole.grad_fn
    # An autograd.Function that returns its input is a view too, but its backward may be anything.
    return node.name() == "ViewBackward0" and node.next_functions[0][0] is whole.grad_fn


def _writable(whole: Tensor) -> bool:
    if whole.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return not (whole.is_leaf and whole.requires_grad) and _unsaved(whole)


def _unsaved(y: Tensor) -> bool:
    """Whether the function that returned y did not keep it, as far as can be told."""
    node: Any = y.grad_fn
    if any(hasattr(node, name) for name in ("_raw_saved_result", "_raw_saved_output")):
        return False
    # Of an autograd.Function; empty where it saved nothing. Looking inside could start a recompute.
    return not getattr(node, "_raw_saved_tensors", ())


def _forward(  # type: ignore[no-untyped-def]
    outputs, sources, a, b, scales, branch_site, branch_source, dropout, seed, implementation
):
    if implementation == "triton":
        from ..gpu import passes as fused

        buckets = _buckets(a, branch_site, branch_source, dropout, len(outputs))
        with fused.on_device(sources[0]):
            return fused.low_rank_add(outputs, sources, a, b, scales, buckets, dropout, seed)
    layout = _layout(sources, a, branch_site, branch_source, len(outputs))
    return aten.low_rank_add(outputs, sources, a, b, scales, layout)


def _forward_fake(  # type: ignore[no-untyped-def]
    outputs, sources, a, b, scales, branch_site, branch_source, dropout, seed, implementation
):
    args = (a, branch_site, branch_source, dropout, implementation, len(outputs))
    return _fake_s(sources[0], *args)


class _LowRankAdd(torch.autograd.Function):
    """Autograd over the flat list of tensors; the op below autograd does the work."""

    @staticmethod
    def forward(ctx: Any, meta: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, ...]:
        q, p, t, options = meta
        outputs, sources = list(tensors[:p]), list(tensors[p : p + q])
        a, b = list(tensors[p + q : p + q + t]), list(tensors[p + q + t : -1])
        seed = tensors[-1]
        *lists, implementation = options
        with torch._C._AutoDispatchBelowAutograd():
            s = torch.ops.heterolora.low_rank_add_(
                outputs, sources, a, b, *lists, seed, implementation
            )
        ctx.meta = meta
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(*outputs)
        ctx.mark_non_differentiable(s)
        ctx.save_for_backward(*sources, *a, *b, s, seed)
        return (*outputs, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _refuse_second_derivative("low_rank_add")
        q, p, t, _ = ctx.meta
        needs = list(ctx.needs_input_grad[1 + p : -1])
        flat: list[Tensor | None] = [None] * len(needs)
        if any(needs):
            *saved, s, seed = ctx.saved_tensors
            sources, a, b = saved[:q], saved[q : q + t], saved[q + t :]
            flat = _gradients((sources, [], a, b, s, seed), ctx.meta, grads, needs)
        return (None, *grads[:p], *flat, None)


def _autograd(outputs, sources, a, b, *options_and_seed):  # type: ignore[no-untyped-def]
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():
            s = torch.ops.heterolora.low_rank_add_(outputs, sources, a, b, *options_and_seed)
    else:
        *lists, seed, implementation = options_and_seed
        meta = (len(sources), len(outputs), len(a), (*lists, implementation))
        *_, s = _LowRankAdd.apply(meta, *outputs, *sources, *a, *b, seed)
    # What writes below autograd has to tell it that these have changed.
    torch.autograd.graph.increment_version(outputs)
    return s


_LIBRARY.impl("low_rank_add_", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("low_rank_add_", _autograd, "Autograd")
torch.library.register_fake("heterolora::low_rank_add_", _forward_fake, lib=_LIBRARY)
