"""What a dynamic search refuses: arguments, budgets, settings, checkpoints."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from search_runs import HALF, QUICK, R, Stop, make_model, make_trainer, run

from heterolora import Budget, DynamicSearchCallback
from heterolora.errors import BudgetError, DataError, ScoreError, SearchSpaceError, TrainingError
from heterolora.search.dynamic.masks import parked_count
from heterolora.search.dynamic.masks_file import FILE_NAME


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"budget": 3}, BudgetError, "budget must be a Budget"),
        ({"proxy": "magic"}, SearchSpaceError, "unknown proxy 'magic'"),
        ({"ranks": (2, 1)}, SearchSpaceError, "not in increasing order"),
        ({"every": 0}, SearchSpaceError, "every=0: expected a fraction of an epoch"),
        ({"every": 1.5}, SearchSpaceError, "every=1.5"),
        ({"warmup_epochs": -1}, SearchSpaceError, "warmup_epochs=-1"),
        ({"warmup": "some"}, SearchSpaceError, "unknown warmup 'some'"),
        ({"seed": -1}, SearchSpaceError, "seed=-1"),
        ({"batches": 0}, DataError, "at least one is needed"),
        ({"batches": []}, DataError, "at least one is needed"),
        ({"batches": None}, DataError, "must be a number or an iterable"),
        ({"batches": [{}], "fresh": True}, DataError, "fresh batches are drawn"),
    ],
)
def test_malformed_arguments(options, kind, message):
    with pytest.raises(kind, match=message):
        DynamicSearchCallback(**{"budget": HALF, **options})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"budget": Budget(rank=R + 1)}, BudgetError, r"rank=5\) is above the largest rank"),
        (
            {"ranks": (0, 8)},
            SearchSpaceError,
            "ranks go up to 8, and the model's adapter has rank 4",
        ),
        ({"budget": Budget(params=8)}, BudgetError, "below one adapter of the smallest rank"),
        (
            {"budget": Budget(params=300), "warmup": "uniform", "warmup_epochs": 1},
            BudgetError,
            "does not pay for rank 1 on every module",
        ),
    ],
)
def test_budgets_that_do_not_fit_the_model(tmp_path, options, kind, message):
    search = DynamicSearchCallback(**{"budget": HALF, **options})
    with pytest.raises(kind, match=message):
        make_trainer(make_model(), tmp_path, [search]).train()


class _Optimizer(str):
    """Not started; only its name is looked at."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: setattr(a, "torch_compile", True), "torch.compile"),
        (lambda a, m: m.get_base_model().bert.compile(), "torch.compile"),
        (lambda a, m: setattr(a, "deepspeed", {"zero": 1}), "DeepSpeed.*use DDP"),
        (lambda a, m: setattr(next(m.parameters()), "ds_id", 0), "DeepSpeed.*use DDP"),
        (lambda a, m: setattr(a, "fsdp", "full_shard"), "FSDP"),
        (lambda a, m: setattr(a, "fp16", True), "fp16.*use bf16"),
        (lambda a, m: setattr(a, "_n_gpu", 2), "nn.DataParallel over several GPUs"),
        (lambda a, m: setattr(a, "optim", _Optimizer("lomo")), "the optimizer lomo"),
    ],
)
def test_settings_it_refuses(tmp_path, change, message):
    search = DynamicSearchCallback(HALF, **QUICK)
    model = make_model()
    trainer = make_trainer(model, tmp_path, [])
    trainer.args.n_gpu  # noqa: B018  sets it up
    change(trainer.args, model)
    with pytest.raises(TrainingError, match=f"no dynamic search under .*{message}"):
        search.on_train_begin(trainer.args, trainer.state, None, model=model)
    assert parked_count(model) == 0


def test_a_loss_that_is_not_finite(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.get_base_model().bert.embeddings.word_embeddings.weight.fill_(float("nan"))
    search = DynamicSearchCallback(HALF, **QUICK)
    with pytest.raises(ScoreError, match="the loss of batch 0 is nan"):
        make_trainer(model, tmp_path, [search]).train()
    assert parked_count(model) == 0


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    run(out, DynamicSearchCallback(HALF, **QUICK), more=[Stop(6)])
    return out / "checkpoint-6"


def test_a_checkpoint_elsewhere(stopped, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(stopped, moved)
    again = lambda **o: DynamicSearchCallback(HALF, **QUICK, **o)  # noqa: E731
    with pytest.raises(
        TrainingError, match=r"heterolora_search.safetensors: no such file.*resume_"
    ):
        run(tmp_path / "out", again(), resume=str(moved))
    run(tmp_path / "out", again(resume_from=moved), resume=str(moved))


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:100])


def _other(path, **changes):
    import json

    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(path, framework="pt") as file:
        document = json.loads(file.metadata()["heterolora"])
    document.update(changes)
    save_file(load_file(path), path, metadata={"heterolora": json.dumps(document)})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p.unlink(), "no such file"),
        (_cut_off, "not readable"),
        (lambda p: p.write_bytes(b""), "not readable"),
        (lambda p: _other(p, schema_version=2), "schema_version is 2, .* reads up to 1; upgrade"),
        (
            lambda p: _other(p, schema_version=None),
            "schema_version must be a whole number, not None",
        ),
        (lambda p: _other(p, step=5), "is of step 5, and training goes on at 6"),
        (lambda p: _other(p, step="x"), "step must be a whole number, not 'x'"),
        (lambda p: _other(p, settings=[]), "settings must be a JSON object, not a list"),
        (lambda p: _other(p, ranks={"a": -1}), r"ranks\['a'\] is -1"),
        (lambda p: _other(p, ranks={"a": 1}), "does not fit the model: 'a'"),
        (lambda p: _other(p, settings={}), "search with parameters=None, and this one has"),
    ],
)
def test_malformed_files(stopped, tmp_path, spoil, message):
    shutil.copytree(stopped, tmp_path / "checkpoint-6")
    spoil(tmp_path / "checkpoint-6" / FILE_NAME)
    with pytest.raises(TrainingError, match=message):
        run(
            tmp_path,
            DynamicSearchCallback(HALF, **QUICK),
            resume=str(tmp_path / "checkpoint-6"),
        )


def test_weights_of_another_checkpoint(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6" / "adapter_model.safetensors"
    from safetensors.torch import save_file

    save_file({k: torch.ones_like(v) for k, v in load_file(path).items()}, path)
    with pytest.raises(TrainingError, match="weights are not those of this checkpoint"):
        run(
            tmp_path,
            DynamicSearchCallback(HALF, **QUICK),
            resume=str(tmp_path / "checkpoint-6"),
        )


def test_other_settings_than_before(stopped):
    with pytest.raises(TrainingError, match="with proxy='grad-norm', and this one has 'snip'"):
        run(
            stopped.parent,
            DynamicSearchCallback(HALF, **QUICK, proxy="snip"),
            resume=str(stopped),
        )
