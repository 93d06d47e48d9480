"""The run time of `fuse`: how a layer's call becomes a group's call, and how groups are found.

Siblings (q, k, v; gate, up) are layers called one after the other with the same tensor object. When
the first of a known group is called, the whole group runs as one operation, and the others pick up
their output if they are called with the same object at the same version. Outputs wait only while
the siblings' common ancestor runs, so nothing outlives it, whatever happens inside: an exception, a
recompute under checkpointing, a sibling that is never called.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.decline import call_reason, input_reason, layer_reason
from heterolora.kernels import Branch, Site, group_linear

__all__ = ["Fusion", "Group", "Member"]

logger = logging.getLogger("heterolora")


class Member:
    """One LoRA layer bound to the fused path; its `forward` stands in the layer's instance dict."""

    def __init__(self, name: str, layer: Any, fusion: "Fusion") -> None:
        self.name = name
        self.layer = layer
        self.fusion = fusion
        self.group: Group | None = None
        layer.forward = self.forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and self.fusion.recording:
            self.fusion.record(self, x)
        group = self.group if self.group is not None and self.group.window_open else None
        reason = call_reason(args, kwargs)
        if reason is None:
            if group is not None and (y := group.pick_up(self, x)) is not None:
                return y
            reason = self.reason(x)
        if reason is not None:
            if not compiling:
                self.fusion.warn_once(reason)
            return type(self.layer).forward(self.layer, x, *args, **kwargs)
        return run([self], x)[0] if group is None else group.run(self, x)

    def reason(self, x: Tensor) -> str | None:
        return layer_reason(self.layer) or input_reason(self.layer, x)


class Group:
    """Members that receive the same tensor, and the outputs that wait for their calls."""

    def __init__(self, members: list[Member], ancestor: nn.Module) -> None:
        self.members = members
        self.window_open = False
        self.x: Tensor | None = None
        self.state: tuple[Any, ...] = ()
        self.waiting: dict[str, Tensor] = {}
        for member in members:
            member.group = self
        self.handles: list[RemovableHandle] = [
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

    def run(self, member: Member, x: Tensor) -> Tensor:
        """Run the group on x; the other members' outputs wait for their calls."""
        if not torch.compiler.is_compiling() and x.is_inference():
            # Without a version counter a change of x between siblings could not be seen.
            return run([member], x)[0]
        # If this is not the first input in this window, some members have had their turn.
        todo = set(self.waiting) or {sibling.name for sibling in self.members}
        members = [member] + [
            sibling
            for sibling in self.members
            if sibling is not member and sibling.name in todo and sibling.reason(x) is None
        ]
        y, *others = run(members, x)
        self.x, self.state = x, _state(x)
        self.waiting = {m.name: other for m, other in zip(members[1:], others, strict=True)}
        return y

    def _open(self, module: nn.Module, args: Any) -> None:
        self._reset(True)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self._reset(False)

    def _reset(self, window_open: bool) -> None:
        self.window_open = window_open
        self.x = None
        self.waiting = {}


class Fusion:
    """All that `fuse` did to one model; kept on the model, undone by :meth:`remove`."""

    def __init__(self, entries: list[nn.Module], layers: dict[str, nn.Module]) -> None:
        self.members = {name: Member(name, layer, self) for name, layer in layers.items()}
        self.groups: list[Group] = []
        self.unseen = set(layers)
        self.recording = False
        self._base = entries[-1]
        self._depth = 0
        self._runs: list[list[Member]] = []
        self._last: tuple[Tensor, int | None] | None = None
        self._warned: set[str] = set()
        self._handles: list[RemovableHandle] = []
        for entry in entries:
            self._handles.append(entry.register_forward_pre_hook(self._enter))
            self._handles.append(entry.register_forward_hook(self._leave, always_call=True))

    def adopt(self, earlier: "Fusion") -> None:
        """Keep the groups an earlier `fuse` of the same model had found."""
        for group in earlier.groups:
            names = [member.name for member in group.members]
            if all(name in self.members for name in names):
                self._add_group([self.members[name] for name in names])
        self._saw(set(earlier.members) - earlier.unseen)

    def record(self, member: Member, x: Tensor) -> None:
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
        for run_ in self._runs:
            names = {member.name for member in run_}
            if len(names) == len(run_) > 1 and names <= self.unseen:
                self._add_group(run_)
            self._saw(names)
        self._runs = []

    def _saw(self, names: set[str]) -> None:
        self.unseen -= names
        if not self.unseen:
            self._remove(self._handles)

    def _add_group(self, members: list[Member]) -> None:
        ancestor = self._ancestor([member.name for member in members])
        self.groups.append(Group(members, ancestor))

    def warn_once(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("fused layers now run PEFT's own forward: %s", reason)

    def remove(self) -> None:
        for member in self.members.values():
            bound = member.layer.__dict__.get("forward")
            # Code that wrapped the layer after `fuse` keeps its wrapper.
            if getattr(bound, "__self__", None) is member:
                del member.layer.forward
        for group in self.groups:
            self._remove(group.handles)
        self._remove(self._handles)

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

    def _ancestor(self, names: list[str]) -> nn.Module:
        root = self._base
        shared = []
        for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
            if len(set(parts)) > 1:
                break
            shared.append(parts[0])
        # Containers are never called, so their hooks would never open the window.
        while isinstance(root.get_submodule(".".join(shared)), (nn.ModuleList, nn.ModuleDict)):
            shared.pop()
        return root.get_submodule(".".join(shared))

    @staticmethod
    def _remove(handles: list[RemovableHandle]) -> None:
        for handle in handles:
            handle.remove()
        handles.clear()


def run(members: list[Member], x: Tensor) -> list[Tensor]:
    """Run the members' base layers and adapters on x as one operation."""
    sites, branches = [], []
    for index, member in enumerate(members):
        layer = member.layer
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        base = layer.base_layer
        # Conv1D keeps its weight as [k, n].
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
        sites.append(Site(weight, base.bias))
        branches.append(
            Branch(
                index,
                layer.lora_A[name].weight,
                layer.lora_B[name].weight,
                layer.scaling[name],
            )
        )
    return group_linear(x, sites, branches)


def _state(x: Tensor) -> tuple[Any, ...]:
    """What besides the object itself must be unchanged for a waiting output to be the right one."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A compiler cannot guard on a version. It traces the code in which the group was found, where x
    # did not change between the siblings.
    version = 0 if torch.compiler.is_compiling() else x._version
    return version, torch.is_grad_enabled(), autocast
