"""What a search may choose from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from heterolora.checked import is_integer
from heterolora.errors import SearchSpaceError
from heterolora.shortcuts.model import KINDS, MAX_RANK

__all__ = ["MAX_RANK", "SearchSpace"]


@dataclass(frozen=True)
class SearchSpace:
    """Candidate modules and shortcuts, and the ranks each of them may take.

    Attributes:
        target_modules: as in `peft.LoraConfig`: None or "all-linear", a sequence of names or
            suffixes, or a regular expression for full names.
        ranks: ranks to choose from, in increasing order; 0 means "no adapter on this module".
        shortcuts: kinds of LoRA-adapted shortcuts that are candidates in every layer, some of
            `heterolora.shortcuts.model.KINDS`; none by default.
        mapping: as of `heterolora.add_shortcuts`, for models whose layers it cannot read.

    Raises:
        SearchSpaceError: a field is malformed or contradictory.
    """

    target_modules: str | Sequence[str] | None = None
    ranks: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    shortcuts: tuple[str, ...] = ()
    mapping: Sequence[Mapping[str, str]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_modules", _checked_targets(self.target_modules))
        object.__setattr__(self, "ranks", _checked_ranks(self.ranks))
        object.__setattr__(self, "shortcuts", _checked_shortcuts(self.shortcuts))


def _checked_targets(targets: object) -> str | tuple[str, ...] | None:
    if targets is None:
        return None
    if isinstance(targets, str):
        if not targets:
            raise SearchSpaceError("target_modules is an empty string; use None for all linears")
        return targets
    if not isinstance(targets, (list, tuple, set, frozenset)):
        raise SearchSpaceError(
            "target_modules must be None, a string or a list of strings, "
            f"not {type(targets).__name__}"
        )
    entries = sorted(targets) if isinstance(targets, (set, frozenset)) else targets
    if not entries:
        raise SearchSpaceError("target_modules is an empty list; use None for all linears")
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise SearchSpaceError(f"target_modules holds {entry!r}, which is not a module name")
    return tuple(entries)


def _checked_shortcuts(kinds: object) -> tuple[str, ...]:
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise SearchSpaceError(f"shortcuts must be a list of some of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise SearchSpaceError(f"unknown shortcut {kind!r}; choose of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _checked_ranks(ranks: object) -> tuple[int, ...]:
    if isinstance(ranks, (str, bytes)) or not isinstance(ranks, Sequence):
        raise SearchSpaceError(f"ranks must be a sequence of integers, not {ranks!r}")
    for rank in ranks:
        if not is_integer(rank, high=MAX_RANK):
            raise SearchSpaceError(f"rank {rank!r} is not an integer in 0..{MAX_RANK}")
    if not any(ranks):
        raise SearchSpaceError(f"ranks={tuple(ranks)!r} holds no rank above 0")
    if len(set(ranks)) != len(ranks):
        raise SearchSpaceError(f"ranks={tuple(ranks)!r} holds a rank twice")
    if sorted(ranks) != list(ranks):
        raise SearchSpaceError(f"ranks={tuple(ranks)!r} are not in increasing order")
    return tuple(ranks)
