"""What became of each LoRA layer of a model that was fused, in words."""

from collections import Counter
from dataclasses import dataclass, field

__all__ = ["FuseReport"]


@dataclass(frozen=True)
class FuseReport:
    """What became of every LoRA layer; names as in the base model, as in `Allocation.ranks`.

    Attributes:
        fused: what each fused layer runs on: "aten" or "triton", followed by ", own base matmul"
            where the base layer runs by itself (quantised, hooked, any forward of its own) and the
            low-rank part is added to its output. Under "auto" every call chooses for its number of
            rows; named is the choice for the example's, without one for 8192.
        left: why each layer that could be fused is left to PEFT's own forward at the example's
            size. Only under "auto".
        declined: why each other layer keeps PEFT's own forward for now. Reasons that can pass
            (merged, disabled, active dropout, ...) are looked at again at every call.
        groups: layers known so far to share one input, which run as one operation.
        why: the reason for each layer's path under "auto", with the times measured for its group,
            forward and backward, in milliseconds, where there are any.
        advice: what would make "auto" surer on this device, or "".
    """

    fused: dict[str, str] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)
    groups: tuple[tuple[str, ...], ...] = ()
    left: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    advice: str = ""

    def table(self) -> str:
        """One line a layer: its name, the path it runs on, and why."""
        rows = [
            *((name, path, self.why.get(name, "")) for name, path in self.fused.items()),
            *((name, "peft", why) for name, why in self.left.items()),
            *((name, "peft", f"declined: {why}") for name, why in self.declined.items()),
        ]
        width = max((len(name) for name, _, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {path}  {why}".rstrip() for name, path, why in rows)

    def __str__(self) -> str:
        lines = [
            f"{len(self.fused)} LoRA layers fused, {len(self.declined)} declined, "
            + (f"{len(self.left)} left to PEFT, " if self.left else "")
            + f"{len(self.groups)} groups"
        ]
        paths = [(f"fused, {path}", self.why.get(name, "")) for name, path in self.fused.items()]
        paths += [("left to PEFT", why) for why in self.left.values()]
        lines += [
            f"  {path}: {count}" + (f" ({why})" if why else "")
            for (path, why), count in sorted(Counter(paths).items())
        ]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.declined.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"  declined, {why}: {', '.join(names)}" for why, names in reasons.items()]
        return "\n".join([*lines, *([f"  {self.advice}"] if self.advice else [])])
