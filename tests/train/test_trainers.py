"""Trainers: graphed runs are eager runs bit for bit, and say why where they cannot be."""

import dataclasses
import itertools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import CpuRecorder
from tiny import save_model, save_reviews
from transformers import Trainer, TrainerCallback, TrainingArguments

import heterolora
from heterolora.data.models import load_model
from heterolora.data.text import TokenizedData, load_text_data, tokenize
from heterolora.errors import TrainingError
from heterolora.search import adapt, uniform
from heterolora.train.callbacks import FuseCallback, LossCheck, StepTimer
from heterolora.train.cuda_graphs import WARM_UP
from heterolora.train.run import train
from heterolora.train.trainers import (
    GraphedTrainer,
    WatchedGraphedTrainer,
    WatchedTrainer,
    constant_length,
    graph_reason,
)

BATCH = 8
STEPS = 14
TAIL = 2  # of 14 steps: 52 train rows are left after the cuts, so every seventh batch is short


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trainers")
    return {
        "bert": save_model(folder / "bert", dropout=0.2),
        "llama": save_model(folder / "llama", "llama"),
        "data": save_reviews(folder / "reviews.jsonl", 64),
    }


def _ready(files: dict[str, Path], name: str) -> tuple[Any, TokenizedData]:
    task: Any = "causal-lm" if name == "llama" else "classification"
    data = load_text_data(files["data"], task=task, text="text")
    model, tokenizer = load_model(files[name], task=task, num_labels=len(data.label_names) or None)
    torch.manual_seed(0)
    model = adapt(model, uniform(model, 4))
    heterolora.unfuse(model)
    return model, tokenize(data, tokenizer, max_length=32)


def _trainer(
    files: dict[str, Path],
    out: Path,
    kind: Any,
    name: str = "bert",
    *,
    data: TokenizedData | None = None,
    callbacks: tuple[Any, ...] = (),
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    model, found = _ready(files, name)
    data = data or found
    args = TrainingArguments(
        str(out),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **{"max_steps": STEPS, "learning_rate": 5e-3, **options},
    )
    return kind(
        model=model,
        args=args,
        data_collator=constant_length(data),
        train_dataset=data.splits["train"],
        callbacks=[FuseCallback(backend="aten"), *callbacks],
        **(extra or {}),
    )


def _outcome(trainer: Any) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """What each step logged, and the trained weights."""
    keys = ("loss", "grad_norm", "learning_rate")
    logs = [{k: e[k] for k in keys} for e in trainer.state.log_history if "loss" in e]
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return logs, weights


def _assert_same(one: Any, other: Any) -> None:
    (logs, weights), (others, values) = _outcome(one), _outcome(other)
    assert logs == others and len(logs) == one.state.global_step
    assert one.state.total_flos == other.state.total_flos
    assert weights.keys() == values.keys()
    for key, value in weights.items():
        assert torch.equal(value, values[key]), key


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "max_steps": 8}, {"bf16": True}],
    ids=["plain", "accumulating", "bf16"],
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_graphed_run_is_the_eager_run(
    files: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    eager = _trainer(files, tmp_path, Trainer, name, **options)
    eager.train()
    random = torch.get_rng_state()
    recorder = CpuRecorder()
    graphed = _trainer(
        files, tmp_path, GraphedTrainer, name, extra={"recorder": recorder}, **options
    )
    graphed.train()
    assert torch.equal(torch.get_rng_state(), random)
    _assert_same(eager, graphed)
    assert recorder.recordings >= 1
    assert " captured, " in graphed.graph_summary and ";" not in graphed.graph_summary
    if not options:
        replayed = STEPS - TAIL - WARM_UP
        expected = f"1 shape captured, {replayed} of {STEPS} steps replayed"
        assert graphed.graph_summary == expected
        assert recorder.warm_ups == WARM_UP + TAIL


def test_varying_lengths_run_eagerly_beyond_the_limit(
    files: dict[str, Path], tmp_path: Path
) -> None:
    runs = []
    for kind, extra in ((Trainer, {}), (GraphedTrainer, {"recorder": CpuRecorder()})):
        trainer = _trainer(files, tmp_path, kind, extra=extra, max_steps=40)
        widths = itertools.cycle(range(16, 21))
        collator = trainer.data_collator
        trainer.data_collator = lambda rows, collator=collator, widths=widths: dataclasses.replace(
            collator, max_length=next(widths)
        )(rows)
        trainer.train()
        runs.append(trainer)
    _assert_same(*runs)
    assert runs[1].graph_summary.endswith("; shapes vary, and no more than 4 are captured")
    assert runs[1].graph_summary.startswith("4 shapes captured, ")


def test_losses_of_replays_are_checked_and_tokens_counted(
    files: dict[str, Path], tmp_path: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == 6:
                with torch.no_grad():
                    kwargs["model"].get_input_embeddings().weight.fill_(float("nan"))

    seen: list[tuple[int, float]] = []
    check, timer = LossCheck(), StepTimer(skipped=WARM_UP + 1)

    def watch(inputs: Any, loss: torch.Tensor) -> None:
        seen.append((int(inputs["attention_mask"].sum()), float(loss)))

    trainer = _trainer(
        files,
        tmp_path,
        WatchedGraphedTrainer,
        callbacks=(Spoil(), check, timer),
        extra={
            "recorder": CpuRecorder(),
            "watchers": [check.observe, timer.observe, watch],
        },
    )
    with pytest.raises(TrainingError, match="the loss is nan at step 6"):
        trainer.train()
    assert trainer.graph_summary == "1 shape captured, 3 of 6 steps replayed"
    assert [loss for _, loss in seen[:5]] == [e["loss"] for e in trainer.state.log_history[:5]]
    assert int(timer._tokens) == seen[4][0] + seen[5][0]


def test_forward_hooks_do_not_run_in_replays(files: dict[str, Path], tmp_path: Path) -> None:
    trainer = _trainer(files, tmp_path, GraphedTrainer, extra={"recorder": CpuRecorder()})
    modes = []
    trainer.model.register_forward_hook(lambda module, *args: modes.append(module.training))
    trainer.train()
    # With the capture; not in training mode is the example that `fuse` runs.
    assert modes.count(True) == WARM_UP + TAIL + 1 < STEPS


def test_a_change_of_what_trains_is_captured_anew(files: dict[str, Path], tmp_path: Path) -> None:
    class Freeze(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                name = "base_model.model.bert.encoder.layer.0.output.dense.lora_A.default.weight"
                dict(kwargs["model"].named_parameters())[name].requires_grad_(False)

    recorder = CpuRecorder()
    eager = _trainer(files, tmp_path, Trainer, callbacks=(Freeze(),))
    eager.train()
    extra = {"recorder": recorder}
    graphed = _trainer(files, tmp_path, GraphedTrainer, callbacks=(Freeze(),), extra=extra)
    graphed.train()
    _assert_same(eager, graphed)
    assert recorder.recordings == 2
    assert not all(parameter.requires_grad for parameter in graphed._trained)
    graphed.reset_graphs()
    assert all(parameter.requires_grad for parameter in graphed._trained)


def test_a_subclass_with_its_own_loss(files: dict[str, Path], tmp_path: Path) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)

    class OwnGraphed(Own, GraphedTrainer):
        pass

    eager = _trainer(files, tmp_path, Own)
    eager.train()
    graphed = _trainer(files, tmp_path, OwnGraphed, extra={"recorder": CpuRecorder()})
    graphed.train()
    _assert_same(eager, graphed)
    assert graphed.graph_summary.startswith("1 shape captured, ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gradient_checkpointing": True}, "activation checkpointing reads the random state"),
        ({"torch_empty_cache_steps": 4}, "torch_empty_cache_steps frees memory between steps"),
        ({"torch_compile": True}, 'torch.compile has graphs of its own: torch_compile_mode="red'),
        ({"optim": "lomo"}, "the optimizer lomo works during the backward pass"),
        ({"optim": "galore_adamw_layerwise"}, "the optimizer galore_adamw_layerwise works"),
    ],
)
def test_settings_that_exclude_graphs(
    files: dict[str, Path], tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    # Not trained with: some of these need packages or a compiler.
    trainer = _trainer(files, tmp_path, GraphedTrainer, extra={"recorder": CpuRecorder()})
    for name, value in options.items():
        setattr(trainer.args, name, value)
    trainer._begin(trainer.model)
    assert trainer.graph_summary.startswith(reason)
    assert graph_reason(trainer.args) == "no CUDA device"


def test_devices_and_parallel_modes_that_exclude_graphs(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = _trainer(files, tmp_path, GraphedTrainer, max_steps=3)
    assert trainer.graph_summary == "no step yet"
    with caplog.at_level(logging.WARNING, "heterolora"):
        trainer.train()
    lines = [r.getMessage() for r in caplog.records if "CUDA graph" in r.getMessage()]
    assert lines == ["steps run without a CUDA graph: no CUDA device"]
    assert trainer.graph_summary == "no CUDA device"

    other = _trainer(files, tmp_path, GraphedTrainer, extra={"recorder": CpuRecorder()})
    other.args._n_gpu = 2
    other._begin(other.model)
    assert other.graph_summary == "several GPUs or processes: a graph holds no communication"

    spread = _trainer(files, tmp_path, GraphedTrainer, extra={"recorder": CpuRecorder()})
    spread.model.classifier = torch.nn.Linear(2, 2, device="meta")
    spread._begin(spread.model)
    assert spread.graph_summary == "weights are on meta as well as cpu"

    enabled = _trainer(files, tmp_path, GraphedTrainer, extra={"recorder": CpuRecorder()})
    enabled.model.base_model.model.bert.encoder.layer[0].gradient_checkpointing = True
    enabled._begin(enabled.model)
    assert enabled.graph_summary.startswith("activation checkpointing")


def test_a_watched_trainer_is_a_trainer(files: dict[str, Path], tmp_path: Path) -> None:
    losses: list[float] = []
    watched = _trainer(
        files,
        tmp_path,
        WatchedTrainer,
        extra={"watchers": [lambda inputs, loss: losses.append(float(loss))]},
        max_steps=4,
    )
    watched.train()
    plain = _trainer(files, tmp_path, Trainer, max_steps=4)
    plain.train()
    _assert_same(plain, watched)
    assert losses == [entry["loss"] for entry in _outcome(plain)[0]]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_every_batch_has_one_length(files: dict[str, Path], name: str) -> None:
    _, data = _ready(files, name)
    rows = [row for split in data.splits.values() for row in split]
    longest = max(len(row["input_ids"]) for row in rows)
    collate = constant_length(data)
    shapes = {tuple(collate(rows[i : i + 2])["input_ids"].shape) for i in range(0, len(rows), 2)}
    assert len(shapes) == 1 and longest <= (length := shapes.pop()[1]) < longest + 8
    assert length % 8 == 0
    batch, plain = collate(rows[:4]), data.collator(rows[:4])
    width = plain["input_ids"].shape[1]
    for key, value in batch.items():
        assert torch.equal(value[:, :width] if value.dim() == 2 else value, plain[key])
    if name == "llama":
        assert (batch["labels"][:, width:] == -100).all()
    # Not beyond what the model has positions for; and a collator of another kind stays.
    data.tokenizer.model_max_length = longest
    assert constant_length(data)(rows[:2])["input_ids"].shape[1] == longest
    own = dataclasses.replace(data, collator=lambda rows: {})
    assert constant_length(own) is own.collator


def test_train_says_what_became_of_the_graphs(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = {}
    for asked in (False, True):
        model, data = _ready(files, "bert")
        options: dict[str, Any] = {"max_steps": 5, "batch_size": BATCH}
        with caplog.at_level(logging.WARNING, "heterolora"):
            results[asked] = train(
                model, data, output_dir=tmp_path / str(asked), cuda_graph=asked, **options
            )
    assert results[False].cuda_graph is None
    assert results[True].cuda_graph == "no CUDA device"
    assert caplog.text.count("steps run without a CUDA graph: no CUDA device") == 1
    # Without graphs nothing is padded for them.
    losses = [[e["loss"] for e in r.log_history if "loss" in e] for r in results.values()]
    assert losses[0] == losses[1]
