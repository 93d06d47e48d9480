"""The one door through which other code changes a layer's call, or runs it in the kernels' place.

A layer's call is its base layer and its adapter at full rank, computed by the kernels. Code outside
of this folder can make it differ in three ways, and in no other:

- `use_rank`: the adapter is used at a part of its rank (a dynamic search).
- `end_at`: further low-rank branches end at the layer's output (shortcuts).
- `Fusion.runner`: someone else runs the operations of a pass (the scorer, a recorder).

The first two are the layer's `Changes`, kept in its instance dict: they hold whether the model is
fused or not, follow the layer into a copy of the model, and go when the layer goes. A `Changes` is
never edited, only replaced, and so is a runner: code that has prepared a call compares both by
identity to see whether it still holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor, nn

from heterolora.kernels import Branch, Site

__all__ = [
    "Changes",
    "FurtherBranches",
    "Runner",
    "changes_of",
    "end_at",
    "factors_in_use",
    "rank_in_use",
    "use_rank",
]

_KEY = "_heterolora_changes"


class FurtherBranches(Protocol):
    """Branches that end at one layer's output, beside that of its adapter.

    Attributes:
        bound: the layer's fused forward adds them, so nothing else must; set by `fuse`.
        backend: that of `fuse` while the model is fused, else None; set by `fuse`, also where the
            layer has no adapter and so no fused forward.
    """

    bound: bool
    backend: str | None

    def names(self) -> list[str]:
        """A name for each of `branches`, in their order, for a runner."""
        ...

    def branches(self, site: int, x: Tensor) -> list[Branch]:
        """The branches of an operation on x [..., k], for its site of this index."""
        ...

    def shapes(self, site: int, x: Tensor) -> list[Branch]:
        """The same branches outside of a pass, with sources of no content."""
        ...

    def add(self, y: Tensor, *, in_place: bool) -> Tensor:
        """The layer's output y [..., n] with the branches added.

        Args:
            in_place: nobody but the caller holds y, so it may be written into.
        """
        ...


class Runner(Protocol):
    """Runs the operations of fused layers with dense bases in the kernels' place.

    While a model has one, no layer is left to PEFT for speed. Compiled code passes it over.
    """

    def called(self, name: str) -> None:
        """Hear that the layer of this name is called, whoever computes its output."""
        ...

    def run(
        self,
        names: Sequence[str],
        x: Tensor,
        sites: Sequence[Site],
        branches: Sequence[Branch],
        **options: Any,
    ) -> list[Tensor]:
        """Return what `heterolora.kernels.group_linear` would for these arguments.

        Args:
            names: of each branch: that of its layer, or as `FurtherBranches.names`.
        """
        ...


@dataclass(frozen=True)
class Changes:
    """What is different about one layer's call.

    Attributes:
        rank: the rank at which the adapter is used, by the first rows of A [R, k] and columns of B
            [n, R], at its full scale; None for the full rank. At 0 the layer is switched off.
        further: branches beside the adapter's, or None.
    """

    rank: int | None = None
    further: FurtherBranches | None = None


_NONE = Changes()


def changes_of(layer: nn.Module) -> Changes:
    """What is different about a layer's call now; the same object until something changes."""
    changes: Changes = layer.__dict__.get(_KEY, _NONE)
    return changes


def use_rank(layer: nn.Module, rank: int | None) -> None:
    """Use a layer at a part of its rank from its next call on, or with None at its full rank."""
    _change(layer, replace(changes_of(layer), rank=rank))


def end_at(layer: nn.Module, further: FurtherBranches | None) -> None:
    """Let branches end at a layer; for a fused model, before it is fused (again)."""
    _change(layer, replace(changes_of(layer), further=further))


def rank_in_use(layer: nn.Module) -> int | None:
    """The rank at which a layer is used now; None where that is its full rank."""
    return changes_of(layer).rank


def factors_in_use(layer: nn.Module, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A [r, k] and B [n, r] at the rank in use; the factors as they are at the full rank."""
    rank = rank_in_use(layer)
    return (a, b) if rank is None else (a[:rank], b[:, :rank])


def _change(layer: nn.Module, changes: Changes) -> None:
    if changes == _NONE:
        layer.__dict__.pop(_KEY, None)
    else:
        layer.__dict__[_KEY] = changes
