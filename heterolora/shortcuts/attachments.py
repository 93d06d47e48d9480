"""One LoRA-adapted shortcut, and those that end at one projection; see `model`."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.errors import ShortcutError
from heterolora.fusion.interface import end_at, factors_in_use, rank_in_use
from heterolora.kernels import Branch, low_rank_add
from heterolora.shortcuts.sources import FFN, LAYER, Key, Sources

__all__ = ["Attachment", "Shortcut", "ShortcutCandidate"]


@dataclass(frozen=True)
class ShortcutCandidate:
    """A shortcut that a model could have.

    Attributes:
        projection: name of the linear layer to whose output it would add.
        kind: one of `KINDS`.
        layer: number of that layer's transformer layer in the model.
        width: columns d of its source and of its output.
    """

    projection: str
    kind: str
    layer: int
    width: int

    @property
    def name(self) -> str:
        """What a shortcut of this kind is called, "<projection>:<kind>"."""
        return f"{self.projection}:{self.kind}"

    @property
    def unit_cost(self) -> int:
        """Parameters per unit of rank: a row of A [r, d] and a column of B [d, r]."""
        return 2 * self.width

    @property
    def max_rank(self) -> int:
        """The rank of a [d, d] matrix at most."""
        return self.width


class Shortcut(nn.Module):
    """One branch s (u A^T) B^T, without bias or dropout.

    Attributes:
        a, b: factors [r, d] and [d, r]; float64 beside float64 weights, else float32.
        scale: alpha / r.
        name: "<name of the projection it adds to>:<kind>".
        source: which activation it reads.
    """

    def __init__(self, candidate: ShortcutCandidate, like: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        self.candidate = candidate
        layer = candidate.layer
        self.source: Key = {
            "in-attn": (layer, LAYER),
            "in-ffn": (layer, FFN),
            "cross-ffn": (layer - 1, FFN),
            "cross-layer": (layer, LAYER),
        }[candidate.kind]
        self.alpha = alpha
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        size = candidate.width
        self.a = nn.Parameter(torch.empty(rank, size, dtype=dtype, device=like.device))
        self.b = nn.Parameter(torch.zeros(size, rank, dtype=dtype, device=like.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def name(self) -> str:
        """What its candidate is called."""
        return self.candidate.name

    @property
    def rank(self) -> int:
        """The full rank r."""
        return self.a.shape[0]

    @property
    def in_use(self) -> int:
        """The rank at which it is used, which a search may have set below its full one."""
        rank = rank_in_use(self)
        return self.rank if rank is None else rank

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B at the rank in use: [r, d] and [d, r]; the parameters themselves at the full one.

        The scale stays that of the full rank.
        """
        return factors_in_use(self, self.a, self.b)

    @property
    def scale(self) -> float:
        """alpha / r, at every rank in use."""
        return self.alpha / self.rank

    def forward(self, u: Tensor) -> Tensor:
        """[..., n] for a source [..., d], as PEFT computes a LoRA branch."""
        a, b = self.factors
        return nn.functional.linear(nn.functional.linear(u.to(a.dtype), a), b) * self.scale

    def extra_repr(self) -> str:
        return f"{self.name}, rank={self.rank}, alpha={self.alpha}"


class Attachment:
    """The shortcuts that end at one projection, as `fuse` takes them (`FurtherBranches`).

    Those switched off by a search are passed over.

    Args:
        projection: the linear layer, with or without LoRA, to whose output they are added.
        shortcuts: all of them.
        sources: where their sources are found.

    Attributes:
        bound: the projection's own forward adds them, as it is fused.
        backend: that of `fuse`, or None in a model that is not fused.
    """

    def __init__(self, projection: nn.Module, shortcuts: list[Shortcut], sources: Sources) -> None:
        self.shortcuts = shortcuts
        self.bound = False
        self.backend: str | None = None
        self._sources = sources
        self._projection = projection
        self._handle: RemovableHandle = projection.register_forward_hook(self._after)
        end_at(projection, self)

    def remove(self) -> None:
        """Take them off the projection."""
        self._handle.remove()
        end_at(self._projection, None)

    def __iter__(self) -> Iterator[Shortcut]:
        """The shortcuts in use, in the order of `branches`."""
        return (shortcut for shortcut in self.shortcuts if shortcut.in_use)

    def names(self) -> list[str]:
        """The names of the shortcuts in use."""
        return [shortcut.name for shortcut in self]

    def branches(self, site: int, x: Tensor) -> list[Branch]:
        """The branches of an operation on x [..., k], with the sources of the running pass."""
        if not self._sources.on:
            return []
        return [Branch(site, *s.factors, s.scale, u) for s, u in self._with_sources(x)]

    def shapes(self, site: int, x: Tensor) -> list[Branch]:
        """The same branches outside of a pass, with sources of no content."""
        rows = x.shape[:-1]
        held = {s.source: x.new_empty(()).expand(*rows, s.a.shape[1]) for s in self}
        return [Branch(site, *s.factors, s.scale, held[s.source]) for s in self]

    def add(self, y: Tensor, *, in_place: bool) -> Tensor:
        """The projection's output y [..., n] with the shortcuts added.

        Args:
            in_place: nobody but the caller holds y, so that the op may write into it.
        """
        if not self._sources.on:
            return y
        pairs = self._with_sources(y)
        if self.backend is not None and in_place and pairs:
            branches = [Branch(0, *s.factors, s.scale, u) for s, u in pairs]
            return low_rank_add([y], pairs[0][1], branches, implementation=self.backend)[0]
        total = y
        for shortcut, u in pairs:
            total = total + shortcut(u)
        return total.to(y.dtype)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self.bound:
            return None
        return self.add(output, in_place=len(module._forward_hooks) == 1)

    def _with_sources(self, rows_like: Tensor) -> list[tuple[Shortcut, Tensor]]:
        rows = rows_like.shape[:-1]
        views: dict[Key, Tensor] = {}
        for shortcut in self:
            u = self._sources.get(shortcut.source, shortcut.name)
            if u.shape[-1] != shortcut.a.shape[1] or math.prod(u.shape[:-1]) != math.prod(rows):
                raise ShortcutError(
                    f"{shortcut.name}: the {shortcut.source[1]} has shape {tuple(u.shape)}, and "
                    f"{math.prod(rows)} rows of {shortcut.a.shape[1]} columns are needed"
                )
            # OPT flattens the rows for its FFN. One view a source: the op reads it once.
            if shortcut.source not in views:
                views[shortcut.source] = u if u.shape[:-1] == rows else u.reshape(*rows, -1)
        return [(shortcut, views[shortcut.source]) for shortcut in self]
