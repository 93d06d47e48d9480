"""Decide which module and which shortcut gets which rank: score once, then allocate."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from heterolora.checked import is_integer, is_number
from heterolora.errors import SearchSpaceError
from heterolora.fusion.fuse import fuse, unfuse
from heterolora.search.allocation import Allocation
from heterolora.search.budget import Budget, Priced
from heterolora.search.gains import shuffled
from heterolora.search.pools import Pool, choose_ranks, make_pools
from heterolora.search.preserve import preserved, seeded
from heterolora.search.scores.gradients import Batch
from heterolora.search.scores.probe import Feed, attach, draw_b, rank_to_probe, timed_step
from heterolora.search.scores.proxies import PROXIES, check_proxy
from heterolora.search.sites import Site, find_sites, heads_to_save, lookalikes, task_type
from heterolora.search.space import SearchSpace
from heterolora.search.variant import Variant, scored, warmed_heads
from heterolora.shortcuts.attachments import ShortcutCandidate
from heterolora.shortcuts.model import add_shortcuts, shortcut_candidates

__all__ = ["allocate", "uniform"]

logger = logging.getLogger(__name__)


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
    variant: Variant | None = None,
) -> Allocation:
    """Score every candidate once and spend `budget` where the scores say.

    A temporary LoRA adapter sits on every candidate module, and every candidate shortcut is there,
    while the proxy runs over the batches; after that the model is bit-identical to what it was
    (weights, buffers, modes, `requires_grad`, `.grad`, module objects, RNG states), also after an
    error or Ctrl-C.

    Candidates that no gradient reaches, and so score 0, are named in a warning of the log.

    Where every rank would go to shortcuts, the module of the best score gets one of them: PEFT has
    no adapter without a module.

    Processes do not talk to each other here, and other batches would give each its own ranks: for
    data parallel training allocate in one of them, or with the `heterolora search`
    command, and have all `Allocation.load` what it saved.

    Args:
        model: any transformers model without an adapter, on the device to score on.
        batches: dicts that the model takes, labels included; consumed once, all of them
            (synflow uses only the first).
        budget: LoRA parameters to spend, on modules and shortcuts together: one ranking of both.
        shortcut_budget: LoRA parameters to spend on shortcuts; `budget` is then for modules alone.
            HeteroLoRA calls these `combined` and `separated`.
        proxy: a key of `heterolora.search.PROXIES`, each described there.
        space: candidate modules, shortcuts and ranks; the default is all linears at 0, 1, 2, 4, 8,
            16, 32, and no shortcut.
        seed: seeds the probe adapter and dropout, and orders ties.
        scaling: alpha/r of the probe adapter and of the resulting configuration.
        shortcut_scaling: alpha/r of the shortcuts; None: as `scaling`. Scores of candidates with
            unlike scales are compared per unit of scale.
        variant: a warm-up before scoring, and how scores compete; by default neither. A warm-up
            holds all batches in memory.

    Raises:
        ModelError: the model cannot be scored (no linears, already adapted, no loss).
        DataError: no batches, or batches without labels.
        SearchSpaceError: unknown proxy, candidates that match nothing, a floor above all ranks, or
            head steps where there is no head.
        ShortcutError: shortcuts are asked for, and the model's layers cannot be read.
        BudgetError: the budget is too small for one adapter, or its rank above every candidate's.
        ScoreError: the loss or a score is not finite; DegenerateScoreError: every score is zero.
    """
    space = space or SearchSpace()
    variant = variant or Variant()
    check_proxy(proxy)
    scale = _checked_scaling(scaling)
    seed = _checked_seed(seed)
    own_scale = scale if shortcut_scaling is None else _checked_scaling(shortcut_scaling)
    sites = find_sites(model, space.target_modules)
    shortcuts = _shortcuts(model, space)
    candidates: list[Priced] = [*sites, *shortcuts]
    offered = variant.offered(space.ranks)
    pools = make_pools(sites, shortcuts, offered, budget, shortcut_budget)
    probe_rank = rank_to_probe(proxy, space.ranks[-1])
    scales = {site.name: scale for site in sites}
    scales.update((shortcut.name, own_scale) for shortcut in shortcuts)

    start = time.perf_counter()
    with preserved(model), seeded(seed), torch.enable_grad():
        feed = Feed(batches)
        heads = warmed_heads(model, feed, variant)
        probe = attach(model, sites, probe_rank, scale)
        if shortcuts:
            alpha = own_scale * probe_rank
            add_shortcuts(probe, space.shortcuts, probe_rank, alpha, space.mapping)
        if PROXIES[proxy].nonzero_b and not variant.train_steps:
            draw_b(probe, seed)
        try:
            if PROXIES[proxy].fused:
                fuse(probe)
            scores = scored(probe, proxy, feed, heads, variant)
            _warn_of_zeros(scores)
            if variant.shuffle:
                scores = shuffled(scores, candidates, seed)
            ranks = _chosen(
                pools,
                scores,
                None if proxy == "constant" else scales,
                offered,
                sites=sites,
                by_layer=variant.by_layer,
                seed=seed,
            )
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
        variant=variant,
        seconds=seconds,
        step_seconds=step_seconds,
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


def _shortcuts(model: nn.Module, space: SearchSpace) -> tuple[ShortcutCandidate, ...]:
    if not space.shortcuts:
        return ()
    return shortcut_candidates(model, space.shortcuts, space.mapping)


def _allocation(
    model: nn.Module,
    sites: Sequence[Site],
    shortcuts: Sequence[ShortcutCandidate],
    ranks: dict[str, int],
    **fields: Any,
) -> Allocation:
    return Allocation(
        sites={site.name: site for site in sites},
        shortcut_candidates={shortcut.name: shortcut for shortcut in shortcuts},
        task_type=task_type(model),
        modules_to_save=heads_to_save(model),
        lookalikes=lookalikes(model, sites),
        ranks={site.name: ranks[site.name] for site in sites},
        shortcuts={shortcut.name: ranks[shortcut.name] for shortcut in shortcuts},
        **fields,
    )


def _chosen(
    pools: Sequence[Pool],
    scores: Mapping[str, float],
    scales: Mapping[str, float] | None,
    ranks: Sequence[int],
    *,
    sites: Sequence[Site],
    by_layer: bool,
    seed: int,
) -> dict[str, int]:
    """`choose_ranks`, and again with the best site required if all ranks went to shortcuts."""
    chosen = choose_ranks(pools, scores, scales, ranks, equal_layers=by_layer, seed=seed)
    if any(chosen[site.name] for site in sites):
        return chosen
    best = max(sites, key=lambda site: scores[site.name]).name
    return choose_ranks(
        pools, scores, scales, ranks, required={best}, equal_layers=by_layer, seed=seed
    )


def _warn_of_zeros(scores: Mapping[str, float]) -> None:
    """Say which candidates no gradient reached: a floor or a large budget gives them ranks too."""
    zeros = [name for name, score in scores.items() if score == 0]
    if 0 < len(zeros) < len(scores):
        logger.warning(
            "%d of %d candidates score 0 (%s): if the loss does not depend on them, leave them "
            "out of target_modules",
            len(zeros),
            len(scores),
            ", ".join(zeros[:3]) + (", ..." if len(zeros) > 3 else ""),
        )


def _checked_scaling(scaling: Any) -> float:
    if not is_number(scaling) or scaling <= 0:
        raise SearchSpaceError(f"scaling={scaling!r}: expected a positive number (alpha/r)")
    return float(scaling)


def _checked_seed(seed: Any) -> int:
    if not is_integer(seed, high=2**32 - 1):
        raise SearchSpaceError(f"seed={seed!r}: expected an integer in 0..2**32-1")
    return seed
