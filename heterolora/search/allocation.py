"""Decide which module and which shortcut gets which rank: score once, then allocate."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heterolora.attachments import Candidate
from heterolora.errors import SearchSpaceError
from heterolora.fuse import fuse, unfuse
from heterolora.search.budget import Budget, Priced
from heterolora.search.pools import choose_ranks, make_pools
from heterolora.search.preserve import preserved, seeded
from heterolora.search.probe import Feed, attach, draw_b, timed_step
from heterolora.search.proxies import NEEDS_NONZERO_B, PROXIES, Batch, Proxy
from heterolora.search.space import SearchSpace
from heterolora.search.step_fit import calibrated
from heterolora.search.step_time import StepTime
from heterolora.search.time_budget import TimeBudget
from heterolora.shortcuts import add_shortcuts, shortcut_candidates
from heterolora.sites import Site, find_sites, head_names, task_type

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["PROBE_RANK", "Allocation", "allocate", "uniform"]

# Scores are taken at this rank (or the largest of the space, if smaller): a gradient norm at rank 8
# averages eight random directions, and the pass costs no more than a training step of common rank.
PROBE_RANK = 8


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
        seconds: wall time of the search: probe adapter, scoring and solving.
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
    seconds: float = 0.0
    step_seconds: float | None = None
    step_time: float | None = None
    step_time_error: float | None = None

    @property
    def parameters(self) -> int:
        """LoRA parameters of the allocation: the sum of r * (in + out), shortcuts included.

        A static allocation has as many enabled, ever trained and stored.
        """
        sites = sum(rank * self.sites[name].unit_cost for name, rank in self.ranks.items())
        return sites + sum(
            rank * self.shortcut_candidates[name].unit_cost for name, rank in self.shortcuts.items()
        )

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
        """Write the allocation to `path` as JSON (schema version 1), creating its folder.

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


def allocate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    budget: Budget,
    shortcut_budget: Budget | None = None,
    proxy: str = "grad-norm",
    space: SearchSpace | None = None,
    seed: int = 0,
    scaling: float = 2.0,
    shortcut_scaling: float | None = None,
) -> Allocation:
    """Score every candidate once and spend `budget` where the scores say.

    A temporary LoRA adapter sits on every candidate module, and every candidate shortcut is there,
    while the proxy runs over the batches; after that the model is bit-identical to what it was
    (weights, buffers, modes, `requires_grad`, `.grad`, module objects, RNG states), also after an
    error or Ctrl-C.

    Where every rank would go to shortcuts, the module of the best score gets one of them: PEFT has
    no adapter without a module.

    Args:
        model: any transformers model without an adapter, on the device to score on.
        batches: dicts that the model takes, labels included; consumed once, all of them
            (synflow uses only the first).
        budget: LoRA parameters to spend, on modules and shortcuts together: one ranking of both.
            With `step_time` also the time that a training step may take; then without shortcuts.
        shortcut_budget: LoRA parameters to spend on shortcuts; `budget` is then for modules alone.
            HeteroLoRA calls these `combined` and `separated`.
        proxy: "constant" (the random control), "grad-norm", "snip" or "synflow".
        space: candidate modules, shortcuts and ranks; the default is all linears at 0, 1, 2, 4, 8,
            16, 32, and no shortcut.
        seed: seeds the probe adapter and dropout, and orders ties.
        scaling: alpha/r of the probe adapter and of the resulting configuration.
        shortcut_scaling: alpha/r of the shortcuts; None: as `scaling`. Scores of candidates with
            unlike scales are compared per unit of scale.

    Raises:
        ModelError: the model cannot be scored (no linears, already adapted, no loss).
        DataError: no batches, or batches without labels.
        SearchSpaceError: unknown proxy, or candidates that match nothing.
        ShortcutError: shortcuts are asked for, and the model's layers cannot be read.
        BudgetError: the budget is too small for one adapter, its rank above every candidate's, or
            its time less than that of any adapter.
        ScoreError: the loss or a score is not finite; DegenerateScoreError: every score is zero.
    """
    space = space or SearchSpace()
    measure = _proxy_named(proxy)
    scale = _checked_scaling(scaling)
    seed = _checked_seed(seed)
    own_scale = scale if shortcut_scaling is None else _checked_scaling(shortcut_scaling)
    sites = find_sites(model, space.target_modules)
    shortcuts = _shortcuts(model, space)
    candidates: list[Priced] = [*sites, *shortcuts]
    pools = make_pools(sites, shortcuts, space.ranks, budget, shortcut_budget)
    probe_rank = min(space.ranks[-1], PROBE_RANK)
    timing: dict[str, float | None] = {}

    start = time.perf_counter()
    everywhere = _allocation(
        model,
        sites,
        shortcuts,
        scores={},
        ranks={candidate.name: probe_rank for candidate in candidates},
        budget_parameters=0,
        proxy=proxy,
        scaling=scale,
    )
    with preserved(model), seeded(seed), torch.enable_grad():
        feed = Feed(batches)
        clock = None
        if budget.step_time is not None:
            clock = _time_budget(model, feed.first(), budget, everywhere, space)
        probe = attach(model, everywhere.lora_config)
        if shortcuts:
            alpha = own_scale * probe_rank
            add_shortcuts(probe, space.shortcuts, probe_rank, alpha, space.mapping)
        if proxy in NEEDS_NONZERO_B:
            draw_b(probe, seed)
        # Synflow swaps tensors by name for one pass, which only PEFT's own forward is sure to see.
        fused = proxy != "synflow"
        try:
            if fused:
                fuse(probe)
            with feed.progress(f"scoring ({proxy})") as stream:
                scores = measure(probe, stream)
            scales = {site.name: scale for site in sites}
            scales.update((shortcut.name, own_scale) for shortcut in shortcuts)
            if clock is not None:
                ranks, timing = clock.choose(scores, seed=seed)
            else:
                ranks = choose_ranks(pools, scores, scales, space.ranks, seed=seed)
            if not any(ranks[site.name] for site in sites):
                best = max(sites, key=lambda site: scores[site.name]).name
                ranks = choose_ranks(pools, scores, scales, space.ranks, required={best}, seed=seed)
            seconds = time.perf_counter() - start
            step_seconds = timed_step(probe, feed.first())
        finally:
            unfuse(probe)
    return _allocation(
        model,
        sites,
        shortcuts,
        scores={candidate.name: scores[candidate.name] for candidate in candidates},
        ranks=ranks,
        shortcut_scaling=own_scale,
        mapping=space.mapping if shortcuts else None,
        budget_parameters=sum(pool.parameters for pool in pools),
        proxy=proxy,
        seed=seed,
        scaling=scale,
        probe_rank=probe_rank,
        seconds=seconds,
        step_seconds=step_seconds,
        **timing,
    )


def uniform(
    model: nn.Module, rank: int, space: SearchSpace | None = None, *, scaling: float = 2.0
) -> Allocation:
    """The baseline: the same rank on every candidate module and shortcut, nothing scored.

    Raises:
        BudgetError: `rank` is not a positive integer.
        ModelError, SearchSpaceError, ShortcutError: as `allocate`.
    """
    space = space or SearchSpace()
    budget, scale = Budget(rank=rank), _checked_scaling(scaling)
    sites = find_sites(model, space.target_modules)
    shortcuts = _shortcuts(model, space)
    candidates: list[Priced] = [*sites, *shortcuts]
    return _allocation(
        model,
        sites,
        shortcuts,
        scores={candidate.name: 1.0 for candidate in candidates},
        ranks={candidate.name: rank for candidate in candidates},
        shortcut_scaling=scale,
        mapping=space.mapping if shortcuts else None,
        budget_parameters=budget.parameters(candidates),
        proxy="uniform",
        scaling=scale,
    )


def _shortcuts(model: nn.Module, space: SearchSpace) -> tuple[Candidate, ...]:
    if not space.shortcuts:
        return ()
    return shortcut_candidates(model, space.shortcuts, space.mapping)


def _allocation(
    model: nn.Module,
    sites: Sequence[Site],
    shortcuts: Sequence[Candidate],
    ranks: dict[str, int],
    **fields: Any,
) -> Allocation:
    kind = task_type(model)
    by_name = {site.name: site for site in sites}
    return Allocation(
        sites=by_name,
        shortcut_candidates={shortcut.name: shortcut for shortcut in shortcuts},
        task_type=kind,
        # PEFT's class for a task type adds that task's heads by itself.
        modules_to_save=() if kind else head_names(model),
        lookalikes=tuple(
            name
            for name, _ in model.named_modules()
            if name not in by_name and _endings(name) & by_name.keys()
        ),
        ranks={site.name: ranks[site.name] for site in sites},
        shortcuts={shortcut.name: ranks[shortcut.name] for shortcut in shortcuts},
        **fields,
    )


def _time_budget(
    model: nn.Module, batch: Batch, budget: Budget, everywhere: Allocation, space: SearchSpace
) -> TimeBudget:
    sites = list(everywhere.sites.values())
    step = StepTime.of(model, batch, sites)
    if budget.measured:
        step = calibrated(step, model, batch, everywhere)
    return TimeBudget(budget, step, sites, space.ranks)


def _endings(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}


def _alpha(scaling: float, rank: int) -> int | float:
    alpha = scaling * rank
    return int(alpha) if alpha == int(alpha) else alpha


def _proxy_named(proxy: str) -> Proxy:
    if proxy not in PROXIES:
        raise SearchSpaceError(f"unknown proxy {proxy!r}; choose one of {', '.join(PROXIES)}")
    return PROXIES[proxy]


def _checked_scaling(scaling: Any) -> float:
    valid = isinstance(scaling, (int, float)) and not isinstance(scaling, bool)
    if not valid or not math.isfinite(scaling) or scaling <= 0:
        raise SearchSpaceError(f"scaling={scaling!r}: expected a positive number (alpha/r)")
    return float(scaling)


def _checked_seed(seed: Any) -> int:
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise SearchSpaceError(f"seed={seed!r}: expected an integer in 0..2**32-1")
    return seed
