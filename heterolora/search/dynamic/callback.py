"""Dynamic HeteroLoRA: which modules are adapted is decided anew while the model trains."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heterolora.checked import is_integer, is_number
from heterolora.errors import BudgetError, ModelError, SearchSpaceError, TrainingError
from heterolora.search.budget import Budget, Priced
from heterolora.search.dynamic.masks import RankMasks, parked_count
from heterolora.search.dynamic.masks_file import SavedSearch, read_search, write_search
from heterolora.search.dynamic.rankings import ParameterCounts, Ranking
from heterolora.search.dynamic.samples import Samples, agreed_scores, derived_seed
from heterolora.search.dynamic.surroundings import dynamic_reason, unwrapped
from heterolora.search.pools import Pool, choose_ranks, make_pools
from heterolora.search.preserve import buffers_kept, seeded
from heterolora.search.scores.gradients import Batch
from heterolora.search.scores.probe import length, nonzero_b
from heterolora.search.scores.proxies import PROXIES, check_proxy
from heterolora.search.sites import Site
from heterolora.search.space import SearchSpace
from heterolora.shortcuts.checkpoints import ShortcutCallback, resumed_folder, saved_folder

__all__ = ["DynamicSearchCallback"]

logger = logging.getLogger("heterolora")

_WARMUPS = ("all", "uniform", "constant")


class DynamicSearchCallback(TrainerCallback):
    """Scores all modules at the start of each epoch and every so often within it, and puts those to
    use that the budget pays for (HeteroLoRA, arXiv 2406.14956, its dynamic form).

    The model is a `PeftModel` with one adapter of the same rank R on every candidate, as
    ``adapt(model, uniform(model, R))`` makes it. Shortcuts that it has, of rank R too (as
    ``add_shortcuts(model, rank=R)`` makes them), are candidates as well, and "module" stands for
    them below. Scores count per unit of scale, so that an alpha of their own neither favours nor
    hinders them. By default a module has rank R or is switched off,
    as in the paper, so ``Budget(rank=r)`` keeps about r/R of them on. With `ranks` a module may
    have a rank between too, and then uses the first rows of A and columns of B. Every module keeps
    the scale alpha/R. What is not in use keeps its weights and its optimizer state, does not move,
    and goes on from there when its turn comes; `RankMasks` says precisely how.

    Every ranking puts all modules to use, sums gradients over the batches by the model's own loss
    (not by a `compute_loss` of the Trainer), and leaves weights, gradients, buffers, modes, random
    state and the order of the data as they were. SNIP and SynFlow are zero where B = 0: before
    anything has trained they score a small random B, as `heterolora.allocate` does; later a module
    that was never on scores zero, which ``warmup="all"`` avoids.

    Each checkpoint gets a file of the ranks and of everything not in use, and the shortcuts (as by
    `heterolora.ShortcutCallback`, which need not be there too); a run resumed from it repeats an
    uninterrupted one. The adapter in the checkpoint, like any other that is saved, is
    what the model computes then. Under DDP every process scores its share of the batches, and
    gradients are summed over them before a score is taken, so that all decide alike.

    Args:
        budget: LoRA parameters in use at a time, those of shortcuts included.
        shortcut_budget: a budget of the shortcuts alone, `budget` being that of the LoRA modules
            (HeteroLoRA's `separated`); None for one ranking of both (its `combined`).
        proxy: "constant" (a random choice, drawn anew each time), "grad-norm", "snip", "synflow".
        ranks: what a module may have, at most R, in increasing order; None for (0, R).
        every: fraction of an epoch between two rankings, counted from the epoch's start and rounded
            up to steps. HeteroLoRA used 0.2.
        batches: how many batches of the training set to score with, of the size of a training
            batch, or the batches themselves. HeteroLoRA used 32.
        fresh: other rows at every ranking; by default the first rows of the training set each time,
            as in HeteroLoRA's code.
        warmup_epochs: length of the warm-up.
        warmup: until then, "all" modules are in use at rank R, or every module at the "uniform"
            rank that the budget pays for, or modules drawn at random as by the proxy "constant"
            (the later version of HeteroLoRA's code, for two epochs).
        seed: of the random choices: ties, fresh batches, dropout while scoring.
        resume_from: the checkpoint folder that training is resumed from, where it is not in
            `TrainingArguments.output_dir`.

    Attributes:
        ranks: {name of a module or shortcut: rank in use now}; empty before training.
        rankings: the decisions of this run, in order (those before a resume are not among them).
        masks: the `RankMasks` of the model; its `lift` puts everything to use.
        counts: `ParameterCounts` as of now.

    Raises:
        SearchSpaceError, BudgetError, DataError: an argument is malformed, or the budget buys
            nothing.
        ModelError: the model is not as above.
        TrainingError: a setting under which this cannot be right (FSDP, DeepSpeed, DataParallel,
            torch.compile, fp16, DDP that expects every gradient, an optimizer whose state cannot be
            split), or a checkpoint without or with another search. `GraphedTrainer` runs its steps
            without CUDA graphs.
        AdapterFileError: as `heterolora.ShortcutCallback`.
        ScoreError: a loss or score is not finite; the model is put back as it was.
    """

    # Read by `GraphedTrainer`: what it recorded would run on after a change.
    changes_model = True

    def __init__(
        self,
        budget: Budget,
        *,
        shortcut_budget: Budget | None = None,
        proxy: str = "grad-norm",
        ranks: Sequence[int] | None = None,
        every: float = 0.2,
        batches: int | Iterable[Batch] = 32,
        fresh: bool = False,
        warmup_epochs: float = 0.0,
        warmup: str = "all",
        seed: int = 0,
        resume_from: str | Path | None = None,
    ) -> None:
        if not isinstance(budget, Budget):
            raise BudgetError(f"budget must be a Budget(rank=... or params=...), not {budget!r}")
        if not isinstance(shortcut_budget, Budget | None):
            raise BudgetError(f"shortcut_budget must be a Budget or None, not {shortcut_budget!r}")
        check_proxy(proxy)
        if not is_number(every) or not 0 < every <= 1:
            raise SearchSpaceError(f"every={every!r}: expected a fraction of an epoch, up to 1")
        if not is_number(warmup_epochs) or not 0 <= warmup_epochs < math.inf:
            raise SearchSpaceError(f"warmup_epochs={warmup_epochs!r}: expected 0 or more")
        if warmup not in _WARMUPS:
            raise SearchSpaceError(
                f"unknown warmup {warmup!r}; choose one of {', '.join(_WARMUPS)}"
            )
        if not is_integer(seed, high=2**32 - 1):
            raise SearchSpaceError(f"seed={seed!r}: expected an integer in 0..2**32-1")
        self.budget = budget
        self.shortcut_budget = shortcut_budget
        self.proxy = proxy
        self.allowed = None if ranks is None else SearchSpace(ranks=tuple(ranks)).ranks
        self.every = float(every)
        self.warmup_epochs = float(warmup_epochs)
        self.warmup = warmup
        self.seed = seed
        self.resume_from = resume_from
        self._checkpoints = ShortcutCallback(resume_from=resume_from)
        self.rankings: list[Ranking] = []
        self.masks: RankMasks | None = None
        self._samples = Samples(batches, fresh=fresh)
        self._model: Any = None
        self._candidates: list[Priced] = []
        self._choices: tuple[int, ...] = ()
        self._pools: list[Pool] = []
        self._steps = 0
        self._ever: dict[str, int] = {}
        self._to_check = True

    @property
    def ranks(self) -> dict[str, int]:
        return dict(self.masks.ranks) if self.masks is not None else {}

    @property
    def counts(self) -> ParameterCounts:
        enabled = self._count(self.ranks)
        return ParameterCounts(enabled, self._count(self._ever), stored=enabled)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = unwrapped(kwargs["model"])
        reason = dynamic_reason(args, model)
        if reason is not None:
            raise TrainingError(f"no dynamic search under {reason}")
        resumed = state.global_step > 0
        if self.masks is not None and self._model is model and not resumed:
            self.masks.lift(kwargs.get("optimizer"))
        elif parked_count(model) and not resumed:
            raise ModelError(
                "parts of the model's adapter are switched off by an earlier search; call "
                "`masks.lift()` of its callback first"
            )
        self._model, self.masks = model, RankMasks(model)
        self._checkpoints.on_train_begin(args, state, control, **kwargs)
        self.rankings, self._to_check = [], True
        self._ever = dict.fromkeys(self.masks.ranks, 0)
        self._plan(self.masks)
        # As Trainer counts: a stream without length is one epoch.
        batches = length(kwargs.get("train_dataloader"))
        accumulated = args.gradient_accumulation_steps
        self._steps = max(-(-batches // accumulated), 1) if batches else state.max_steps
        if resumed:
            self._resume(args, state, self.masks)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.masks is not None
        step, first = state.global_step, round(self.warmup_epochs * self._steps)
        if (step % self._steps) % math.ceil(self.every * self._steps) and step != first:
            return
        optimizer = kwargs.get("optimizer")
        if step >= first:
            self._rank(args, self.masks, optimizer, kwargs, self.proxy, step)
        elif self.warmup == "constant":
            self._rank(args, self.masks, optimizer, kwargs, "constant", step)
        elif self.warmup == "uniform" and step == 0:
            self.masks.apply(self._uniform(self.masks), optimizer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.masks is not None
        self.masks.drop_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.masks is not None
        for name, rank in self.masks.ranks.items():
            self._ever[name] = max(self._ever[name], rank)
        if self._to_check and any(r < self.masks.full_rank for r in self.masks.ranks.values()):
            self._to_check = False
            self.masks.check_optimizer(kwargs.get("optimizer"))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.masks is not None
        if args.should_save:
            saved = SavedSearch(
                step=state.global_step,
                ranks=self.ranks,
                ever=self._ever,
                settings=self._settings(),
                tensors=self.masks.tensors(),
            )
            write_search(saved, saved_folder(args, state))
        self._checkpoints.on_save(args, state, control, **kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            # Trainer has loaded the weights, which are nothing without the ranks they had.
            saved = read_search(Path(state.best_model_checkpoint))
            self.masks = RankMasks(self._model)
            self._checkpoints.on_train_end(args, state, control, **kwargs)
            self._load(self.masks, saved, Path(state.best_model_checkpoint))

    def _plan(self, masks: RankMasks) -> None:
        """What there is to choose from, and how much of it."""
        sites = [Site(name, *masks.shape(name)) for name in masks.layers]
        shortcuts = [shortcut.candidate for shortcut in masks.shortcuts.values()]
        self._candidates = [*sites, *shortcuts]
        self._choices = self.allowed or (0, masks.full_rank)
        if self._choices[-1] > masks.full_rank:
            raise SearchSpaceError(
                f"ranks go up to {self._choices[-1]}, and the model's adapter has rank "
                f"{masks.full_rank}: adapt it with the largest rank a module may get"
            )
        self._pools = make_pools(sites, shortcuts, self._choices, self.budget, self.shortcut_budget)
        if (
            self.warmup == "uniform"
            and self.warmup_epochs
            and not all(self._uniform(masks).values())
        ):
            budgets = " and ".join(str(pool.parameters) for pool in self._pools)
            raise BudgetError(
                f"a budget of {budgets} parameters does not pay for rank 1 on every module; take "
                'warmup="constant" or a larger budget'
            )

    def _uniform(self, masks: RankMasks) -> dict[str, int]:
        """In every pool the one rank that its budget pays for."""
        ranks = {}
        for pool in self._pools:
            of_one = sum(candidate.unit_cost for candidate in pool.candidates)
            rank = min(pool.parameters // of_one, masks.full_rank)
            ranks.update({candidate.name: rank for candidate in pool.candidates})
        return ranks

    def _rank(
        self,
        args: TrainingArguments,
        masks: RankMasks,
        optimizer: Any,
        kwargs: dict[str, Any],
        proxy: str,
        step: int,
    ) -> None:
        before = dict(masks.ranks)
        own = derived_seed(self.seed, step)
        masks.lift(optimizer)
        try:
            # Dropout is drawn anew with the rows only, so that scores of fixed ones compare.
            with seeded(own if self._samples.fresh else self.seed):
                batches: Iterable[Batch] = []
                if proxy != "constant":
                    loader, size = kwargs.get("train_dataloader"), args.per_device_train_batch_size
                    batches = self._samples.take(loader, size, own)
                with buffers_kept(self._model), nonzero_b(self._model, proxy, self.seed):
                    scores = agreed_scores(PROXIES[proxy], self._model, batches)
            scales = None if proxy == "constant" else {n: masks.scale(n) for n in scores}
            chosen = choose_ranks(self._pools, scores, scales, self._choices, seed=own)
        except BaseException:
            masks.apply(before, optimizer)
            raise
        masks.apply(chosen, optimizer)
        self.rankings.append(Ranking(step, proxy, scores, chosen))
        logger.info(
            "step %d: by %s %d of %d modules in use with %d parameters, %d of them as before",
            step,
            proxy,
            sum(map(bool, chosen.values())),
            len(chosen),
            self._count(chosen),
            sum(bool(rank) and rank == before[name] for name, rank in chosen.items()),
        )

    def _resume(self, args: TrainingArguments, state: TrainerState, masks: RankMasks) -> None:
        folder = resumed_folder(args, state, self.resume_from)
        saved = read_search(folder)
        if saved.step != state.global_step:
            raise TrainingError(
                f"{folder} is of step {saved.step}, and training goes on at {state.global_step}; "
                "give the checkpoint's folder as resume_from="
            )
        for key, value in self._settings().items():
            if saved.settings.get(key) != value:
                raise TrainingError(
                    f"{folder} was saved by a search with {key}={saved.settings.get(key)!r}, and "
                    f"this one has {value!r}; give the settings of that run"
                )
        self._load(masks, saved, folder)
        self._ever.update(saved.ever)

    def _load(self, masks: RankMasks, saved: SavedSearch, folder: Path) -> None:
        try:
            masks.load(saved.ranks, saved.tensors)
        except ModelError as error:
            raise TrainingError(f"{folder} does not fit the model: {error}") from error
        if not masks.parked_is_zero():
            raise TrainingError(
                f"{folder}: the model's weights are not those of this checkpoint; resume with "
                "Trainer.train(resume_from_checkpoint=...)"
            )

    def _settings(self) -> dict[str, Any]:
        of_shortcuts = self._pools[1:]
        return {
            "parameters": self._pools[0].parameters,
            "shortcut_parameters": of_shortcuts[0].parameters if of_shortcuts else None,
            "proxy": self.proxy,
            "ranks": list(self._choices),
            "every": self.every,
            "batches": self._samples.count,
            "fresh": self._samples.fresh,
            "warmup_epochs": self.warmup_epochs,
            "warmup": self.warmup,
            "seed": self.seed,
        }

    def _count(self, ranks: dict[str, int]) -> int:
        return sum(each.unit_cost * ranks.get(each.name, 0) for each in self._candidates)
