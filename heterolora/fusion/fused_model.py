"""What `fuse` did to one model, and how each of its layers' calls is then taken."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.fusion.call import How, chosen_path, run
from heterolora.fusion.decline import SWITCHED_OFF, is_dense, why_output
from heterolora.fusion.group import Group, GroupFinder
from heterolora.fusion.interface import Runner, changes_of
from heterolora.fusion.member import Member
from heterolora.fusion.modules import entries, parent_of_all
from heterolora.fusion.own_base import observed
from heterolora.fusion.report import FuseReport
from heterolora.kernels import dispatch

__all__ = ["FusedLayer", "Fusion"]

logger = logging.getLogger("heterolora")


class FusedLayer:
    """One bound LoRA layer: :meth:`forward` stands in the layer's instance dict in place of PEFT's.

    Attributes:
        member: the layer, as a part of operations.
        group: the group it belongs to, once one is found.
    """

    def __init__(self, member: Member, fusion: "Fusion") -> None:
        self.member = member
        self.group: Group | None = None
        self._fusion = fusion
        member.layer.forward = self.forward
        if member.further is not None:
            member.further.bound = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x [..., k]: by its group's operation, its own, or by PEFT."""
        member, fusion, how = self.member, self._fusion, self._fusion.how
        compiling = torch.compiler.is_compiling()
        if not compiling:
            if fusion.finder.recording:
                fusion.finder.record(member, x)
            if how.runner is not None:
                how.runner.called(member.name)
            elif member.left and (x.shape, x.dtype) in member.left:
                return self._by_peft(x, args, kwargs)
        group = self.group if self.group is not None and self.group.window_open else None
        if group is not None and not args and not kwargs:
            waiting = group.pick_up(member, x)
            if waiting is not None:
                return waiting
        reason = member.why(how.backend, x, args, kwargs)
        if reason is None:
            y = run([member], x, how)[0] if group is None else group.run(member, x)
            if y is not None:
                return y
            # None still, if "auto" leaves the layer to PEFT.
            reason = member.unfit
        if not compiling and reason is not None and reason != SWITCHED_OFF:
            fusion.warn_once(reason)
        # Then PEFT returns what the base layer made, and nobody else has seen that.
        fresh = reason == SWITCHED_OFF and not observed(member.layer)
        return self._by_peft(x, args, kwargs, fresh=fresh)

    def _by_peft(
        self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, fresh: bool = False
    ) -> Tensor:
        layer, further = self.member.layer, self.member.further
        y: Tensor = type(layer).forward(layer, x, *args, **kwargs)
        if further is None:
            return y
        return further.add(y, in_place=fresh and why_output(layer, x, y) is None)

    def remove(self) -> None:
        """Give the layer its own forward back, unless other code has wrapped ours since."""
        bound = self.member.layer.__dict__.get("forward")
        if getattr(bound, "__self__", None) is self:
            del self.member.layer.forward
            if self.member.further is not None:
                self.member.further.bound = False


class Fusion:
    """All that `fuse` did to one model; kept on the model, undone by :meth:`remove`.

    Args:
        model: the model given to `fuse`.
        layers: the LoRA layers to bind, by name in the base model.
        how: how their operations run.

    Attributes:
        layers: the bound layers by name.
        groups: the groups found so far.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], how: How) -> None:
        self.how = how
        starts = entries(model)
        self._base = starts[-1]
        changes = [changes_of(module) for module in self._base.modules()]
        self._further = [each.further for each in changes if each.further is not None]
        for further in self._further:
            further.backend = how.backend
        self.layers = {
            name: FusedLayer(Member(name, layer), self) for name, layer in layers.items()
        }
        self.groups: list[Group] = []
        self.finder = GroupFinder(starts, layers, self._add_group)
        self._warned: set[str] = set()

    @property
    def runner(self) -> Runner | None:
        """Who runs the operations in the kernels' place; set it for a pass, then to None."""
        return self.how.runner

    @runner.setter
    def runner(self, runner: Runner | None) -> None:
        self.how.runner = runner

    def adopt(self, earlier: "Fusion") -> None:
        """Keep the groups an earlier `fuse` of the same model had found."""
        for group in earlier.groups:
            names = [member.name for member in group.members]
            members = [self.layers[name].member for name in names if name in self.layers]
            if len(members) == len(names) and all(m.further is None for m in members):
                self._add_group(members)
        self.finder.saw(earlier.layers.keys() - earlier.finder.unseen)

    def report(self, paths: Mapping[str, str], declined: Mapping[str, str]) -> FuseReport:
        """What became of every layer.

        Args:
            paths: what each layer that nothing speaks against runs on by itself.
            declined: why each other layer is declined.
        """
        choices = self._choices(paths) if self.how.backend == "auto" else {}
        fused = dict(paths) | {name: choice.path for name, choice in choices.items()}
        devices = {self.layers[name].member.site().weight.device for name in choices}
        return FuseReport(
            fused={name: path for name, path in fused.items() if path != "peft"},
            declined=dict(declined),
            groups=tuple(tuple(m.name for m in group.members) for group in self.groups),
            left={name: choice.reason for name, choice in choices.items() if choice.path == "peft"},
            why={name: choice.reason for name, choice in choices.items()},
            advice=" ".join(filter(None, map(dispatch.advice, devices))),
        )

    def _choices(self, names: Collection[str]) -> dict[str, dispatch.Choice]:
        """What "auto" runs for the layers of these names that have dense bases, and why."""
        grouped = [group.members for group in self.groups]
        alone = [[layer.member] for layer in self.layers.values() if layer.group is None]
        choices: dict[str, dispatch.Choice] = {}
        for members in (*grouped, *alone):
            members = [m for m in members if m.name in names and is_dense(m.layer)]
            if members:
                choice = chosen_path(members, self.how)
                choices |= dict.fromkeys((member.name for member in members), choice)
        return choices

    def warn_once(self, reason: str) -> None:
        """Log a reason why a bound layer runs PEFT's own forward, the first time it is met."""
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("fused layers now run PEFT's own forward: %s", reason)

    def remove(self) -> None:
        """Undo everything, but for forwards that other code has wrapped since."""
        for layer in self.layers.values():
            layer.remove()
        for further in self._further:
            further.backend = None
        for group in self.groups:
            group.remove()
        self.finder.remove()

    def _add_group(self, members: list[Member]) -> None:
        names = [member.name for member in members]
        ancestor = self._base.get_submodule(parent_of_all(self._base, names))
        group = Group(members, ancestor, self.how)
        self.groups.append(group)
        for member in members:
            self.layers[member.name].group = group
            # "auto" was asked about the layer alone.
            member.left.clear()
