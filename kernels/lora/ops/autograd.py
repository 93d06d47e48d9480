"""Autograd of the ops: a call as the flat list of tensors that torch follows, and back."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..group import Call, split
from .registry import below_autograd

__all__ = [
    "Form",
    "GroupFunction",
    "flatten",
    "gradients",
    "keep",
    "refuse_second_derivative",
    "saved",
]


class Form(NamedTuple):
    """A call without its tensors, which makes it from their flat list again.

    The list holds the outputs that are added to, if any; the sources, weights, biases, every A,
    every B; and the seed.

    Attributes:
        outputs, sources, weights, branches: how many of each.
        rest: the fields of `Call` after the seed.
    """

    outputs: int
    sources: int
    weights: int
    branches: int
    rest: tuple[Any, ...]

    def unflatten(self, tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Call]:
        """The outputs and the call."""
        p, t = self.weights, self.branches
        outputs, sources, weights, biases, a, b = split(
            tensors, self.outputs, self.sources, p, p, t, t
        )
        return outputs, Call(sources, weights, biases, a, b, tensors[-1], *self.rest)

    def needs(self, flags: Sequence[bool]) -> list[bool]:
        """The flags of sources, biases, A and B among one for each tensor of the list."""
        weights = self.outputs + self.sources
        return [*flags[self.outputs : weights], *flags[weights + self.weights : -1]]

    def spread(
        self, grads: Sequence[Tensor | None], flat: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """One entry for each tensor of the list: those of the weights and the seed are None.

        Args:
            grads: dY of each site, which the outputs that were added to get as it is.
            flat: of each source, bias, A and B.
        """
        q = self.sources
        return *grads[: self.outputs], *flat[:q], *[None] * self.weights, *flat[q:], None


def flatten(call: Call, outputs: Sequence[Tensor] = ()) -> tuple[Any, ...]:
    """A call's form, and the tensors of its list."""
    form = Form(len(outputs), len(call.sources), len(call.weights), len(call.a), call[6:])
    return form, *outputs, *call.sources, *call.weights, *call.biases, *call.a, *call.b, call.seed


class GroupFunction(torch.autograd.Function):
    """`group_linear`, or `low_rank_add_` where the form has outputs; the ops do the work."""

    @staticmethod
    def forward(ctx: Any, form: Form, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        outputs, call = form.unflatten(tensors)
        with below_autograd():
            if outputs:
                s = torch.ops.heterolora.low_rank_add_(outputs, *call)
                ctx.mark_dirty(*outputs)
            else:
                outputs, s = torch.ops.heterolora.group_linear(*call)
        keep(ctx, form, call, s)
        return (*outputs, s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        form: Form = ctx.form
        refuse_second_derivative("low_rank_add" if form.outputs else "group_linear")
        needs = form.needs(ctx.needs_input_grad[1:])
        flat: Sequence[Tensor | None] = [None] * len(needs)
        if any(needs):
            call, s = saved(ctx)
            flat = gradients(call, grads[:-1], s, needs)
        return None, *form.spread(grads, flat)


def refuse_second_derivative(operation: str) -> None:
    """Raise where the gradient being computed is to be differentiated again."""
    # torch's once_differentiable notices only a dY that needs a gradient, not A, B or x.
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{operation} can be differentiated once: call backward without create_graph=True, "
            "or heterolora.unfuse(model) first"
        )


def keep(ctx: Any, form: Form, call: Call, s: Tensor) -> None:
    """Save for the backward pass what :func:`saved` returns, and nothing else."""
    ctx.form = form
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(s)
    ctx.save_for_backward(*call.sources, *call.weights, *call.a, *call.b, s, call.seed)


def saved(ctx: Any) -> tuple[Call, Tensor]:
    """The call of the forward pass without biases, and its S.

    To be called once in a backward pass: under checkpointing a tensor is unpacked only once.
    """
    form: Form = ctx.form
    sources, weights, a, b, (s, seed) = split(
        ctx.saved_tensors, form.sources, form.weights, form.branches, form.branches, 2
    )
    return Call(sources, weights, (), a, b, seed, *form.rest), s


def gradients(
    call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each source, bias, A and B, or None where its flag is not set."""
    results = iter(torch.ops.heterolora.group_linear_backward(grads, s, needs, *call))
    return [next(results) if need else None for need in needs]
