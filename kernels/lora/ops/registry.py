"""Registration with torch, and which implementation serves a call."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import aten
from ..group import Call

__all__ = ["OPERANDS", "Backend", "backend", "below_autograd", "register", "without_autocast"]

_LIBRARY = torch.library.Library("heterolora", "DEF")

# The fields of a `Call`, with which the arguments of every op end.
OPERANDS = (
    "Tensor[] sources, Tensor[] weights, Tensor?[] biases, Tensor[] a, Tensor[] b, Tensor? seed, "
    "float[] scales, int[] branch_site, int[] branch_source, float[] dropout, str implementation"
)


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any] | None = None,
) -> None:
    """Define an op of the namespace "heterolora".

    Args:
        schema: its name, arguments and results.
        run: computes it on any device.
        fake: the results' shapes and dtypes, for compilers.
        autograd: what is called instead of `run` while gradients may be recorded.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    if autograd is not None:
        _LIBRARY.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"heterolora::{name}", fake, lib=_LIBRARY)


class Backend(Protocol):
    """What an implementation offers; `aten` documents the arguments."""

    def empty_s(self, call: Call) -> Tensor: ...

    def group_linear(self, call: Call) -> tuple[list[Tensor], Tensor]: ...

    def low_rank_add(self, call: Call, outputs: Sequence[Tensor]) -> Tensor: ...

    def group_linear_backward(
        self, call: Call, grads: Sequence[Tensor | None], s: Tensor, needs: Sequence[bool]
    ) -> list[Tensor]: ...

    def group_score(
        self,
        call: Call,
        grads: Sequence[Tensor | None],
        s: Tensor,
        needs: Sequence[bool],
        previous_a: Sequence[Tensor],
        previous_b: Sequence[Tensor],
    ) -> list[Tensor]: ...


def backend(call: Call) -> Backend:
    """The implementation that a call names."""
    if call.implementation == "triton":
        # Here, because triton is installed on some machines only.
        from ..gpu import passes

        return passes
    return aten


def below_autograd() -> AbstractContextManager[Any]:
    """Lets an op called inside run itself instead of its autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def without_autocast(s: Tensor) -> AbstractContextManager[Any]:
    """For backward passes: they may be called under an autocast that the forward pass was not."""
    if torch.is_autocast_enabled(s.device.type):
        return torch.autocast(s.device.type, enabled=False)
    return nullcontext()
