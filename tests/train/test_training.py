"""Training: resume is exact, garbage is never saved, signals are answered, models come back."""

import logging
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model, save_reviews
from transformers import TrainerCallback, TrainingArguments

import heterolora
from heterolora.data.models import load_model
from heterolora.data.text import TokenizedData, load_text_data, tokenize
from heterolora.errors import FuseError, TrainingError
from heterolora.search import adapt, uniform
from heterolora.train.callbacks import FuseCallback
from heterolora.train.checkpoints import newest_checkpoint
from heterolora.train.run import TrainingInterrupted, train

ROWS = 64
BATCH = 8
STEPS_AN_EPOCH = 7  # 52 train rows are left after the cuts


class _At(TrainerCallback):
    """Calls an action at the beginning of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.action(kwargs["model"])


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("training")
    return {
        "still": save_model(folder / "still"),
        "dropout": save_model(folder / "dropout", dropout=0.2),
        "llama": save_model(folder / "llama", "llama"),
        "data": save_reviews(folder / "reviews.jsonl", ROWS),
        "many": save_reviews(folder / "many.jsonl", 200),
    }


def _ready(files: dict[str, Path], name: str = "still", rank: int = 4) -> tuple[Any, TokenizedData]:
    task: Any = "causal-lm" if name == "llama" else "classification"
    data = load_text_data(files["data"], task=task, text="text")
    model, tokenizer = load_model(files[name], task=task, num_labels=len(data.label_names) or None)
    torch.manual_seed(0)
    return adapt(model, uniform(model, rank)), tokenize(data, tokenizer, max_length=32)


def _run(files: dict[str, Path], out: Path, name: str = "still", **options: Any) -> Any:
    model, data = _ready(files, name)
    options = {"epochs": 2.0, "batch_size": BATCH, "learning_rate": 5e-3, **options}
    return train(model, data, output_dir=out, **options)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def _interrupt(model: Any) -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["still", "dropout"])
@pytest.mark.parametrize("stop", [3, STEPS_AN_EPOCH, STEPS_AN_EPOCH + 2])
def test_resume_gives_the_weights_of_an_uninterrupted_run(
    files: dict[str, Path], tmp_path: Path, name: str, stop: int
) -> None:
    whole = _run(files, tmp_path / "whole", name)
    assert whole.steps == 2 * STEPS_AN_EPOCH
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=f"stopped at step {stop} of 14") as stopped:
        _run(files, tmp_path / "parts", name, callbacks=[_At(stop, _interrupt)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert stopped.value.checkpoint == tmp_path / "parts" / f"checkpoint-{stop}"
    assert not (tmp_path / "parts" / "adapter").exists()
    resumed = _run(files, tmp_path / "parts", name, resume=True)
    assert resumed.steps == whole.steps
    expected, got = _weights(whole.adapter), _weights(resumed.adapter)
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        assert torch.equal(value, got[key]), key
    assert resumed.metrics["test_loss"] == whole.metrics["test_loss"]


def test_training_learns_and_reports(files: dict[str, Path], tmp_path: Path) -> None:
    many = {**files, "data": files["many"]}
    result = _run(many, tmp_path / "run", epochs=4.0)
    assert result.steps == 4 * 21  # 162 train rows are left after the cuts
    assert result.metrics["test_accuracy"] == 1.0
    assert result.metrics["validation_accuracy"] == 1.0
    first = next(entry["eval_loss"] for entry in result.log_history if "eval_loss" in entry)
    assert result.metrics["validation_loss"] < 0.5 * first
    assert len({**result.report.fused, **result.report.left}) == 13 and not result.report.declined
    assert any(len(group) == 3 for group in result.report.groups)
    assert 0 < result.seconds_per_step * (result.steps - 1) < result.seconds
    assert result.tokens_per_second > 0
    expected = {"checkpoint-63", "checkpoint-84", "adapter"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == expected


def test_fused_and_unfused_runs_agree(files: dict[str, Path], tmp_path: Path) -> None:
    logs = {}
    for fused in (True, False):
        watch = _Losses()
        options = {"max_steps": 20, "logging_steps": 1, "callbacks": [watch], "fused": fused}
        result = _run(files, tmp_path / str(fused), **options)
        assert (result.report is not None) is fused
        logs[fused] = torch.tensor(watch.losses)
    assert logs[True].shape == (20,)
    torch.testing.assert_close(logs[True], logs[False], rtol=1e-5, atol=1e-5)


def test_causal_lm_with_checkpointing_and_bf16(files: dict[str, Path], tmp_path: Path) -> None:
    result = _run(
        files, tmp_path / "run", "llama", gradient_checkpointing=True, bf16=True, max_steps=6
    )
    assert "test_accuracy" not in result.metrics
    assert 0 < result.metrics["test_loss"] < 4
    assert len({**result.report.fused, **result.report.left}) == 14


def test_nan_loss_stops_before_the_checkpoint(files: dict[str, Path], tmp_path: Path) -> None:
    model, data = _ready(files)

    def spoil(inner: Any) -> None:
        with torch.no_grad():
            inner.get_input_embeddings().weight.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"the loss is nan at step 9: try a smaller --lr"):
        train(
            model,
            data,
            output_dir=tmp_path / "run",
            epochs=2,
            batch_size=BATCH,
            save_steps=3,
            callbacks=[_At(9, spoil)],
        )
    kept = newest_checkpoint(tmp_path / "run")
    assert kept is not None and kept.name == "checkpoint-6"
    assert all(value.isfinite().all() for value in _weights(kept).values())
    assert not model._forward_hooks


def test_weights_spoiled_by_the_last_step_are_not_saved(
    files: dict[str, Path], tmp_path: Path
) -> None:
    class Spoil(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weights = [p for p in kwargs["model"].parameters() if p.requires_grad]
            with torch.no_grad():
                weights[0].fill_(float("inf"))

    with pytest.raises(TrainingError, match=r"lora_A.* is no longer finite at step 1"):
        _run(files, tmp_path / "run", max_steps=1, callbacks=[Spoil()])
    assert list((tmp_path / "run").iterdir()) == []


def test_second_interrupt_stops_at_once(files: dict[str, Path], tmp_path: Path) -> None:
    def twice(model: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        _run(files, tmp_path / "run", callbacks=[_At(3, twice)])
    assert not isinstance(stopped.value, TrainingInterrupted)
    assert newest_checkpoint(tmp_path / "run") is None


def test_callback_fuses_with_an_example_and_leaves_random_state_alone(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, data = _ready(files, "dropout")
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    heterolora.unfuse(model)
    model.train()
    loader = torch.utils.data.DataLoader(
        data.splits["train"], batch_size=4, shuffle=True, collate_fn=data.collator
    )
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    callback = FuseCallback(backend="aten")
    with caplog.at_level(logging.INFO, "heterolora"):
        callback.on_train_begin(args, None, None, model=model, train_dataloader=loader)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()
    assert any(len(group) == 3 for group in callback.report.groups)
    assert "13 LoRA layers fused" in caplog.text
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query
    assert "forward" in vars(query)
    callback.on_train_end(args, None, None, model=model)
    assert "forward" not in vars(query)


def test_callback_leaves_data_parallel_alone(
    files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = _ready(files)
    heterolora.unfuse(model)
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2
    callback = FuseCallback()
    with caplog.at_level(logging.WARNING, "heterolora"):
        callback.on_train_begin(args, None, None, model=model)
    assert callback.report is None
    assert "not fused, nn.DataParallel over several GPUs: start with torchrun" in caplog.text
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(FuseError, match="strict=True, but nothing can be fused under nn.DataPar"):
        FuseCallback(strict=True).on_train_begin(args, None, None, model=model)


def test_model_comes_back_unfused_after_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    model, data = _ready(files)

    def fail(inner: Any) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train(model, data, output_dir=tmp_path, batch_size=BATCH, callbacks=[_At(2, fail)])
    assert not any("forward" in vars(module) for module in model.modules())
    assert not model._forward_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "--epochs is 0: it must be above 0"),
        ({"epochs": float("inf")}, "--epochs is inf: it must be above 0"),
        ({"learning_rate": -1.0}, "--lr is -1.0: it must be above 0"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"max_steps": 0}, "--max-steps is 0"),
        ({"save_steps": -5}, "--save-steps is -5"),
        ({"resume": True}, "nothing to resume: .* has no complete checkpoint"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    ],
)
def test_unusable_settings(
    files: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        _run(files, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_unusable_models_and_folders(files: dict[str, Path], tmp_path: Path) -> None:
    model, data = _ready(files)
    with pytest.raises(TrainingError, match="a PeftModel is needed, not BertForSequence"):
        train(model.base_model.model, data, output_dir=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="file is a file: --out must be a folder"):
        train(model, data, output_dir=tmp_path / "file")
    with pytest.raises(TrainingError, match="is not empty: choose another --out, or give --resume"):
        train(model, data, output_dir=tmp_path)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter of the model is trainable"):
        train(model, data, output_dir=tmp_path / "new")


def test_overwrite_deletes_only_what_training_wrote(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-999").mkdir()
    _run(files, tmp_path, max_steps=2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter",
        "checkpoint-2",
        "notes.txt",
    ]


def test_resume_takes_complete_checkpoints_of_the_same_adapter(
    files: dict[str, Path], tmp_path: Path
) -> None:
    _run(files, tmp_path, max_steps=2)
    cut_off = tmp_path / "checkpoint-5"
    shutil.copytree(tmp_path / "checkpoint-2", cut_off)
    (cut_off / "trainer_state.json").unlink()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    model, data = _ready(files, rank=2)
    with pytest.raises(TrainingError, match="it was trained with another r; give the allocation"):
        train(model, data, output_dir=tmp_path, resume=True)
