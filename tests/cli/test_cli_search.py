"""Options of `heterolora search`, and what `heterolora train` makes of its results."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model, save_reviews

from heterolora.cli import main as cli

SEARCH = "search --model {bert} --data {data} --batches 2 --batch-size 8 --out {out}/a.json"
TRAIN = "train --model {bert} --data {data} --out {out}/run --max-steps 2 --batch-size 8"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    data = save_reviews(folder / "reviews.jsonl", 40)
    return {"bert": str(save_model(folder / "bert")), "data": str(data)}


def _filled(words: str, files: dict[str, str], out: Path) -> list[str]:
    return [word.format(out=out, **files) for word in words.split()]


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
