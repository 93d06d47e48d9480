"""`group_linear`: one op for a group's forward and one for its backward, both opaque to torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..group import Branch, Call, Site
from .autograd import GroupFunction, flatten
from .call import group_call
from .registry import OPERANDS, backend, below_autograd, register, without_autocast

__all__ = ["group_linear"]


def group_linear(
    x: Tensor,
    sites: Sequence[Site],
    branches: Sequence[Branch],
    *,
    seed: Tensor | None = None,
    implementation: str = "auto",
) -> list[Tensor]:
    """Apply all sites that read x, each with its low-rank branches, as one operation.

    ``y_i = x W_i^T + b_i + sum_j s_j ((u_j * mask_j) A_j^T) B_j^T``; :mod:`..spec` is its meaning.
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
    call = group_call(x, sites, branches, seed, implementation)
    outputs, _ = torch.ops.heterolora.group_linear(*call)
    return outputs


def _forward(*operands: Any) -> tuple[list[Tensor], Tensor]:
    call = Call(*operands)
    return backend(call).group_linear(call)


def _forward_fake(*operands: Any) -> tuple[list[Tensor], Tensor]:
    call = Call(*operands)
    x = call.sources[0]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in call.weights]
    return outputs, backend(call).empty_s(call)


def _forward_autograd(*operands: Any) -> tuple[list[Tensor], Tensor]:
    if not torch.is_grad_enabled():
        with below_autograd():
            return torch.ops.heterolora.group_linear(*operands)
    *outputs, s = GroupFunction.apply(*flatten(Call(*operands)))
    return outputs, s


def _backward(
    grads: list[Tensor | None], s: Tensor, needs: list[bool], *operands: Any
) -> list[Tensor]:
    call = Call(*operands)
    with without_autocast(s):
        return backend(call).group_linear_backward(call, grads, s, needs)


def _backward_fake(
    grads: list[Tensor | None], s: Tensor, needs: list[bool], *operands: Any
) -> list[Tensor]:
    call = Call(*operands)
    like = [source.new_empty(source.shape) for source in call.sources]
    like += [weight.new_empty(weight.shape[0]) for weight in call.weights]
    like += [torch.empty_like(factor) for factor in (*call.a, *call.b)]
    return [grad for grad, need in zip(like, needs, strict=True) if need]


register(
    f"group_linear({OPERANDS}) -> (Tensor[], Tensor)", _forward, _forward_fake, _forward_autograd
)
register(
    f"group_linear_backward(Tensor?[] grads, Tensor s, bool[] needs, {OPERANDS}) -> Tensor[]",
    _backward,
    _backward_fake,
)
