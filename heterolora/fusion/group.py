"""What a group is, and how groups are found.

Siblings (q, k, v; gate, up) are layers called one after the other with the same tensor object. When
the first of a known group is called, the whole group runs as one operation, and the others pick up
their output if they are called with the same object at the same version. Outputs wait only while
the siblings' common ancestor runs, so nothing outlives it, whatever happens inside: an exception, a
recompute under checkpointing, a sibling that is never called.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.fusion.call import How, run
from heterolora.fusion.member import Member
from heterolora.fusion.own_base import observed

__all__ = ["Group", "GroupFinder"]


class Group:
    """Members that receive the same tensor, and the outputs that wait for their calls.

    Args:
        members: in the order of their calls.
        ancestor: outputs wait while this module runs.
        how: how operations of the model run.
    """

    def __init__(self, members: Sequence[Member], ancestor: nn.Module, how: How) -> None:
        self.members = list(members)
        self.how = how
        self.window_open = False
        self.x: Tensor | None = None
        self.state: tuple[Any, ...] = ()
        self.waiting: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = [
            ancestor.register_forward_pre_hook(self._open),
            ancestor.register_forward_hook(self._close, always_call=True),
        ]

    def pick_up(self, member: Member, x: Tensor) -> Tensor | None:
        """The output that waits for this member's call with x, or None."""
        if member.name not in self.waiting or self.x is not x or self.state != _state(x):
            return None
        y = self.waiting.pop(member.name)
        if not self.waiting:
            self.x = None
        return y

    def run(self, member: Member, x: Tensor) -> Tensor | None:
        """The member's output for x, or None where PEFT has to make it; the others' wait."""
        if not torch.compiler.is_compiling() and x.is_inference():
            # Without a version counter a change of x between siblings could not be seen.
            return run([member], x, self.how)[0]
        # If this is not the first input in this window, some members have had their turn.
        todo = set(self.waiting) or {sibling.name for sibling in self.members}
        members = [member] + [
            sibling
            for sibling in self.members
            if sibling is not member
            and sibling.name in todo
            and sibling.why(self.how.backend, x) is None
            # Who watches a base layer sees its calls when PEFT makes them.
            and not observed(sibling.layer)
        ]
        y, *others = run(members, x, self.how)
        self.x, self.state = x, _state(x)
        self.waiting = {
            sibling.name: other
            for sibling, other in zip(members[1:], others, strict=True)
            if other is not None
        }
        return y

    def remove(self) -> None:
        """Take the hooks off; no output waits from then on."""
        _remove(self._handles)
        self._reset(False)

    def _open(self, module: nn.Module, args: Any) -> None:
        self._reset(True)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self._reset(False)

    def _reset(self, window_open: bool) -> None:
        self.window_open = window_open
        self.x = None
        self.waiting = {}


class GroupFinder:
    """Watches a model's passes until every layer was called once, and names the groups it saw.

    Args:
        entries: a call of one of these modules is a pass, outermost first.
        names: those of the layers to see.
        found: called between passes with the members of each new group.

    Attributes:
        recording: whether a pass runs whose calls are to be recorded.
        unseen: names of layers that have not been called.
    """

    def __init__(
        self,
        entries: Sequence[nn.Module],
        names: Iterable[str],
        found: Callable[[list[Member]], None],
    ) -> None:
        self.recording = False
        self.unseen = set(names)
        self._found = found
        self._depth = 0
        # Members that were called one after the other with the same tensor.
        self._runs: list[list[Member]] = []
        self._last: tuple[Tensor, int | None] | None = None
        self._handles: list[RemovableHandle] = []
        for entry in entries:
            self._handles.append(entry.register_forward_pre_hook(self._enter))
            self._handles.append(entry.register_forward_hook(self._leave, always_call=True))

    def record(self, member: Member, x: Tensor) -> None:
        """Note a call of a member with x in the pass that runs."""
        version = None if x.is_inference() else x._version
        if self._last is not None and self._last[0] is x and self._last[1] == version:
            self._runs[-1].append(member)
        else:
            self._runs.append([member])
        self._last = (x, version)

    def commit(self) -> None:
        """Make groups of what the finished passes showed.

        Not called inside a pass: its backward must recompute with the groups its forward had.
        """
        for members in self._runs:
            names = {member.name for member in members}
            # A sibling that runs early would read its further branches' sources too early.
            apart = any(member.further is not None for member in members)
            if len(names) == len(members) > 1 and names <= self.unseen and not apart:
                self._found(members)
            self.saw(names)
        self._runs = []

    def saw(self, names: Iterable[str]) -> None:
        """Look no longer for groups of the layers of these names."""
        self.unseen -= set(names)
        if not self.unseen:
            self.remove()

    def remove(self) -> None:
        """Take the hooks off; nothing is recorded from then on."""
        _remove(self._handles)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._depth == 0:
            self.commit()
            self.recording = bool(self.unseen)
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth = max(self._depth - 1, 0)
        if self._depth == 0:
            self.recording = False
            self._last = None


def _state(x: Tensor) -> tuple[Any, ...]:
    """What besides the object itself must be unchanged for a waiting output to be the right one."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A compiler cannot guard on it, and traces code in which x did not change between siblings.
    version = 0 if torch.compiler.is_compiling() else x._version
    return version, torch.is_grad_enabled(), autocast


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()
