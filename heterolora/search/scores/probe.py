"""The temporary adapter that a static search scores, and what it is fed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from heterolora.errors import DataError, ModelError
from heterolora.search.lora_config import lora_config
from heterolora.search.scores.gradients import Batch, batch_loss, branch_factors, model_device
from heterolora.search.scores.proxies import PROXIES
from heterolora.search.sites import Site, lookalikes

if TYPE_CHECKING:
    from peft import PeftModel
    from rich.progress import Progress

__all__ = [
    "PROBE_B_STD",
    "PROBE_RANK",
    "SKETCH_RANK",
    "Feed",
    "attach",
    "draw_b",
    "length",
    "nonzero_b",
    "progress",
    "rank_to_probe",
    "timed_step",
    "tracked",
]

T = TypeVar("T")

logger = logging.getLogger("heterolora")

# SNIP and SynFlow are linear in B near B = 0, so to first order this scale cancels in a ranking.
PROBE_B_STD = 1e-3

# A gradient norm at rank 8 averages eight random directions, and the pass costs no more than a
# training step of common rank.
PROBE_RANK = 8
# The docstring of `heterolora.search.scores.spectral.spectral` says what a sketch of this rank is
# worth.
SKETCH_RANK = 40
_OVERSAMPLING = 8


def rank_to_probe(proxy: str, largest: int) -> int:
    """The rank of the probe adapter, with `largest` the largest rank that may be chosen."""
    if PROXIES[proxy].sketch:
        return max(SKETCH_RANK, largest + _OVERSAMPLING)
    return min(largest, PROBE_RANK)


def attach(model: nn.Module, sites: Sequence[Site], rank: int, scaling: float) -> PeftModel:
    """`model` with a fresh adapter of this rank on every site, at alpha/r = `scaling`.

    Its heads stay frozen, since only LoRA is scored: a task type would make PEFT train, and so
    copy, the head.

    Raises:
        ModelError: PEFT cannot adapt one of the modules.
    """
    from peft import get_peft_model

    by_name = {site.name: site for site in sites}
    config = lora_config(
        by_name, dict.fromkeys(by_name, rank), scaling, lookalikes=lookalikes(model, sites)
    )
    try:
        return get_peft_model(model, config)
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"PEFT cannot put a LoRA adapter on {type(model).__name__}: {error}"
        ) from error


def draw_b(model: nn.Module, seed: int, std: float = PROBE_B_STD) -> None:
    """Fill every LoRA B with N(0, std^2), the same numbers for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, (_, b) in sorted(branch_factors(model).items()):
            b.copy_(torch.randn(b.shape, generator=generator) * std)


@contextmanager
def nonzero_b(model: nn.Module, proxy: str, seed: int) -> Iterator[None]:
    """`draw_b` for a proxy that is zero where every B is zero, as here; zero again on exit."""
    needed = PROXIES[proxy].nonzero_b
    factors = [b for _, b in branch_factors(model).values()] if needed else []
    if not factors or any(bool(b.detach().any()) for b in factors):
        yield
        return
    logger.info("every LoRA B is zero, so %s scores a small random one", proxy)
    draw_b(model, seed)
    try:
        yield
    finally:
        with torch.no_grad():
            for b in factors:
                b.zero_()


def length(batches: Any) -> int | None:
    """How many batches there are, or None for a stream."""
    try:
        return len(batches)
    # A DataLoader is Sized whatever it reads, and says only here that it reads a stream.
    except TypeError:
        return None


class Feed:
    """Batches that can be iterated once, with a progress bar, and whose first one is kept; or, if
    all are kept, any number of times.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        if not isinstance(batches, Iterable):
            raise DataError(f"batches must be an iterable of dicts, not {type(batches).__name__}")
        self._total = length(batches)
        self._rest = iter(batches)
        self._first: Batch | None = None
        self._kept: list[Batch] | None = None

    def keep(self) -> list[Batch]:
        """All batches, which are in memory from now on.

        Raises:
            DataError: there is none.
        """
        if self._kept is None:
            self._kept = [self.first(), *self._rest]
        return self._kept

    def first(self) -> Batch:
        """The first batch, whether or not it was consumed already.

        Raises:
            DataError: there is none.
        """
        if self._first is None:
            self._first = next(self._rest, None)
        if self._first is None:
            raise DataError("no batches to score with: the iterable is empty")
        return self._first

    @contextmanager
    def progress(self, label: str) -> Iterator[Iterator[Batch]]:
        """All batches, with a bar as of `tracked`."""
        batches = chain([self.first()], self._rest) if self._kept is None else self._kept
        with tracked(batches, self._total, label) as tracking:
            yield tracking


@contextmanager
def tracked(items: Iterable[T], total: int | None, label: str) -> Iterator[Iterator[T]]:
    """The items, with a bar as of `progress`."""
    with progress() as bar:
        yield iter(bar.track(items, total, description=label))


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on stderr that vanish at the end; none off a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        yield bar


def timed_step(
    model: nn.Module, batch: Batch, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of one training step (forward, backward, AdamW), after one untimed step."""
    device = model_device(model)
    model.train()
    adapter = [p for pair in branch_factors(model).values() for p in pair]
    optimizer = torch.optim.AdamW(adapter, lr=1e-4)
    elapsed = 0.0
    for _ in range(2):
        _wait(device)
        start = clock()
        batch_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        elapsed = clock() - start
    return elapsed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
