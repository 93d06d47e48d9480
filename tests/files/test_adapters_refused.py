"""Every malformed or unsafe adapter file by its message, with the model left as it was."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import HIDDEN, build, with_lora
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from heterolora.errors import AdapterFileError
from heterolora.files.adapters import load_adapter, save_adapter

QUERY = "bert.encoder.layer.0.attention.self.query"
QUERY_A = f"base_model.model.{QUERY}.lora_A.weight"
QUERY_B = f"base_model.model.{QUERY}.lora_B.weight"
RANKS = {QUERY: 2, "bert.encoder.layer.1.output.dense": 3}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("io") / "adapter"
    save_adapter(with_lora(build("bert"), RANKS, task_type="SEQ_CLS"), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


Change = Callable[[Path], None]


def settings(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def text(content: bytes) -> Change:
    return lambda folder: (folder / "adapter_config.json").write_bytes(content) and None


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        state = load_file(file)
        edit(state)
        save_file(state, file)

    return change


def fill(key: str, value: float) -> Change:
    return weights(lambda state: state[key].view(-1)[-1:].fill_(value))


def pickled(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / "adapter_model.safetensors").unlink()
        torch.save({}, folder / name)

    return change


def outside(name: str) -> Change:
    def change(folder: Path) -> None:
        target = folder.parent / f"elsewhere_{name}"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return change


def renamed_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(pickle.dumps({"weight": [1.0]}))


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def moved_into_subfolder(folder: Path) -> None:
    (folder / "mine").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / file).rename(folder / "mine" / file)


POOLER = "base_model.model.bert.pooler.dense.bias"
BOMB = r"encoder\.(\w+\.?)+!"
BAD: dict[str, tuple[Change, str]] = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no such folder. Name the one"),
    "no config": (
        lambda folder: (folder / "adapter_config.json").unlink(),
        "adapter_config.json: the adapter's configuration is missing. Save it again.",
    ),
    "in a sub-folder": (moved_into_subfolder, "Name one of its sub-folders: mine."),
    "no weights": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "adapter_model.safetensors: the adapter's weights are missing",
    ),
    "pickle .bin": (pickled("adapter_model.bin"), "adapter_model.bin: refused, because loading a"),
    "pickle .pt": (pickled("adapter.pt"), "adapter.pt: refused, because loading a pickle can run"),
    "renamed pickle": (renamed_pickle, "adapter_model.safetensors: not readable as safetensors"),
    "cut short": (cut_short, "adapter_model.safetensors: not readable as safetensors"),
    "weights link out": (
        outside("adapter_model.safetensors"),
        "adapter_model.safetensors: a link out of the folder, to ",
    ),
    "config link out": (
        outside("adapter_config.json"),
        "adapter_config.json: a link out of the folder, to ",
    ),
    "not json": (text(b"{'r': 4}"), "adapter_config.json: not valid JSON"),
    "not text": (text(b"\xff\xfe{}"), "adapter_config.json: cannot be read"),
    "deep json": (text(b"[" * 200_000), "adapter_config.json: not valid JSON"),
    "not an object": (text(b"[1]"), "adapter_config.json: the file must be a JSON object"),
    "other method": (settings(peft_type="IA3"), "peft_type is 'IA3', and only 'LORA'"),
    "negative rank": (settings(r=-4), "r is -4; it must be from 1 to 65536"),
    "text rank": (settings(r="4"), "r must be a whole number, not '4'"),
    "true rank": (settings(r=True), "r must be a whole number, not True"),
    "huge rank": (settings(r=10**9), "r is 1000000000; it must be from 1 to 65536"),
    "zero rank in pattern": (
        settings(rank_pattern={"query": 0}),
        "rank_pattern['query'] is 0; it must be from 1 to 65536",
    ),
    "pattern is a list": (
        settings(rank_pattern=[2]),
        "rank_pattern must be a JSON object, not a list",
    ),
    "infinite alpha": (
        settings(alpha_pattern={"query": float("inf")}),
        "adapter_config.json: alpha_pattern.query is inf, which is not a finite number",
    ),
    "NaN alpha": (settings(lora_alpha=float("nan")), "adapter_config.json: lora_alpha is nan"),
    "alpha that no float holds": (
        settings(alpha_pattern={"query": 10**400}),
        "alpha_pattern['query'] is 1000",
    ),
    "text alpha": (settings(lora_alpha="8"), "lora_alpha must be a number, not '8'"),
    "dropout of one": (settings(lora_dropout=1.0), "lora_dropout is 1.0; it must be below 1"),
    "regular expression bomb": (
        settings(rank_pattern={BOMB: 2}),
        f"rank_pattern[{BOMB!r}] is a regular expression that may take for ever",
    ),
    "too many repeats": (
        settings(target_modules=".*a.*b.*c.*d.*e"),
        "target_modules is a regular expression that may take for ever",
    ),
    "too many options": (
        settings(exclude_modules="a?" * 30 + "a" * 30),
        "exclude_modules is a regular expression that may take for ever",
    ),
    "broken expression": (
        settings(rank_pattern={"(query": 2}),
        "rank_pattern['(query'] is not a valid regular expression",
    ),
    "over-long key": (
        settings(alpha_pattern={"q" * 2000: 2}),
        "has 2000 characters, and at most 1024 are read.",
    ),
    "bomb in layers_pattern": (
        settings(layers_pattern=["(a|aa)+"]),
        "layers_pattern is a regular expression that may take for ever",
    ),
    "path in modules_to_save": (
        settings(modules_to_save=["classifier", "../../etc/passwd"]),
        "modules_to_save holds '../../etc/passwd', which is not a module's name.",
    ),
    "path in target_modules": (
        settings(target_modules=["query", "/root"]),
        "target_modules holds '/root', which is not a module's name.",
    ),
    "imports a module": (
        settings(megatron_config={"a": 1}, megatron_core="os"),
        "megatron_config is {'a': 1}, and only settings of plain LoRA are loaded here.",
    ),
    "reads a path": (
        settings(corda_config={"covariance_file": "/etc/passwd"}),
        "corda_config is {'covariance_file': '/etc/passwd'}, and only settings of plain LoRA",
    ),
    "from a newer peft": (settings(use_tomorrow=True), "of a newer peft release."),
    "changes the base": (
        settings(init_lora_weights="pissa"),
        "init_lora_weights is 'pissa', which changes base weights when loaded.",
    ),
    "other model": (
        settings(target_modules=["q_proj"]),
        "PEFT cannot put this adapter on BertForSequenceClassification",
    ),
    "missing tensor": (
        weights(lambda state: state.pop(QUERY_A)),
        f"adapter_model.safetensors: {QUERY_A} is missing (1 in all).",
    ),
    "missing classifier": (
        weights(lambda state: state.pop("base_model.model.classifier.bias")),
        "base_model.model.classifier.bias is missing (1 in all).",
    ),
    "extra tensor": (
        weights(lambda state: state.update({"base_model.model.extra": torch.ones(2)})),
        "base_model.model.extra does not belong to adapter_config.json on this model (1 in all).",
    ),
    "overwrites a base weight": (
        weights(lambda state: state.update({POOLER: torch.ones(HIDDEN)})),
        f"{POOLER} does not belong to adapter_config.json",
    ),
    "wrong shape": (
        weights(lambda state: state.update({QUERY_A: torch.ones(2, HIDDEN + 1)})),
        f"{QUERY_A} has shape [2, {HIDDEN + 1}], and this model needs [2, {HIDDEN}].",
    ),
    "wrong dimensions": (
        weights(lambda state: state.update({QUERY_A: torch.ones(2 * HIDDEN)})),
        f"{QUERY_A} has shape [{2 * HIDDEN}], and this model needs [2, {HIDDEN}].",
    ),
    "wrong rank": (
        weights(lambda state: state.update({QUERY_A: torch.ones(8, HIDDEN)})),
        f"{QUERY_A} has rank 8, and adapter_config.json says 2. Use the two files of",
    ),
    "rank pattern dropped": (
        settings(rank_pattern={}),
        f"{QUERY_A} has rank 2, and adapter_config.json says 8.",
    ),
    "wrong rank of B": (
        weights(lambda state: state.update({QUERY_B: torch.ones(HIDDEN, 3)})),
        f"{QUERY_B} has rank 3, and adapter_config.json says 2.",
    ),
    "NaN": (fill(QUERY_B, float("nan")), f"{QUERY_B} holds NaN or infinite values."),
    "infinity in the classifier": (
        fill("base_model.model.classifier.weight", float("inf")),
        "base_model.model.classifier.weight holds NaN or infinite values.",
    ),
    "integers": (
        weights(lambda state: state.update({QUERY_A: torch.ones(2, HIDDEN, dtype=torch.int32)})),
        f"{QUERY_A} has dtype I32, which is none of F64, F32, F16, BF16.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_and_the_model_untouched(name: str, folder: Path) -> None:
    change, message = BAD[name]
    change(folder)
    model = build("bert")
    names, state = [n for n, _ in model.named_modules()], copy.deepcopy(model.state_dict())
    wants_grad = [p.requires_grad for p in model.parameters()]
    with pytest.raises(AdapterFileError, match=re.escape(message)):
        load_adapter(model, folder)
    assert [n for n, _ in model.named_modules()] == names
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == wants_grad
    assert model.training


@pytest.mark.parametrize(
    "expression",
    [
        r"^bert\.encoder\.layer\.0\.attention\.self\.query",
        "|".join(rf"bert\.encoder\.layer\.{i}\.output\.dense" for i in range(200)),
        r".*\.layers\.(\d+|first)\..*(q|k|v|o)_proj",
        r"^(?!.*vision).*(self_attn|mlp)\.\w+$",
    ],
)
def test_usual_expressions_are_read(expression: str, folder: Path) -> None:
    """Behind "never" they match no module, so the adapter loads as if they were not there."""
    settings(exclude_modules=f"never(?:{expression})")(folder)
    assert isinstance(load_adapter(build("bert"), folder), PeftModel)
