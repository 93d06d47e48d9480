"""A tiny BERT, its training set and a Trainer, for the tests of the dynamic search."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

import heterolora
from heterolora import Budget
from heterolora.search import adapt, uniform
from heterolora.search.space import SearchSpace
from heterolora.train.callbacks import FuseCallback

R = 4
ROWS = 40
BATCH = 4  # ten steps an epoch
HALF = Budget(rank=R // 2)
QUICK: dict[str, Any] = {"batches": 1, "every": 0.4}
# The worst checkpoint counts as the best, so that it is not the last one.
BEST_AT_END: dict[str, Any] = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 4,
    "save_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "learning_rate": 0.1,
}
MODULES = ["attention.self.value", "attention.output.dense"]


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(3, 61, (rows, 7), generator=generator)
        self.labels = torch.randint(0, 2, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def make_model(
    *, dropout: float = 0.1, rank: int = R, shortcuts: bool = False, alpha: float = 3.0
) -> Any:
    """Six LoRA modules, and with `shortcuts` eleven of rank R and an alpha of their own."""
    torch.manual_seed(7)
    config = transformers.BertConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.05,
    )
    model = transformers.BertForSequenceClassification(config)
    adapted = adapt(model, uniform(model, rank, SearchSpace(target_modules=MODULES)))
    if shortcuts:
        heterolora.add_shortcuts(adapted, rank=R, alpha=alpha)
    return adapted


def make_trainer(model: Any, out: Path, callbacks: list[Any], **options: Any) -> Trainer:
    kind = options.pop("kind", Trainer)
    settings = {
        "output_dir": str(out),
        "num_train_epochs": 2,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 3e-2,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **options,
    }
    rows = settings.pop("rows", None) or Rows()
    return kind(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        eval_dataset=Rows(8),
        callbacks=callbacks,
    )


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


class Stop(TrainerCallback):
    """Ends training after a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def run(
    out: Path, search, *, dropout=0.1, fused=True, more=(), resume=None, shortcuts=False, **options
):
    model = make_model(dropout=dropout, shortcuts=shortcuts)
    if not fused:
        heterolora.unfuse(model)
    callbacks = [search] if search is not None else []
    callbacks += [FuseCallback(backend="aten")] if fused else []
    trainer = make_trainer(model, out, [*callbacks, *more], **options)
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer
