"""Trains with a dynamic search, alone or as one of two processes; for test_dynamic_ddp.py."""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from search_runs import make_model, make_trainer, weights
from transformers import TrainerCallback

from heterolora import Budget, DynamicSearchCallback
from heterolora.errors import ScoreError
from heterolora.search.dynamic.samples import agreed_scores
from heterolora.search.scores.proxies import PROXIES
from heterolora.train.callbacks import FuseCallback

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class StepsOfTheOptimizer(TrainerCallback):
    """Checks that AdamW counts no step for a module that is off, though DDP may send it zeros."""

    def __init__(self, search: DynamicSearchCallback) -> None:
        self.search = search
        self.checked = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before = self._steps(kwargs["optimizer"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = self._steps(kwargs["optimizer"])
        for name, rank in self.search.ranks.items():
            assert after[name] == self.before[name] + (rank > 0), name
            self.checked += rank == 0 and after[name] > 0

    def _steps(self, optimizer: Any) -> dict[str, int]:
        masks = self.search.masks
        factors = {n: m.lora_B["default"].weight for n, m in masks.layers.items()}
        factors |= {n: s.b for n, s in masks.shortcuts.items()}
        return {n: int(optimizer.state.get(f, {}).get("step", 0)) for n, f in factors.items()}


def search_run(out: Path, shortcuts: bool, *, resume: str | None = None) -> tuple[Any, Any, Any]:
    """Steps of four rows and four batches of two rows to score with, in either case."""
    search = DynamicSearchCallback(Budget(rank=2), ranks=(0, 1, 4), batches=4, every=0.4)
    steps = StepsOfTheOptimizer(search)
    trainer = make_trainer(
        make_model(dropout=0.0, shortcuts=shortcuts),
        out,
        [search, FuseCallback(backend="aten"), steps],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2 // WORLD,
        num_train_epochs=2,
        learning_rate=0.1,
        save_strategy="steps",
        save_steps=9,
        ddp_backend="gloo" if WORLD > 1 else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    assert resume or steps.checked > 0
    return search, trainer, weights(trainer.model)


def main(folder: str, *options: str) -> None:
    torch.set_num_threads(1)
    out, shortcuts = Path(folder) / str(WORLD), "shortcuts" in options
    search, trainer, final = search_run(out, shortcuts)
    history = [(r.step, r.scores, r.ranks) for r in search.rankings]
    if RANK == 0:
        (Path(folder) / f"{WORLD}.json").write_text(json.dumps(history))
    if WORLD == 1:
        return
    assert dist.get_world_size() == 2
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, (history, {n: w.tolist() for n, w in final.items()}))
    assert everywhere[0] == everywhere[1]

    # Process 0 has written what both of them read.
    written = [path.parent.name for path in sorted(out.glob("*/heterolora_shortcuts.json"))]
    assert written == ["checkpoint-18", "checkpoint-20", "checkpoint-9"] * shortcuts
    assert sum("low_rank_shortcuts" in name for name in final) == 22 * shortcuts
    again, _, resumed = search_run(out, shortcuts, resume=str(out / "checkpoint-9"))
    assert again.rankings == [r for r in search.rankings if r.step >= 9] and again.rankings
    assert all(torch.equal(final[name], resumed[name]) for name in final)

    def failing(model: Any, batches: Any, *, reduce: Any = None) -> dict[str, float]:
        if RANK == 1:
            raise ZeroDivisionError
        return PROXIES["grad-norm"](model, batches, reduce=reduce)

    try:
        search.masks.lift()
        batches = [{k: v for k, v in trainer.data_collator([trainer.train_dataset[0]]).items()}]
        agreed_scores(failing, trainer.model, batches)
        raise AssertionError("a process failed, and nobody was told")
    except ScoreError as error:
        assert RANK == 0 and "another process could not score" in str(error)
    except ZeroDivisionError:
        assert RANK == 1
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # As in ddp_worker.py: DDP's destructor may wait for ever.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
