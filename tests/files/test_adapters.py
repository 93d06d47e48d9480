"""What is saved loads in stock PEFT, and what is loaded equals stock PEFT."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CountOps, batch_for, build
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from heterolora.errors import AdapterFileError, ModelError
from heterolora.files.adapters import load_adapter, save_adapter
from heterolora.fusion.fuse import fuse, unfuse

RANKS = {r"^bert\.encoder\.layer\.0\.attention\.self\.query": 2, "value": 3}
CONFIG = LoraConfig(
    task_type="SEQ_CLS",
    r=4,
    lora_alpha=8,
    target_modules=["query", "key", "value", "intermediate.dense"],
    rank_pattern=RANKS,
    alpha_pattern={name: 2 * rank for name, rank in RANKS.items()},
    init_lora_weights=False,
)
IDS = torch.arange(3, 21).reshape(2, 9)


def bert() -> torch.nn.Module:
    return build("bert").eval()


def gpt2() -> torch.nn.Module:
    return build("gpt2").eval()


def adapted(config: LoraConfig = CONFIG, base: torch.nn.Module | None = None) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(base if base is not None else bert(), copy.deepcopy(config)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("io") / "adapter"
    save_adapter(adapted(), folder)
    return folder


CASES = {
    "mixed ranks, classifier saved": (bert, CONFIG),
    "conv1d": (
        gpt2,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=3,
            target_modules=["c_attn", "c_fc"],
            fan_in_fan_out=True,
            init_lora_weights=False,
        ),
    ),
    "dora": (
        bert,
        LoraConfig(r=3, use_dora=True, target_modules=["query"], init_lora_weights=False),
    ),
    "biases": (
        bert,
        LoraConfig(r=3, bias="all", target_modules="all-linear", init_lora_weights=False),
    ),
    "targeted embedding": (
        bert,
        LoraConfig(r=3, target_modules=["word_embeddings", "query"], init_lora_weights=False),
    ),
    "no task, regular expression": (
        bert,
        LoraConfig(
            r=3,
            use_rslora=True,
            target_modules=r".*layer\.\d+\.attention\..*(query|key)",
            init_lora_weights=False,
        ),
    ),
}


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*")
@pytest.mark.parametrize("name", CASES)
def test_round_trip_equals_stock_peft(name: str, tmp_path: Path) -> None:
    base, config = CASES[name]
    model = adapted(config, base())
    before = logits(model)
    fuse(model)
    save_adapter(model, tmp_path)

    stock = PeftModel.from_pretrained(base(), str(tmp_path))
    loaded = load_adapter(base(), tmp_path)
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-6)
    unfuse(loaded)
    assert torch.equal(logits(loaded), logits(stock))
    assert torch.equal(logits(stock), before)
    assert not torch.equal(before, logits(base()))
    state = stock.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_loaded_model_is_fused(good: Path) -> None:
    loaded = load_adapter(bert(), good)
    batch = batch_for(loaded.get_base_model())
    layers = {n: m for n, m in loaded.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert layers and all("forward" in layer.__dict__ for layer in layers.values())
    # By name, because so small a model is left to PEFT.
    assert fuse(loaded, backend="aten").fused.keys() == layers.keys()
    with CountOps() as count:
        loaded(**batch)
    assert count.forward > 0
    unfuse(loaded)
    with CountOps() as count:
        loaded(**batch)
    assert count.forward == 0


@pytest.mark.slow
def test_loads_in_stock_peft_without_heterolora(tmp_path: Path) -> None:
    base = bert()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base=base)
    torch.save(logits(model), tmp_path / "unfused.pt")
    fuse(model)
    logits(model)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    code = """
import sys, torch
sys.modules["heterolora"] = None
torch.set_num_threads(1)
from pathlib import Path
from peft import PeftModel
from transformers import BertForSequenceClassification
root = Path(sys.argv[1])
for name in ("ours", "theirs"):
    base = BertForSequenceClassification.from_pretrained(root / "base")
    model = PeftModel.from_pretrained(base, root / name).eval()
    with torch.no_grad():
        out = model(input_ids=torch.arange(3, 21).reshape(2, 9)).logits
    assert torch.equal(out, torch.load(root / "unfused.pt")), name
    assert not any(module and key.startswith("heterolora") for key, module in sys.modules.items())
print("equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("equal\n")


def test_trainable_and_named(good: Path) -> None:
    frozen = load_adapter(bert(), good)
    assert not frozen.training
    assert not any(p.requires_grad for n, p in frozen.named_parameters() if "lora_" in n)
    model = load_adapter(bert(), good, adapter_name="mine", is_trainable=True)
    assert model.active_adapters == ["mine"]
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_resized_embeddings_are_accepted(tmp_path: Path) -> None:
    bigger = bert()
    bigger.resize_token_embeddings(101)
    model = adapted(base=copy.deepcopy(bigger))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any(
        "word_embeddings" in key for key in load_file(tmp_path / "adapter_model.safetensors")
    )
    loaded = load_adapter(bigger, tmp_path)
    unfuse(loaded)
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(AdapterFileError, match=r"word_embeddings\.weight has shape \[101, 48\]"):
        load_adapter(bert(), tmp_path)


def test_hub_cache_layout_is_accepted(good: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        shutil.copy(good / name, blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    assert isinstance(load_adapter(bert(), snapshot), PeftModel)


def test_model_with_an_adapter_is_refused(good: Path) -> None:
    with pytest.raises(ModelError, match="already carries an adapter"):
        load_adapter(adapted(), good)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "key", ["lora_B.default.weight", "classifier.modules_to_save.default.bias"]
)
def test_not_finite_is_not_saved(key: str, value: float, tmp_path: Path) -> None:
    model = adapted()
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith(key))
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(
        AdapterFileError, match="holds NaN or infinite values, so nothing was saved"
    ):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_not_a_lora_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="needs a PeftModel, and got BertForSequenceClass"):
        save_adapter(bert(), tmp_path)
    config = IA3Config(target_modules=["query"], feedforward_modules=[])
    with pytest.raises(AdapterFileError, match="saves LoRA adapters, and 'default' is"):
        save_adapter(get_peft_model(bert(), config), tmp_path)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(AdapterFileError, match="taken: the adapter cannot be written here"):
        save_adapter(adapted(), tmp_path / "taken")
