"""How one call runs: the members of a group on one input, as one operation where that can be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heterolora.errors import FuseError
from heterolora.fusion.decline import is_dense, why_output
from heterolora.fusion.interface import Runner
from heterolora.fusion.member import Member
from heterolora.fusion.own_base import run_base
from heterolora.kernels import Branch, Site, group_linear, low_rank_add
from heterolora.kernels.dispatch import Choice, choose, quickest

__all__ = ["How", "chosen_path", "path_alone", "run"]

# Rows of a training batch, for which the report says what "auto" takes.
_ROWS = 8192


@dataclass
class How:
    """How the operations of one fused model run.

    Attributes:
        backend: "aten", "triton" or "auto".
        captured: steps are captured in CUDA graphs, so the host's time counts nothing.
        runner: who runs the operations in the kernels' place for now, or None.
    """

    backend: str
    captured: bool = False
    runner: Runner | None = None


def run(members: Sequence[Member], x: Tensor, how: How) -> list[Tensor | None]:
    """The outputs of the members' layers for x: of those with dense bases by one operation, of the
    others by one for each dtype that their bases return.

    Returns:
        A tensor [..., n] for each member, or None where PEFT has to run it: nothing can be added to
        what its base returned (`Member.unfit` then says why), or "auto" leaves it to PEFT.
    """
    dense = [member for member in members if is_dense(member.layer)]
    outputs = _with_dense_bases(dense, x, how) if dense else {}
    if len(dense) < len(members):
        rest = [member for member in members if member not in dense]
        outputs |= _with_own_bases(rest, x, how)
    return [outputs.get(member.name) for member in members]


def chosen_path(members: Sequence[Member], how: How) -> Choice:
    """The path that "auto" takes for members with dense bases, and why, without running them.

    The rows are those of the last input that they had, or 8192.
    """
    weight = members[0].site().weight
    shape, dtype = members[0].asked or ((_ROWS, weight.shape[1]), weight.dtype)
    x = weight.new_empty((), dtype=dtype).expand(shape)
    sites, branches = _group(members, x, in_pass=False)
    return quickest(x, sites, branches, captured=how.captured)


def path_alone(member: Member, how: How) -> str:
    """What a member that nothing speaks against runs on by itself, as `FuseReport.fused` has it.

    Raises:
        FuseError: the backend cannot run it here.
    """
    layer, adapter = member.layer, member.adapter_branch(0)
    sites = [member.site()] if is_dense(layer) else []
    x = (sites[0].weight if sites else adapter.a).new_empty(1).expand(_ROWS, layer.in_features)
    backend = "triton" if adapter.dropout else how.backend
    try:
        path = choose(backend, x, (adapter.a, adapter.b), sites, [adapter])
    except ValueError as error:
        raise FuseError(f"{member.name}: {error}") from error
    return path if sites else f"{path}, own base matmul"


def _with_dense_bases(members: Sequence[Member], x: Tensor, how: How) -> dict[str, Tensor]:
    """All outputs by name, or none at all where "auto" leaves the members to PEFT."""
    sites, branches = _group(members, x)
    path = how.backend
    # A compiler leaves out most of what makes a call slow, and would be asked anew for the one pass
    # of a runner.
    if not torch.compiler.is_compiling():
        if how.runner is not None:
            names = [name for member in members for name in member.branch_names()]
            options = _options(branches, x, how.backend)
            return _named(members, how.runner.run(names, x, sites, branches, **options))
        if path == "auto":
            path = quickest(x, sites, branches, captured=how.captured).path
            for member in members:
                member.asked = x.shape, x.dtype
                if path == "peft":
                    member.left.add(member.asked)
            if path == "peft":
                return {}
    return _named(members, group_linear(x, sites, branches, **_options(branches, x, path)))


def _with_own_bases(members: Sequence[Member], x: Tensor, how: How) -> dict[str, Tensor]:
    """The outputs by name, without those of members that turn out to be unfit."""
    by_dtype: dict[torch.dtype, list[tuple[Member, Tensor]]] = {}
    for member in members:
        y = run_base(member.layer, x)
        member.unfit = why_output(member.layer, x, y)
        if member.unfit is None:
            by_dtype.setdefault(y.dtype, []).append((member, y))
    outputs: dict[str, Tensor] = {}
    for pairs in by_dtype.values():
        fit, bases = [member for member, _ in pairs], [y for _, y in pairs]
        branches = _branches(fit, x)
        options = _options(branches, x, how.backend)
        outputs |= _named(fit, low_rank_add(bases, x, branches, **options))
    return outputs


def _group(
    members: Sequence[Member], x: Tensor, *, in_pass: bool = True
) -> tuple[list[Site], list[Branch]]:
    return [member.site() for member in members], _branches(members, x, in_pass=in_pass)


def _branches(members: Sequence[Member], x: Tensor, *, in_pass: bool = True) -> list[Branch]:
    return [
        branch
        for index, member in enumerate(members)
        for branch in member.branches(index, x, in_pass=in_pass)
    ]


def _options(branches: Sequence[Branch], x: Tensor, implementation: str) -> dict[str, Any]:
    """The implementation, and where a branch drops out, the seed of the masks."""
    if not any(branch.dropout for branch in branches):
        return {"implementation": implementation}
    # From torch's own generator, so that seeding, checkpointing and graph replay govern it.
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    return {"implementation": "triton", "seed": seed}


def _named(members: Sequence[Member], outputs: Sequence[Tensor]) -> dict[str, Tensor]:
    return {member.name: y for member, y in zip(members, outputs, strict=True)}
