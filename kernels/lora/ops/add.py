"""Low-rank branches accumulated into outputs that the base layers computed themselves.

For base layers whose weight the group op cannot read: 8-bit, 4-bit, fp8, any forward of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..group import Branch, Call
from .autograd import GroupFunction, flatten
from .call import added_call
from .registry import OPERANDS, backend, below_autograd, register

__all__ = ["low_rank_add"]


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
    call = added_call(outputs, x, branches, seed, implementation)
    if not any(call.ranks):
        return list(outputs)
    read = [x, *call.sources, *(b.source for b in branches if b.source is not None)]
    targets = _targets(outputs, read)
    torch.ops.heterolora.low_rank_add_(targets, *call)
    return [
        t.view(y.shape) if t.dim() != y.dim() else t for t, y in zip(targets, outputs, strict=True)
    ]


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


def _forward(outputs: list[Tensor], *operands: Any) -> Tensor:
    call = Call(*operands)
    return backend(call).low_rank_add(call, outputs)


def _forward_fake(outputs: list[Tensor], *operands: Any) -> Tensor:
    call = Call(*operands)
    return backend(call).empty_s(call)


def _forward_autograd(outputs: list[Tensor], *operands: Any) -> Tensor:
    if not torch.is_grad_enabled():
        with below_autograd():
            s = torch.ops.heterolora.low_rank_add_(outputs, *operands)
    else:
        *_, s = GroupFunction.apply(*flatten(Call(*operands), outputs))
    # What writes below autograd has to tell it that these have changed.
    torch.autograd.graph.increment_version(outputs)
    return s


register(
    f"low_rank_add_(Tensor(a!)[] outputs, {OPERANDS}) -> Tensor",
    _forward,
    _forward_fake,
    _forward_autograd,
)
