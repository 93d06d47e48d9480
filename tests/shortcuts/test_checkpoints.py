"""Shortcuts in Trainer's checkpoints: resumed runs, the best checkpoint, and what is refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from search_runs import BEST_AT_END, Rows, Stop, make_model, make_trainer, run, weights
from transformers import TrainerCallback

import heterolora
from heterolora import ShortcutCallback, load_adapter
from heterolora.errors import AdapterFileError, TrainingError

FILES = ("heterolora_shortcuts.json", "heterolora_shortcuts.safetensors")
BATCH = {key: torch.stack([Rows()[i][key] for i in range(8)]) for key in ("input_ids", "labels")}


def trained(out, *, resume=None, callback=True, **options):
    more = [ShortcutCallback()] if callback else []
    options = {"shortcuts": True, "num_train_epochs": 1, **options}
    return run(out, None, more=[*more, *options.pop("more", ())], resume=resume, **options)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A checkpoint in the middle of an epoch."""
    out = tmp_path_factory.mktemp("stopped")
    trained(out, more=[Stop(6)])
    return out / "checkpoint-6"


@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, fused):
    expected, first = trained(tmp_path / "whole", fused=fused)
    trained(tmp_path / "parts", fused=fused, more=[Stop(6)])
    folder = str(tmp_path / "parts" / "checkpoint-6")
    found, second = trained(tmp_path / "parts", fused=fused, resume=folder)
    found, expected = weights(found), weights(expected)
    factors = [name for name in expected if "low_rank_shortcuts" in name]
    assert len(factors) == 22 and all(expected[name].any() for name in factors)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states = [trainer.optimizer.state_dict()["state"] for trainer in (first, second)]
    for index, state in states[0].items():
        assert all(torch.equal(value, states[1][index][key]) for key, value in state.items())


def test_without_it_they_would_be_lost(tmp_path):
    """Why it is there; should Trainer ever keep them by itself, it can go."""
    fresh = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 6:
                fresh.extend(not s.b.any() for s in kwargs["model"].low_rank_shortcuts)

    for callback in (False, True):
        trained(tmp_path, callback=callback, more=[Stop(6)])
        folder = str(tmp_path / "checkpoint-6")
        fresh.clear()
        trained(tmp_path, callback=callback, resume=folder, more=[Watch(), Stop(7)])
        assert fresh == [not callback] * 11


def test_a_checkpoint_loads_to_the_same_logits(tmp_path):
    model, _ = trained(tmp_path, more=[Stop(6)])
    base = make_model()
    heterolora.unfuse(base)
    loaded = load_adapter(base.unload(), tmp_path / "checkpoint-6").eval()
    heterolora.unfuse(loaded)
    assert torch.equal(loaded(**BATCH).logits, model.eval()(**BATCH).logits)


def test_the_best_checkpoint(tmp_path):
    seen = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(kwargs["model"])

    model, trainer = trained(
        tmp_path,
        more=[Watch()],
        **BEST_AT_END,
        num_train_epochs=2,
    )
    best, final = trainer.state.best_global_step, weights(model)
    assert best < max(seen)
    assert all(torch.equal(final[name], value) for name, value in seen[best].items())
    key = "low_rank_shortcuts.branches.0.b"
    assert not torch.equal(seen[max(seen)][key], final[key])


def test_models_without_shortcuts_are_left_alone(tmp_path):
    trained(tmp_path, shortcuts=False, more=[Stop(6)])
    assert not [name for name in FILES if (tmp_path / "checkpoint-6" / name).exists()]
    trained(tmp_path, shortcuts=False, resume=str(tmp_path / "checkpoint-6"))


def test_a_checkpoint_elsewhere(stopped, tmp_path):
    moved = shutil.copytree(stopped, tmp_path / "moved")
    resume = {"resume": str(moved), "callback": False}
    with pytest.raises(TrainingError, match=r"out/checkpoint-6: no such folder.*resume_from="):
        trained(tmp_path / "out", more=[ShortcutCallback()], **resume)
    model, _ = trained(tmp_path / "out", more=[ShortcutCallback(resume_from=moved)], **resume)
    assert all(shortcut.b.any() for shortcut in model.low_rank_shortcuts)


def _edit(folder, **changes):
    document = json.loads((folder / FILES[0]).read_text())
    document["shortcuts"][0].update(changes)
    (folder / FILES[0]).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("spoil", "kind", "message"),
    [
        (
            lambda f: [(f / name).unlink() for name in FILES],
            TrainingError,
            "checkpoint-6 has no shortcuts, and the model has",
        ),
        (lambda f: (f / FILES[1]).unlink(), AdapterFileError, f"{FILES[1]}: missing"),
        (lambda f: (f / FILES[1]).write_bytes(b""), AdapterFileError, "not readable as safetensor"),
        (lambda f: _edit(f, alpha=4.0), AdapterFileError, r"checkpoint-6: .*alpha \(4, 4.0\)"),
    ],
)
def test_checkpoints_that_do_not_fit(stopped, tmp_path, spoil, kind, message):
    folder = shutil.copytree(stopped, tmp_path / "checkpoint-6")
    spoil(folder)
    with pytest.raises(kind, match=message):
        trained(tmp_path, resume=str(folder))


def test_a_model_that_lost_its_shortcuts(stopped, tmp_path):
    folder = shutil.copytree(stopped, tmp_path / "checkpoint-6")
    # Else the optimizer's state is refused first.
    (folder / "optimizer.pt").unlink()
    with pytest.raises(TrainingError, match="has shortcuts, and the model has none: call het"):
        trained(tmp_path, shortcuts=False, resume=str(folder))


def test_what_it_refuses_to_save(tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            next(iter(kwargs["model"].low_rank_shortcuts)).b.data[0, 0] = float("nan")

    with pytest.raises(AdapterFileError, match="holds NaN"):
        trained(tmp_path, more=[Spoil(), Stop(2)])
    assert not [name for name in FILES if (tmp_path / "checkpoint-2" / name).exists()]
    callback, model = ShortcutCallback(), make_model(shortcuts=True)
    args = make_trainer(model, tmp_path, []).args
    args.output_dir = str(tmp_path / "nowhere")
    with pytest.raises(TrainingError, match="cannot write shortcuts to .*nowhere/checkpoint-3"):
        callback.on_save(args, SimpleNamespace(global_step=3), None, model=model)
    next(model.parameters()).ds_id = 0
    with pytest.raises(TrainingError, match="spread their weights over processes: use DDP"):
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)


def test_only_the_process_that_saves_writes(tmp_path):
    model = make_model(shortcuts=True)
    folder = Path(tmp_path / "checkpoint-3")
    folder.mkdir()
    for should_save in (False, True):
        args = SimpleNamespace(should_save=should_save, output_dir=str(tmp_path))
        ShortcutCallback().on_save(args, SimpleNamespace(global_step=3), None, model=model)
        assert (folder / FILES[0]).exists() == (folder / FILES[1]).exists() == should_save
