"""The configuration and the tasks: what is read, and what is refused."""

import json

import numpy as np
import pytest
import torch
from evidence_runs import a_run, save_sick, save_tiny_model

from heterolora.bench.evidence.arms.registry import ARMS, families
from heterolora.bench.evidence.config import SHIPPED, read_config
from heterolora.bench.evidence.plan import choices, final_runs
from heterolora.bench.evidence.tasks.registry import TASKS
from heterolora.bench.harness.timing import BenchError
from heterolora.errors import DataError

GOOD = {
    "epochs": {"sick": 3, "stsb": 1.5},
    "ranks": [1, 2],
    "arms": ["uniform", "grad-norm-onoff", "grad-norm"],
    "seeds": [0, 5],
    "learning_rates": [0.001, 0.002],
    "limit": 40,
}


def write(path, **changes):
    given = {**GOOD, **changes}
    path.write_text(json.dumps({key: v for key, v in given.items() if v is not ...}))
    return path


def test_config_is_read_with_defaults(tmp_path):
    config = read_config(write(tmp_path / "c.json"))
    assert config.epochs == {"sick": 3.0, "stsb": 1.5}
    assert config.choice_seeds == (0,)
    assert (config.recipe.limit, config.recipe.batch_size, config.recipe.bf16) == (40, 32, True)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_are_read_by_name(path, tmp_path, monkeypatch):
    # Beside a folder of the same name: docs/evidence.md has the model's made as "smollm2".
    monkeypatch.chdir(tmp_path)
    (tmp_path / path.stem).mkdir()
    config = read_config(type(path)(path.stem))
    assert set(config.arms) <= set(ARMS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ...}, "no key 'seeds'"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"epochs": {"mnli": 3}}, "task 'mnli' is unknown"),
        ({"epochs": {"sick": 0}}, "epochs=0"),
        ({"arms": ["uniform", "best"]}, "arm 'best' is unknown"),
        ({"arms": []}, r"arms=\[\]"),
        ({"seeds": [1, 1]}, "each of them once"),
        ({"seeds": [-1]}, "seeds"),
        ({"ranks": [0]}, "ranks"),
        ({"learning_rates": [True]}, "learning_rates"),
        ({"limit": 3}, "limit=3"),
        ({"bf16": 1}, "bf16=1"),
        ({"warmup": 1.5}, "warmup"),
    ],
)
def test_malformed_config_is_refused_with_its_key(tmp_path, changes, message):
    path = write(tmp_path / "c.json", **changes)
    with pytest.raises(BenchError, match=message):
        read_config(path)


def test_config_that_is_no_object_or_not_there(tmp_path):
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(BenchError, match="expected an object"):
        read_config(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(BenchError, match="not JSON"):
        read_config(tmp_path / "c.json")
    with pytest.raises(BenchError, match="give a file, or one of .*main"):
        read_config(tmp_path / "other.json")


def test_plan_has_every_run_once_at_its_familys_rate(tmp_path):
    config = read_config(write(tmp_path / "c.json"))
    questions = choices(config, config.arms)
    assert families(config.arms) == {"uniform": "uniform", "on-off": "random-onoff"}
    # Two tasks, two budgets, two families, each with two rates and one seed.
    assert len(questions) == 8 and sum(len(q.runs) for q in questions) == 16
    assert {run.arm for q in questions for run in q.runs} == {"uniform", "random-onoff"}

    # The larger rate is better for the uniform family; one rate of the other family diverged.
    def result(run):
        better = run.learning_rate == 0.002
        if run.arm == "uniform":
            return {"loss": 0.5 if better else 0.6}
        return {"loss": None if better else 0.7}

    settled = {(q.task, q.rank, q.family): q.settle(result) for q in questions}
    record = settled["sick", 1, "on-off"][1]
    assert record["learning_rate"] == 0.001 and record["losses"]["0.002"] is None
    runs = final_runs(config, config.arms, {key: rate for key, (rate, _) in settled.items()})
    assert len({run.name for run in runs}) == len(runs) == 2 * 2 * 3 * 2
    rates = {(run.arm, run.learning_rate) for run in runs}
    assert rates == {("uniform", 0.002), ("grad-norm", 0.002), ("grad-norm-onoff", 0.001)}


def test_the_rate_is_chosen_by_the_mean_over_its_seeds(tmp_path):
    config = read_config(write(tmp_path / "c.json", choice_seeds=[0, 1, 2]))
    (question, *_) = choices(config, ["uniform"])
    # The first seed says otherwise, and so does the last.
    losses = {0.001: (0.5, 0.9, 0.5), 0.002: (0.6, 0.6, 0.6)}
    rate, record = question.settle(lambda run: {"loss": losses[run.learning_rate][run.seed]})
    assert rate == 0.002 and record["losses"]["0.001"] == pytest.approx(1.9 / 3)


def test_unsettled_choices_are_refused(tmp_path):
    (question, *_) = choices(read_config(write(tmp_path / "c.json")), ["uniform"])
    with pytest.raises(BenchError, match="not settled"):
        question.settle(lambda run: None)
    with pytest.raises(BenchError, match="diverged at every learning rate"):
        question.settle(lambda run: {"loss": None})


def test_one_rate_needs_no_choice(tmp_path):
    config = read_config(write(tmp_path / "c.json", learning_rates=[0.003]))
    (question, *_) = choices(config, ["uniform"])
    assert question.runs == []
    assert question.settle(lambda run: None)[0] == 0.003


def test_sick_is_read_with_its_quotes(tmp_path):
    train, test = TASKS["sick"].load(save_sick(tmp_path))
    assert len(train) == len(test) == 48
    assert train[1].text.startswith('"')
    assert [row.label for row in train[:3]] == [0, 1, 2]
    drawn, _ = TASKS["sick"].load(tmp_path, limit=20)
    assert len(drawn) == 20 and drawn == TASKS["sick"].load(tmp_path, limit=20)[0]


def test_the_other_tasks_are_read(tmp_path):
    def put(name, text, encoding="utf-8"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding=encoding)

    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    for name in ("train.tsv", "msr_paraphrase_test.txt"):
        put(f"mrpc/{name}", header + '1\t1\t2\tAn "a\tb\n0\t3\t4\tc\td\n', "utf-8-sig")
    train, test = TASKS["mrpc"].load(tmp_path)
    assert [(row.text, row.pair, row.label) for row in train] == [('An "a', "b", 1), ("c", "d", 0)]
    assert test == train

    put("sst2/train.tsv", "sentence\tlabel\n" + "".join(f"{i}\t{i % 2}\n" for i in range(9000)))
    put("sst2/dev.tsv", "sentence\tlabel\nfine \t1\n")
    train, test = TASKS["sst2"].load(tmp_path)
    assert len(train) == 8000 and len({row.text for row in train}) == 8000
    assert all(row.pair is None and row.label == int(row.text) % 2 for row in train)
    assert train == TASKS["sst2"].load(tmp_path)[0]

    put("trec/train_5500.label", "NUM:dist How far ?\nHUM:ind Who was Médard ?\n", "latin-1")
    put("trec/TREC_10.label", "LOC:city Where ?\n", "latin-1")
    train, test = TASKS["trec"].load(tmp_path)
    assert [(row.text, row.label) for row in train] == [("How far ?", 5), ("Who was Médard ?", 3)]

    for name in ("train.tsv", "dev.tsv"):
        put(f"stsb/{name}", "index\tsentence1\tsentence2\tscore\n0\ta\tb\t3.800\n")
    train, _ = TASKS["stsb"].load(tmp_path)
    assert (train[0].text, train[0].pair, train[0].label) == ("a", "b", 3.8)


def test_data_that_is_missing_or_malformed(tmp_path):
    with pytest.raises(DataError, match="no folder 'sick'"):
        TASKS["sick"].load(tmp_path)
    path = save_sick(tmp_path) / "sick" / "SICK_train.txt"
    text = path.read_text()
    path.write_text(text.replace("NEUTRAL", "PERHAPS"))
    with pytest.raises(DataError, match="'PERHAPS' is none of the classes"):
        TASKS["sick"].load(tmp_path)
    path.write_text(text + "7\tcut off\n")
    with pytest.raises(DataError, match="line 50: fewer columns"):
        TASKS["sick"].load(tmp_path)
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="no column 'sentence_A'"):
        TASKS["sick"].load(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        TASKS["sick"].load(tmp_path)


def test_measures_of_classes_are_those_of_torch():
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)) * 50
    labels = torch.arange(40) % 3
    found = TASKS["sick"].measure(logits.numpy(), labels.numpy())
    loss = torch.nn.functional.cross_entropy(logits.double(), labels).item()
    assert found["loss"] == pytest.approx(loss, rel=1e-12)
    assert found["accuracy"] == (logits.argmax(1) == labels).sum().item() / 40


def test_measures_of_scores():
    labels = np.array([0.0, 1.0, 2.0, 5.0])
    found = TASKS["stsb"].measure((2 * labels + 1)[:, None].astype(np.float32), labels)
    assert found["pearson"] == pytest.approx(1.0)
    assert found["loss"] == pytest.approx(np.mean((labels + 1) ** 2))
    diverged = TASKS["stsb"].measure(np.array([[np.inf], [1.0], [2.0], [3.0]]), labels)
    assert diverged["loss"] == np.inf and np.isnan(diverged["pearson"])
    # numpy has no correlation of a constant, and a warning.
    assert TASKS["stsb"].measure(np.ones((4, 1)), labels)["pearson"] == 0


def test_a_regression_model_has_one_output_and_the_squared_error(tmp_path):
    model, tokenizer = TASKS["stsb"].make(str(save_tiny_model(tmp_path / "m")), seed=3)
    batch = tokenizer(["good", "bad"], ["fine", "poor"], return_tensors="pt", padding=True)
    scores = torch.tensor([4.0, 1.0])
    output = model(**batch, labels=scores)
    assert output.logits.shape == (2, 1)
    expected = ((output.logits[:, 0] - scores) ** 2).mean()
    torch.testing.assert_close(output.loss, expected)
    again, _ = TASKS["stsb"].make(str(tmp_path / "m"), seed=3)
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_names_of_runs_tell_them_apart():
    names = {
        a_run("m").name,
        a_run("m", arm="random").name,
        a_run("m", seed=1).name,
        a_run("m", rank=4).name,
        a_run("m", learning_rate=2e-3).name,
        a_run("m", purpose="choice").name,
        a_run("m", task="mrpc").name,
    }
    assert len(names) == 7
