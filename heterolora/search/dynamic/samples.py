"""The batches that a dynamic search scores with, and how processes share them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from heterolora.errors import DataError, ScoreError
from heterolora.search.gains import numbers, renumbered
from heterolora.search.scores.gradients import Batch, model_device
from heterolora.search.scores.proxies import Proxy

__all__ = ["Samples", "agreed_scores", "derived_seed"]


def derived_seed(seed: int, step: int) -> int:
    """A seed in 0..2**32-1 of its own for every step, the same in every process and every run."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


class Samples:
    """Batches of the training set, or given ones; the same for the same seed, whatever came before.

    Args:
        batches: how many to take of the training set, or the batches themselves.
        fresh: draw other rows for every seed; otherwise the first rows are taken, in their order,
            as HeteroLoRA's code does.

    Attributes:
        count: batches of all processes together.

    Raises:
        DataError: there is no batch.
    """

    def __init__(self, batches: int | Iterable[Batch], *, fresh: bool) -> None:
        if isinstance(batches, bool) or not isinstance(batches, (int, Iterable)):
            raise DataError(f"batches must be a number or an iterable of dicts, not {batches!r}")
        self.fresh = fresh
        self._given = None if isinstance(batches, int) else list(batches)
        self.count = batches if isinstance(batches, int) else len(self._given or ())
        if fresh and self._given is not None:
            raise DataError("fresh batches are drawn from the training set: give their number")
        if self.count < 1:
            raise DataError("no batches to score with: at least one is needed")

    def take(self, dataloader: Any, batch_size: int, seed: int) -> list[Batch]:
        """This process's share: every n-th batch of n processes, beginning with its own number.

        Call it under `heterolora.search.preserve.seeded`: a collator may draw numbers.

        Args:
            dataloader: of the training set; its `dataset` and `collate_fn` are used, not its order.
            batch_size: rows a batch.

        Raises:
            DataError: the training set cannot be indexed, or there is no batch for some process.
        """
        rank, world = _place()
        rows = None if self._given is not None else self._rows(dataloader, batch_size, world, seed)
        found = len(self._given or rows or ())
        if found < world:
            raise DataError(
                f"{found} batches to score with for {world} processes; give each at least one"
            )
        if rows is None:
            return (self._given or [])[rank::world]
        dataset, collate = dataloader.dataset, dataloader.collate_fn
        return [collate([dataset[index] for index in share]) for share in rows[rank::world]]

    def _rows(self, dataloader: Any, batch_size: int, world: int, seed: int) -> list[list[int]]:
        """The indices of every batch's rows."""
        dataset: Any = getattr(dataloader, "dataset", None)
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise DataError(
                f"batches={self.count}: a {type(dataset).__name__} cannot be indexed, so no "
                "batches can be taken of it; give a list of batches"
            )
        total, count = len(dataset), max(self.count, world)
        if self.fresh:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        else:
            order = list(range(total))
        order = order[: count * batch_size]
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def agreed_scores(proxy: Proxy, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """The scores over the batches of all processes, equal in each of them.

    Gradients are summed over the processes, so that the result is that of one process with all the
    batches, up to the order of the sum. Synflow uses one batch: that of process 0.

    Raises:
        ScoreError: another process failed; it says why.
        HeteroLoraError: as the proxy.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return proxy(model, batches)
    device = model_device(model)
    asked = False

    def agree(failed: bool) -> None:
        nonlocal asked
        asked = True
        flag = torch.tensor([float(failed)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag.item() and not failed:
            raise ScoreError("another process could not score its batches; its error says why")

    def reduce(tensors: list[Tensor]) -> None:
        # Before anything is waited for that a failed process does not send.
        agree(failed=False)
        _add_up(tensors)

    try:
        scores = proxy(model, batches, reduce=reduce)
    except Exception:
        if not asked:
            agree(failed=True)
        raise
    if not asked:
        agree(failed=False)
    values = torch.tensor(numbers(scores), dtype=torch.float64, device=device)
    dist.broadcast(values, src=0)
    return renumbered(scores, values.tolist())


def _add_up(tensors: list[Tensor]) -> None:
    """Sum each tensor over the processes, in place, by one all-reduce in at least float32."""
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    flat = torch.cat([tensor.reshape(-1).to(wide) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def _place() -> tuple[int, int]:
    """(number of this process, number of processes)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
