"""The command line: what it writes, its exit status, and one line for every user's mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model, save_reviews
from transformers import LlamaConfig, LlamaForCausalLM

from heterolora.cli import doctor
from heterolora.cli import main as cli

COMMANDS = ("demo", "search", "train", "bench", "verify", "doctor")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    bert = save_model(folder / "bert")
    llama = save_model(folder / "llama", "llama")
    layerless = save_model(folder / "layerless", "llama")
    config = LlamaConfig.from_pretrained(llama, num_hidden_layers=0)
    LlamaForCausalLM(config).save_pretrained(layerless)
    broken = save_model(folder / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["embeddings.word_embeddings.weight"].fill_(float("nan"))
    from safetensors.torch import save_file

    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    paths = {
        "bert": bert,
        "llama": llama,
        "layerless": layerless,
        "broken": broken,
        "data": save_reviews(folder / "reviews.jsonl", 40),
        "empty": folder / "empty.csv",
        "header": folder / "header.csv",
        "junk": folder / "junk.json",
        "newer": folder / "newer.json",
        "full": folder / "full",
    }
    paths["empty"].write_text("")
    paths["header"].write_text("text,label\n")
    paths["junk"].write_text("{not json")
    paths["newer"].write_text('{"schema": 99, "schema_version": 99}')
    paths["full"].mkdir()
    (paths["full"] / "file").write_text("")
    return {name: str(path) for name, path in paths.items()}


def _filled(words: str, files: dict[str, str], out: Path) -> list[str]:
    return [word.format(out=out, **files) for word in words.split()]


SEARCH = "search --model {bert} --data {data} --batches 2 --batch-size 8 --out {out}/a.json"
TRAIN = "train --model {bert} --data {data} --out {out}/run --max-steps 2 --batch-size 8"

MISTAKES = {
    "missing data file": (
        "search --model {bert} --data {out}/gone.csv",
        "no such file or folder: ",
    ),
    "empty data set": ("search --model {bert} --data {empty}", "empty.csv is empty"),
    "no rows": ("train --model {bert} --data {header}", "header.csv has no rows"),
    "unknown column": (
        SEARCH + " --text txet",
        "--text: no column 'txet' (did you mean 'text'?); columns are 'text', 'label'",
    ),
    "no network, data": (
        "search --model {bert} --data someone/reviews",
        "no file or folder is called someone/reviews, and the hub cannot be reached",
    ),
    "no network, model": (
        "train --model someone/model --data {data}",
        "no folder is called someone/model, and the hub cannot be reached",
    ),
    "missing model folder": ("train --model ./gone --data {data}", "no such model folder: ./gone"),
    "unknown attention": (
        "train --model {bert} --data {data} --attn-implementation quick",
        '"quick"',
    ),
    "model without linear layers": (
        "search --model {layerless} --data {data} --task causal-lm",
        "matches no linear layer of the model (linear layers: lm_head",
    ),
    "no module of that name": (
        SEARCH + " --target-modules nothing",
        "target_modules=('nothing',) matches no linear layer of the model",
    ),
    "budget below one rank": (
        SEARCH + " --budget-params 10",
        "a budget of 10 parameters is below one adapter of the smallest rank",
    ),
    "budget of rank 0": (SEARCH + " --budget-rank 0", "expected a positive integer"),
    "unknown proxy": (SEARCH + " --proxy magic", "unknown proxy 'magic'; choose one of"),
    "negative head steps": (SEARCH + " --head-steps -1", "head_steps=-1: expected a whole number"),
    "floor above the ranks": (SEARCH + " --floor 64", "floor=64 is above the largest rank"),
    "ranks that are no numbers": (SEARCH + " --ranks 0,two", "--ranks '0,two': numbers with"),
    "ranks out of order": (SEARCH + " --ranks 8,2", "not in increasing order"),
    "no batches": (SEARCH + " --batches 0", "0 batches of 8 rows: both must be at least 1"),
    "rows too long": (SEARCH + " --max-length 65", "--max-length is 65, but the tokenizer allows"),
    "NaN loss in the search": (
        "search --model {broken} --data {data} --out {out}/a.json",
        "loss of batch 0 is nan",
    ),
    "NaN loss in training": (
        "train --model {broken} --data {data} --out {out}/run --max-steps 2",
        "the loss is nan at step 1: try a smaller --lr",
    ),
    "missing allocation": (TRAIN + " --allocation {out}/gone.json", "gone.json: no such file"),
    "malformed allocation": (TRAIN + " --allocation {junk}", "junk.json: not valid JSON"),
    "allocation of a newer schema": (
        TRAIN + " --allocation {newer}",
        "newer.json: schema_version is 99",
    ),
    "unknown shortcut": (SEARCH + " --shortcuts around", "unknown shortcut 'around'; choose of"),
    "rank 0": (TRAIN + " --rank 0", "expected a positive integer"),
    "no epochs": (TRAIN + " --epochs 0", "--epochs is 0.0: it must be above 0"),
    "negative rate": (TRAIN + " --lr -1", "--lr is -1.0: it must be above 0"),
    "output folder not empty": (
        "train --model {bert} --data {data} --out {full}",
        "is not empty: choose another --out, or give --resume or --overwrite",
    ),
    "nothing to resume": (TRAIN + " --resume", "nothing to resume: "),
    "unwritable report": (
        SEARCH + " --report {out}/no/page.html",
        "cannot write the report to ",
    ),
    "unwritable JSON": (SEARCH + " --json {out}/no/where.json", "cannot write --json "),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_line_and_status_2(
    case: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = MISTAKES[case]
    assert cli.main(_filled(words, files, tmp_path)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("heterolora: error: ")]
    assert len(errors) == 1, captured.err
    assert captured.err.endswith(errors[0] + "\n")
    assert message in errors[0]
    assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("run/adapter"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train", "the following arguments are required: --data"),
        ("train --data x --rank 2 --allocation y", "not allowed with argument"),
        ("search --data x --budget-rank two", "invalid int value: 'two'"),
        ("search --data x --seed -1", "--seed: -1: expected a whole number in 0..2**32-1"),
        ("train --data x --seed 4294967296", "expected a whole number in 0..2**32-1"),
        ("search --data x --seed one", "--seed: one: expected a whole number"),
        ("serch --data x", "invalid choice: 'serch'"),
        ("search --data x --speed", "unrecognized arguments: --speed"),
    ],
)
def test_wrong_options_exit_with_2(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(words.split())
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_search_then_train_then_a_resume_that_has_nothing_left(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(_filled(SEARCH + " --budget-rank 2 --json -", files, tmp_path)) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["parameters"] <= found["budget_parameters"]
    assert len(found["ranks"]) == 13 and set(found["ranks"]) == set(found["scores"])
    assert "rank by layer and module" in captured.err
    assert "classification: text 'text', label 'label'; train 32" in captured.err

    words = TRAIN + " --allocation {out}/a.json --json {out}/train.json --save-steps 1"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    captured = capsys.readouterr()
    assert f"adapter: {tmp_path}/run/adapter" in captured.out
    assert "test accuracy: " in captured.out
    trained = json.loads((tmp_path / "train.json").read_text())
    assert trained["steps"] == 2 and trained["parameters"] == found["parameters"]
    chosen = {name for name, rank in found["ranks"].items() if rank}
    assert {*trained["fused"], *trained["left"]} == chosen and trained["declined"] == {}
    weights = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    ranks = [value.shape[0] for key, value in weights.items() if key.endswith("lora_A.weight")]
    assert sorted(ranks) == sorted(rank for rank in found["ranks"].values() if rank)

    assert cli.main(_filled(words + " --resume", files, tmp_path)) == 0
    again = json.loads((tmp_path / "train.json").read_text())
    assert again["metrics"]["test_loss"] == trained["metrics"]["test_loss"]


def test_shortcuts_are_searched_trained_and_resumed(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = SEARCH + " --shortcuts all --budget-rank 2 --shortcut-budget-rank 1 --json -"
    words += " --report {out}/page.html"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["shortcuts"]) == 7 and any(found["shortcuts"].values())
    page = (tmp_path / "page.html").read_text()
    assert "where the ranks went" in page and "--shortcut-budget-rank 1" in page
    assert f"{found['parameters']:,} of {found['budget_parameters']:,} parameters" in page
    assert page.count("<svg") == 2 and "http" not in page.replace("http://www.w3.org", "")
    assert found["scores"].keys() == found["ranks"].keys() | found["shortcuts"].keys()
    assert all(word in captured.err for word in ("cross-", "layer", "in-", "attn", "ffn"))

    words = TRAIN.replace("--max-steps 2", "--max-steps 4 --lr 0.05 --save-steps 2")
    words += " --allocation {out}/a.json"
    adapter = tmp_path / "run" / "adapter" / "heterolora_shortcuts.safetensors"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    assert f"{found['parameters']:,} LoRA parameters, enabled, trained and stored" in (
        capsys.readouterr().out
    )
    undisturbed = load_file(adapter)
    on = sum(map(bool, found["shortcuts"].values()))
    assert len(undisturbed) == 2 * on
    assert all(value.any() for key, value in undisturbed.items() if key.endswith(".b"))

    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    assert cli.main(_filled(words + " --resume", files, tmp_path)) == 0
    resumed = load_file(adapter)
    assert all(torch.equal(value, resumed[key]) for key, value in undisturbed.items())


def test_search_with_a_variant(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = SEARCH + " --proxy spectral --head-steps 2 --train-steps 1 --floor 1 --by-layer"
    assert cli.main(_filled(words + " --budget-rank 2 --json -", files, tmp_path)) == 0
    result = json.loads(capsys.readouterr().out)
    variant = result["variant"]
    assert (variant["head_steps"], variant["train_steps"], variant["floor"]) == (2, 1, 1)
    assert variant["by_layer"] is True
    assert min(result["ranks"].values()) == 1 < max(result["ranks"].values())


def test_search_without_a_proxy_takes_what_the_evidence_recommends(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def found(options: str) -> dict[str, Any]:
        assert cli.main(_filled(f"{SEARCH} {options} --json -", files, tmp_path)) == 0
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    result = found("--budget-rank 2")
    assert result["proxy"] == "spectral"
    assert (result["variant"]["head_steps"], result["variant"]["floor"]) == (70, 1)
    assert min(result["ranks"].values()) >= 1
    # Rank 1 everywhere is all that the budget buys, and then more than it buys.
    result = found("--budget-rank 1 --head-steps 3")
    assert (result["variant"]["head_steps"], result["variant"]["floor"]) == (3, 1)
    assert set(result["ranks"].values()) == {1}
    less = f"--budget-params {result['parameters'] - 1}"
    variant = found(less)["variant"]
    assert (variant["floor"], variant["by_layer"]) == (0, True)
    assert found(f"{less} --no-by-layer")["variant"]["by_layer"] is False
    result = found("--budget-rank 2 --proxy grad-norm")
    assert result["proxy"] == "grad-norm"
    assert (result["variant"]["head_steps"], result["variant"]["floor"]) == (0, 0)


def test_train_without_fusing_gives_the_same_result(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for name, flag in (("fused", ""), ("plain", " --no-fuse")):
        words = TRAIN.replace("{out}/run", f"{{out}}/{name}") + " --json -" + flag
        assert cli.main(_filled(words, files, tmp_path)) == 0
        result = json.loads(capsys.readouterr().out)
        assert bool(result["fused"] or result["left"]) is (name == "fused")
        losses.append(result["metrics"]["test_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_train_without_dropout_gives_what_a_model_made_without_it_gives(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for name, dropout, flag in (
        ("with", 0.3, ""),
        ("off", 0.3, " --no-dropout"),
        ("without", 0.0, ""),
    ):
        made = {**files, "bert": str(save_model(tmp_path / f"bert-{name}", dropout=dropout))}
        words = TRAIN.replace("{out}/run", f"{{out}}/{name}") + " --lr 0.05 --json -" + flag
        assert cli.main(_filled(words, made, tmp_path)) == 0
        losses.append(json.loads(capsys.readouterr().out)["metrics"]["test_loss"])
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_cuda_graphs_that_cannot_be_had_stop_nothing(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA graphs")
    words = TRAIN + " --cuda-graph --json {out}/train.json"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    captured = capsys.readouterr()
    line = "steps run without a CUDA graph: no CUDA device"
    assert captured.err.splitlines().count(line) == 1
    assert "CUDA graphs: no CUDA device" in captured.out.splitlines()
    assert json.loads((tmp_path / "train.json").read_text())["cuda_graph"] == "no CUDA device"
    words = TRAIN.replace("{out}/run", "{out}/plain") + " --json -"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    assert json.loads(capsys.readouterr().out)["cuda_graph"] is None


def test_causal_lm_from_end_to_end(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = " --task causal-lm --target-modules q_proj,v_proj --json -"
    words = SEARCH.replace("{bert}", "{llama}") + common + " --budget-rank 2 --proxy snip"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert {name.rsplit(".", 1)[1] for name in ranks} == {"q_proj", "v_proj"}
    words = TRAIN.replace("{bert}", "{llama}") + common + " --rank 4 --bf16"
    assert cli.main(_filled(words, files, tmp_path)) == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["validation_loss"] > 0 and "validation_accuracy" not in metrics


def _start(words: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "heterolora.cli", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_resume_finishes_bit_for_bit(
    files: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    words = "train --model {bert} --data {data} --batch-size 8 --max-steps 100 --save-steps 1000"
    out = tmp_path / "stopped"
    process = _start(_filled(f"{words} --out {out}", files, tmp_path))
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step "):
                process.send_signal(number)
                break
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, errors
    last = errors.splitlines()[-1]
    assert last.startswith("heterolora: stopped at step ") and " of 100 and saved " in last
    assert last.endswith("run the same command with --resume to go on")
    assert "Traceback" not in errors and not (out / "adapter").exists()
    if number == signal.SIGTERM:
        return

    assert cli.main(_filled(f"{words} --out {out} --resume", files, tmp_path)) == 0
    whole = tmp_path / "whole"
    assert cli.main(_filled(f"{words} --out {whole}", files, tmp_path)) == 0
    expected = load_file(whole / "adapter" / "adapter_model.safetensors")
    got = load_file(out / "adapter" / "adapter_model.safetensors")
    assert expected.keys() == got.keys()
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


def test_unexpected_errors_keep_their_traceback(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("heterolora.search.uniform", bug)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        cli.main(_filled(TRAIN, files, tmp_path))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  heterolora {command}" in text
    assert "--json" in text


def test_top_level_help_version_and_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == cli.heterolora.__version__


def test_examples_of_the_help_parse() -> None:
    for name, (_, module) in cli.COMMANDS.items():
        lines = import_module(module).EPILOG.splitlines()
        examples = [line.split() for line in lines if line.startswith("  heterolora ")]
        assert examples
        for words in examples:
            assert words[:2] == ["heterolora", name]
            assert cli._parser(words[1:]).parse_args(words[1:]).command == name


@pytest.mark.parametrize("command", ["demo", "search", "train"])
def test_help_loads_no_model_library(command: str) -> None:
    code = (
        "import sys; from heterolora.cli import main as cli\n"
        f"try: cli.main(['{command}', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'transformers', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_doctor_reports_and_says_what_to_mend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {check["name"]: check for check in report["checks"]}
    assert report["healthy"] is True
    assert found["torch"]["found"] == torch.__version__
    assert found["threads"]["found"].startswith(f"{torch.get_num_threads()} for torch")

    real = doctor.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            return "0.18.9"
        if name == "datasets":
            raise doctor.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert cli.main(["doctor"]) == 1
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "BROKEN peft 0.18.9, outside >=0.19" in lines
    assert 'fix: pip install "peft>=0.19"' in lines
    assert "BROKEN datasets not installed" in lines
