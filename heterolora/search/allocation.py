"""What a search decides: which module and which shortcut gets which rank."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from heterolora.search.dynamic.rankings import ParameterCounts
from heterolora.search.sites import Site
from heterolora.search.variant import Variant
from heterolora.shortcuts.attachments import Candidate

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
        step_time: training step relative to uniform LoRA of the budget's rank, as predicted; None
            without a budget of time.
        step_time_error: largest relative error of the measured steps that the prediction was fitted
            to, each predicted from the others; None by the cost model alone.
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
    shortcut_candidates: dict[str, Candidate] = field(default_factory=dict)
    shortcut_scaling: float = 2.0
    mapping: Sequence[Mapping[str, str]] | None = None
    variant: Variant = Variant()
    seconds: float = 0.0
    step_seconds: float | None = None
    step_time: float | None = None
    step_time_error: float | None = None

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

        `r` is the largest rank and alpha_i/r_i = alpha/r for every module, because vLLM and SGLang
        ignore `alpha_pattern` and take the global scale. Pattern keys are anchored full names.
        `target_modules` lists full names; if one of them is the ending of another module's name,
        which PEFT would then adapt too, it is a regular expression of exactly these names instead.
        """
        from peft import LoraConfig

        chosen = {name: rank for name, rank in self.ranks.items() if rank > 0}
        top = max(chosen.values())
        others = {f"^{re.escape(name)}": rank for name, rank in chosen.items() if rank != top}
        return LoraConfig(
            r=top,
            lora_alpha=_alpha(self.scaling, top),
            target_modules=self._targets(chosen),
            rank_pattern=others,
            alpha_pattern={key: _alpha(self.scaling, rank) for key, rank in others.items()},
            modules_to_save=list(self.modules_to_save) or None,
            task_type=self.task_type,
            fan_in_fan_out=all(self.sites[name].conv1d for name in chosen),
        )

    def _targets(self, chosen: dict[str, int]) -> list[str] | str:
        rest = [*(name for name in self.ranks if name not in chosen), *self.lookalikes]
        leaks = any(other.endswith(f".{name}") for name in chosen for other in rest)
        return "|".join(map(re.escape, chosen)) if leaks else list(chosen)

    def save(self, path: str | Path) -> None:
        """Write the allocation to `path` as JSON (schema version 2), creating its folder.

        Raises:
            AllocationFileError: the file cannot be written.
        """
        from heterolora.search.schema import write

        write(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read what `save` wrote.

        Raises:
            AllocationFileError: missing, malformed or newer file; the message names the key.
        """
        from heterolora.search.schema import read

        return read(Path(path))


def _alpha(scaling: float, rank: int) -> int | float:
    alpha = scaling * rank
    return int(alpha) if alpha == int(alpha) else alpha
