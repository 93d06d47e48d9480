"""What a search decides: which module and which shortcut gets which rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from heterolora.errors import AllocationFileError
from heterolora.search import schema
from heterolora.search.dynamic.rankings import ParameterCounts
from heterolora.search.lora_config import lora_config
from heterolora.search.sites import Site
from heterolora.search.variant import Variant
from heterolora.shortcuts.attachments import ShortcutCandidate

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["Allocation"]


@dataclass(frozen=True)
class Allocation:
    """Which module and which shortcut gets which rank, and how that was decided.

    Attributes:
        scores: {module or shortcut name: score}, as the proxy gave them (not normalised).
        ranks: {module name: rank}; 0 means no adapter.
        sites: {module name: Site}, the candidates and their sizes.
        budget_parameters: LoRA parameters that could be spent; `parameters` says how many were.
        proxy: name of the proxy, or "uniform".
        seed: seed of the probe adapter and of the order of ties.
        scaling: alpha/r, the same for every module.
        probe_rank: LoRA rank at which the scores were taken; None if nothing was scored.
        task_type: PEFT's task type, or None.
        modules_to_save: heads that PEFT has to be told to train in full.
        lookalikes: modules that are no candidates but whose name ends in a candidate's name.
        shortcuts: {"<projection>:<kind>": rank}; 0 means no shortcut.
        shortcut_candidates: {shortcut name: where it starts and ends, and its size}.
        shortcut_scaling: alpha/r of every shortcut.
        mapping: the layers' parts, where the search space named them.
        variant: what was done beside running the proxy.
        seconds: wall time of the search: warm-up, probe adapter, scoring and solving.
        step_seconds: wall time of one warm training step (forward, backward, AdamW) of the probe
            adapter on the first batch; None if nothing was scored.
    """

    scores: dict[str, float]
    ranks: dict[str, int]
    sites: dict[str, Site]
    budget_parameters: int
    proxy: str
    seed: int = 0
    scaling: float = 2.0
    probe_rank: int | None = None
    task_type: str | None = None
    modules_to_save: tuple[str, ...] = ()
    lookalikes: tuple[str, ...] = ()
    shortcuts: dict[str, int] = field(default_factory=dict)
    shortcut_candidates: dict[str, ShortcutCandidate] = field(default_factory=dict)
    shortcut_scaling: float = 2.0
    mapping: Sequence[Mapping[str, str]] | None = None
    variant: Variant = Variant()
    seconds: float = 0.0
    step_seconds: float | None = None

    @property
    def parameters(self) -> int:
        """LoRA parameters of the allocation: the sum of r * (in + out), shortcuts included."""
        sites = sum(rank * self.sites[name].unit_cost for name, rank in self.ranks.items())
        return sites + sum(
            rank * self.shortcut_candidates[name].unit_cost for name, rank in self.shortcuts.items()
        )

    @property
    def counts(self) -> ParameterCounts:
        """`parameters` three times: a static allocation trains and stores just what it enables."""
        return ParameterCounts(self.parameters, self.parameters, self.parameters)

    @property
    def ratio(self) -> float | None:
        """Cost of the search in training steps (`seconds / step_seconds`)."""
        return self.seconds / self.step_seconds if self.step_seconds else None

    @property
    def lora_config(self) -> LoraConfig:
        """A plain `peft.LoraConfig` that gives every module its rank; a new object on each access.
        Of shortcuts PEFT knows nothing: `heterolora.adapt` adds them.
        """
        return lora_config(
            self.sites,
            self.ranks,
            self.scaling,
            lookalikes=self.lookalikes,
            modules_to_save=self.modules_to_save,
            task_type=self.task_type,
        )

    def save(self, path: str | Path) -> None:
        """Write the allocation to `path` as JSON (schema version 2), creating its folder.

        Raises:
            AllocationFileError: the file cannot be written.
        """
        schema.write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read what `save` wrote.

        Raises:
            AllocationFileError: missing, malformed or newer file; the message names the key.
        """
        found = schema.read(Path(path))
        stated = found.pop("parameters")
        allocation = cls(**found)
        used, budget = allocation.parameters, allocation.budget_parameters
        if stated != used:
            problem = f"parameters is {stated}, but the ranks add up to {used}"
        elif used > budget:
            problem = f"parameters is {used}, above budget_parameters {budget}"
        else:
            return allocation
        raise AllocationFileError(f"{path}: {problem}")
