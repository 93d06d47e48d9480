"""The run time of `fuse`: how a layer's call becomes a group's call, and how groups are found.

Siblings (q, k, v; gate, up) are layers called one after the other with the same tensor object. When
the first of a known group is called, the whole group runs as one operation, and the others pick up
their output if they are called with the same object at the same version. Outputs wait only while
the siblings' common ancestor runs, so nothing outlives it, whatever happens inside: an exception, a
recompute under checkpointing, a sibling that is never called.
"""

import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.fusion.decline import (
    SWITCHED_OFF,
    active_adapter,
    call_reason,
    dense_weight,
    dropout_probability,
    input_reason,
    is_dense,
    layer_reason,
)
from heterolora.fusion.own_base import observed, output_reason, run_base
from heterolora.kernels import Branch, Site, group_linear, low_rank_add
from heterolora.kernels.dispatch import Choice, quickest
from heterolora.search.dynamic.masks import rank_in_use

if TYPE_CHECKING:
    from heterolora.search.scores.backward import Scorer
    from heterolora.shortcuts.attachments import Attachment

__all__ = ["Fusion", "Group", "Member"]

logger = logging.getLogger("heterolora")


class Member:
    """One LoRA layer bound to the fused path; its `forward` stands in the layer's instance dict."""

    def __init__(
        self, name: str, layer: Any, fusion: "Fusion", shortcuts: "Attachment | None" = None
    ) -> None:
        self.name = name
        self.layer = layer
        self.fusion = fusion
        # That end at this layer: branches of its operation.
        self.shortcuts = shortcuts
        self.group: Group | None = None
        # Shape and dtype of the last input that `auto` was asked about.
        self.asked: tuple[torch.Size, torch.dtype] | None = None
        # Of inputs for which PEFT's own forward is expected to be faster.
        self.left: set[tuple[torch.Size, torch.dtype]] = set()
        # Why the base's output cannot be added to; seen only once the base has run.
        self.unfit: str | None = None
        layer.forward = self.forward
        if shortcuts is not None:
            shortcuts.bound = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        compiling = torch.compiler.is_compiling()
        if not compiling and self.fusion.recording:
            self.fusion.record(self, x)
        if not compiling and self.fusion.scorer is not None:
            self.fusion.scorer.called(self.name)
        elif not compiling and self.left and (x.shape, x.dtype) in self.left:
            return self._unfused(x, *args, **kwargs)
        group = self.group if self.group is not None and self.group.window_open else None
        reason = call_reason(args, kwargs)
        if reason is None:
            if group is not None and (y := group.pick_up(self, x)) is not None:
                return y
            reason = self.reason(x)
        if reason is None:
            y = run([self], x)[0] if group is None else group.run(self, x)
            if y is not None:
                return y
            # Nothing speaks against a layer that was left to PEFT for its speed.
            reason = self.unfit
        if not compiling and reason is not None and reason != SWITCHED_OFF:
            self.fusion.warn_once(reason)
        fresh = reason == SWITCHED_OFF and not observed(self.layer.base_layer)
        return self._unfused(x, *args, fresh=fresh, **kwargs)

    def _unfused(self, x: Tensor, *args: Any, fresh: bool = False, **kwargs: Any) -> Any:
        y = type(self.layer).forward(self.layer, x, *args, **kwargs)
        fresh = fresh and output_reason(self.layer, x, y) is None
        return y if self.shortcuts is None else self.shortcuts.add(y, in_place=fresh)

    def reason(self, x: Tensor) -> str | None:
        return (
            self.unfit
            or layer_reason(self.layer, self.fusion.backend)
            or input_reason(self.layer, x)
        )


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
            # It was asked about alone.
            member.left.clear()
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

    def run(self, member: Member, x: Tensor) -> Tensor | None:
        """Run the group on x; the other members' outputs wait for their calls."""
        if not torch.compiler.is_compiling() and x.is_inference():
            # Without a version counter a change of x between siblings could not be seen.
            return run([member], x)[0]
        # If this is not the first input in this window, some members have had their turn.
        todo = set(self.waiting) or {sibling.name for sibling in self.members}
        members = [member] + [
            sibling
            for sibling in self.members
            if sibling is not member
            and sibling.name in todo
            and sibling.reason(x) is None
            # Who watches a base layer sees its calls when PEFT makes them.
            and not observed(sibling.layer.base_layer)
        ]
        y, *others = run(members, x)
        self.x, self.state = x, _state(x)
        self.waiting = {
            m.name: other for m, other in zip(members[1:], others, strict=True) if other is not None
        }
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

    def __init__(
        self,
        entries: list[nn.Module],
        layers: dict[str, nn.Module],
        backend: str,
        shortcuts: Mapping[str, "Attachment"],
        *,
        captured: bool,
    ) -> None:
        self.backend = backend
        self.captured = captured
        self.shortcuts = shortcuts
        for attachment in shortcuts.values():
            attachment.backend = backend
        self.members = {
            name: Member(name, layer, self, shortcuts.get(name)) for name, layer in layers.items()
        }
        self.groups: list[Group] = []
        self.unseen = set(layers)
        self.recording = False
        self.scorer: Scorer | None = None
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
            if all(name in self.members and name not in self.shortcuts for name in names):
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
            # A sibling that runs early would read its shortcuts' sources too early.
            apart = any(member.shortcuts is not None for member in run_)
            if len(names) == len(run_) > 1 and names <= self.unseen and not apart:
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

    def choices(self, names: Collection[str], rows: int) -> dict[str, Choice]:
        """What `auto` runs for the layers of these names that have dense bases, and why.

        Args:
            rows: of an input, for layers that have not been called.
        """
        found: dict[str, Choice] = {}
        grouped = [group.members for group in self.groups]
        alone = [[member] for member in self.members.values() if member.group is None]
        for members in (*grouped, *alone):
            members = [m for m in members if m.name in names and is_dense(m.layer)]
            if members:
                weight = dense_weight(members[0].layer)
                shape, dtype = members[0].asked or ((rows, weight.shape[1]), weight.dtype)
                x = weight.new_empty((), dtype=dtype).expand(shape)
                sites, branches = _sites(members), _branches(members, x, shapes_only=True)
                choice = quickest(x, sites, branches, captured=self.captured)
                found.update((member.name, choice) for member in members)
        return found

    def remove(self) -> None:
        for member in self.members.values():
            bound = member.layer.__dict__.get("forward")
            # Code that wrapped the layer after `fuse` keeps its wrapper.
            if getattr(bound, "__self__", None) is member:
                del member.layer.forward
                if member.shortcuts is not None:
                    member.shortcuts.bound = False
        for attachment in self.shortcuts.values():
            attachment.backend = None
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


def run(members: list[Member], x: Tensor) -> list[Tensor | None]:
    """Run the members' base layers and adapters on x: one operation for those with dense bases, one
    for each dtype that the others' bases return. None where that cannot be added to, and for dense
    ones where PEFT's own layers are expected to be faster.
    """
    outputs: dict[str, Tensor] = {}
    dense = [member for member in members if is_dense(member.layer)]
    if dense:
        _collect(outputs, dense, _dense(dense, x))
    own: dict[torch.dtype, list[tuple[Member, Tensor]]] = {}
    for member in members if len(dense) < len(members) else ():
        if member in dense:
            continue
        y = run_base(member.layer, x)
        reason = output_reason(member.layer, x, y)
        if reason is None:
            own.setdefault(y.dtype, []).append((member, y))
        else:
            member.unfit = reason
    for pairs in own.values():
        adding, bases = [member for member, _ in pairs], [y for _, y in pairs]
        branches = _branches(adding, x)
        options = _options(branches, x, adding[0].fusion.backend)
        _collect(outputs, adding, low_rank_add(bases, x, branches, **options))
    return [outputs.get(member.name) for member in members]


def _dense(members: list[Member], x: Tensor) -> list[Tensor]:
    """The outputs, or none at all where PEFT's own layers are expected to be faster."""
    fusion, sites, branches = members[0].fusion, _sites(members), _branches(members, x)
    if torch.compiler.is_compiling():
        # A compiler leaves out most of what makes a call slow, and would be asked anew for the one
        # pass that scores.
        return group_linear(x, sites, branches, **_options(branches, x, fusion.backend))
    if fusion.scorer is not None:
        names = [n for m in members for n in (m.name, *(s.name for s in m.shortcuts or ()))]
        options = _options(branches, x, fusion.backend)
        return fusion.scorer.run(names, x, sites, branches, **options)
    path = fusion.backend
    if path == "auto":
        path = quickest(x, sites, branches, captured=fusion.captured).path
        for member in members:
            member.asked = x.shape, x.dtype
            if path == "peft":
                member.left.add(member.asked)
    return [] if path == "peft" else group_linear(x, sites, branches, **_options(branches, x, path))


def _sites(members: list[Member]) -> list[Site]:
    layers = [member.layer for member in members]
    return [Site(dense_weight(layer), layer.base_layer.bias) for layer in layers]


def _branches(members: list[Member], x: Tensor, *, shapes_only: bool = False) -> list[Branch]:
    """Of the adapters, and of shortcuts: with their sources, or outside of a pass without."""
    branches: list[Branch] = []
    for index, member in enumerate(members):
        layer = member.layer
        name = active_adapter(layer)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        rank = rank_in_use(layer)
        factors = (a, b) if rank is None else (a[:rank], b[:, :rank])
        p = dropout_probability(layer, name)
        branches.append(Branch(index, *factors, layer.scaling[name], dropout=p))
        if member.shortcuts is not None:
            found = member.shortcuts.shapes if shapes_only else member.shortcuts.branches
            branches += found(index, x)
    return branches


def _options(branches: list[Branch], x: Tensor, implementation: str) -> dict[str, Any]:
    """Of the call that the branches share."""
    if not any(branch.dropout for branch in branches):
        return {"implementation": implementation}
    # From torch's own generator, so that seeding, checkpointing and graph replay govern it.
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    return {"implementation": "triton", "seed": seed}


def _collect(outputs: dict[str, Tensor], members: list[Member], values: list[Tensor]) -> None:
    outputs.update((member.name, y) for member, y in zip(members, values, strict=False))


def _state(x: Tensor) -> tuple[Any, ...]:
    """What besides the object itself must be unchanged for a waiting output to be the right one."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A compiler cannot guard on it, and traces code in which x did not change between siblings.
    version = 0 if torch.compiler.is_compiling() else x._version
    return version, torch.is_grad_enabled(), autocast
