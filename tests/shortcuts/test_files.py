"""Shortcuts in files: there and back, what stock PEFT is given, and every malformed file."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import batch_for, step
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from shortcut_models import FEW, RANKS, decoder_targets, plain, with_shortcuts
from torch.nn.utils import parametrize

import heterolora
from heterolora.errors import AdapterFileError
from heterolora.files.adapters import load_adapter, save_adapter
from heterolora.fusion.fuse import unfuse
from heterolora.shortcuts.files import SavedShortcuts
from heterolora.shortcuts.model import Shortcuts

CONFIG, WEIGHTS = "heterolora_shortcuts.json", "heterolora_shortcuts.safetensors"
FIRST = "bert.encoder.layer.0.attention.output.dense:in-attn"


@pytest.mark.parametrize("targets", [True, False], ids=["q,v", "all-linear"])
@pytest.mark.parametrize("name", FEW)
def test_round_trip(name: str, targets: bool, tmp_path: Path) -> None:
    base = plain(name, layers=3)
    batch = batch_for(base)
    model = with_shortcuts(base, targets=decoder_targets(name) if targets else None)
    expected = model(**batch).logits
    heterolora.fuse(model, backend="aten")
    save_adapter(model, tmp_path)
    loaded: Any = load_adapter(plain(name, layers=3), tmp_path, is_trainable=True)
    assert "_heterolora" in loaded.__dict__
    unfuse(loaded)
    assert torch.equal(loaded.train()(**batch).logits, expected)
    assert [s.name for s in loaded.low_rank_shortcuts] == [s.name for s in model.low_rank_shortcuts]
    assert all(p.requires_grad for p in loaded.low_rank_shortcuts.parameters())
    _, grads = step(loaded, batch)
    assert sum("low_rank_shortcuts" in key for key in grads) == 2 * 11
    frozen = load_adapter(plain(name, layers=3), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_both_dtypes_survive(tmp_path: Path) -> None:
    model = with_shortcuts(plain("bert").double())
    save_adapter(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)[f"{FIRST}.a"].dtype == torch.float64
    loaded: Any = load_adapter(plain("bert"), tmp_path)
    assert next(iter(loaded.low_rank_shortcuts)).a.dtype == torch.float32
    document = json.loads((tmp_path / CONFIG).read_text())
    assert document["schema_version"] == 1
    assert document["shortcuts"][0] == {
        "projection": FIRST.partition(":")[0],
        "kind": "in-attn",
        "rank": RANKS["in-attn"],
        "alpha": 16.0,
    }


def test_stock_peft_gets_what_it_can_compute(tmp_path: Path) -> None:
    base = plain("bert")
    batch = batch_for(base)
    model = with_shortcuts(base)
    with pytest.raises(AdapterFileError, match=r"0\.attention\.output\.dense:in-attn carries weig"):
        save_adapter(model, tmp_path / "new", stock=True)
    assert not (tmp_path / "new").exists()
    save_adapter(model, tmp_path)
    with torch.no_grad():
        for shortcut in model.low_rank_shortcuts:
            shortcut.b.zero_()
    save_adapter(model, tmp_path, stock=True)
    assert not (tmp_path / CONFIG).exists() and not (tmp_path / WEIGHTS).exists()
    stock = PeftModel.from_pretrained(plain("bert"), str(tmp_path)).train()
    assert torch.equal(stock(**batch).logits, model(**batch).logits)


def test_peft_alone_neither_saves_nor_trips_over_them(tmp_path: Path) -> None:
    model = with_shortcuts(plain("bert"))
    model.save_pretrained(str(tmp_path))
    assert not any("shortcuts" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(plain("bert"), str(tmp_path))
    assert Shortcuts.of(stock) is None


def test_a_model_without_leaves_no_stale_files(tmp_path: Path) -> None:
    model = with_shortcuts(plain("bert"))
    save_adapter(model, tmp_path)
    heterolora.remove_shortcuts(model)
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    assert Shortcuts.of(load_adapter(plain("bert"), tmp_path)) is None


def test_weights_go_back_into_the_same_model(tmp_path: Path) -> None:
    model: Any = with_shortcuts(plain("bert"))
    batch = batch_for(model)
    save_adapter(model, tmp_path)
    expected = model(**batch).logits
    with torch.no_grad():
        for shortcut in model.low_rank_shortcuts:
            shortcut.a.add_(1)
            shortcut.b.add_(1)
    saved = SavedShortcuts.read(tmp_path, model.get_base_model())
    assert saved is not None
    saved.restore(model.low_rank_shortcuts)
    assert torch.equal(model(**batch).logits, expected)
    assert all(p.requires_grad for p in model.low_rank_shortcuts.parameters())
    other: Any = with_shortcuts(plain("bert"), ranks={**RANKS, "in-ffn": 7})
    before = [p.clone() for p in other.low_rank_shortcuts.parameters()]
    with pytest.raises(AdapterFileError, match=r"in-ffn has rank and alpha \(8, 16.0\)"):
        saved.restore(other.low_rank_shortcuts)
    after = other.low_rank_shortcuts.parameters()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


class Doubled(torch.nn.Module):
    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return 2 * factor


def test_parametrised_factors_are_saved_as_they_come_out(tmp_path: Path) -> None:
    model: Any = with_shortcuts(plain("bert"))
    for shortcut in model.low_rank_shortcuts:
        parametrize.register_parametrization(shortcut, "a", Doubled())
        parametrize.register_parametrization(shortcut, "b", Doubled())
    batch = batch_for(model)
    expected = model.eval()(**batch).logits
    save_adapter(model, tmp_path)
    loaded: Any = load_adapter(plain("bert"), tmp_path)
    unfuse(loaded)
    assert torch.equal(loaded(**batch).logits, expected)
    # A resumed run needs what they are computed from.
    saved = SavedShortcuts.read(tmp_path, model.get_base_model())
    assert saved is not None
    with pytest.raises(AdapterFileError, match=f"shortcut {FIRST} is parametrised"):
        saved.restore(model.low_rank_shortcuts)


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model: Any = with_shortcuts(plain("bert"))
    with torch.no_grad():
        next(iter(model.low_rank_shortcuts)).a[0, 0] = float("nan")
    with pytest.raises(AdapterFileError, match=f"shortcut {FIRST}: A holds NaN"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shortcuts") / "adapter"
    save_adapter(with_shortcuts(plain("bert"), targets=["query"]), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


Change = Callable[[Path], None]


def document(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(folder: Path) -> None:
        content = json.loads((folder / CONFIG).read_text())
        edit(content)
        (folder / CONFIG).write_text(json.dumps(content))

    return change


def entry(**values: Any) -> Change:
    return document(lambda d: d["shortcuts"][0].update(values))


def weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS)

    return change


def link(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


A = f"{FIRST}.a"
CASES: dict[str, tuple[Change, str]] = {
    "no JSON": (lambda f: (f / CONFIG).unlink(), rf"{CONFIG}: missing"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), rf"{WEIGHTS}: missing"),
    "link to JSON": (link(CONFIG), rf"{CONFIG}: a link out of the folder"),
    "link to weights": (link(WEIGHTS), rf"{WEIGHTS}: a link out of the folder"),
    "cut JSON": (lambda f: (f / CONFIG).write_text("{") and None, "not valid JSON"),
    "list": (lambda f: (f / CONFIG).write_text("[]") and None, "the file must be a JSON object"),
    "newer": (document(lambda d: d.update(schema_version=2)), "schema_version is 2, .* upgrade"),
    "version": (
        document(lambda d: d.update(schema_version="1")),
        "schema_version must be a whole number, not '1'",
    ),
    "no version": (document(lambda d: d.pop("schema_version")), "schema_version is missing"),
    "extra key": (document(lambda d: d.update(more=1)), ": more is not a key that is known here"),
    "stacks": (document(lambda d: d.update(stacks={})), "stacks must be a list, not an object"),
    "stack": (document(lambda d: d.update(stacks=[7])), "stacks do not fit .*mapping must be"),
    "layer": (
        document(lambda d: d["stacks"][0][0].update(ffn_input="nix")),
        "stacks do not fit BertFor.*ffn_input: .* no module 'nix'",
    ),
    "no shortcuts": (document(lambda d: d.update(shortcuts=[])), "shortcuts is empty"),
    "entry": (document(lambda d: d["shortcuts"].append(3)), r"shortcuts\[7\] must be a JSON obj"),
    "entry key": (entry(more=1), r"shortcuts\[0\]\.more is not a key"),
    "kind": (entry(kind="in"), r"shortcuts\[0\]\.kind is 'in', none of in-attn"),
    "other projection": (
        entry(projection="x"),
        r"shortcuts\[0\]\.projection is 'x', where no in-attn of these layers ends",
    ),
    "alpha beyond sense": (entry(alpha=1e31), r"shortcuts\[0\].alpha is 1e\+31"),
    "first cross-ffn": (entry(kind="cross-ffn"), r"\[0\].projection .*, where no cross-ffn of"),
    "projection": (
        entry(projection=["x"]),
        r"shortcuts\[0\]\.projection must be a non-empty string",
    ),
    "twice": (
        document(lambda d: d["shortcuts"].append(d["shortcuts"][0])),
        r"shortcuts\[7\]\.projection is there twice",
    ),
    "rank 0": (entry(rank=0), r"shortcuts\[0\].rank is 0"),
    "large rank": (entry(rank=10**9), r"shortcuts\[0\].rank is 1000000000"),
    "rank true": (entry(rank=True), r"shortcuts\[0\].rank must be a whole number, not True"),
    "alpha": (entry(alpha="2"), r"shortcuts\[0\].alpha must be a number, not '2'"),
    "alpha inf": (entry(alpha=float("inf")), r"shortcuts\[0\].alpha is inf"),
    "rank of other": (entry(rank=4), rf"{WEIGHTS}: {A} has rank 3, and {CONFIG} says 4"),
    "missing": (weights(lambda s: s.pop(A)), rf"{WEIGHTS}: {A} is missing \(1 in all\)"),
    "extra": (
        weights(lambda s: s.update(x=s[A] + 0)),
        rf"{WEIGHTS}: x does not belong to {CONFIG}",
    ),
    "shape": (
        weights(lambda s: s.update({A: torch.zeros(3, 47)})),
        rf"{A} has shape \[3, 47\]",
    ),
    "dtype": (weights(lambda s: s.update({A: s[A].long()})), rf"{A} has dtype I64"),
    "nan": (weights(lambda s: s[A].fill_(torch.nan)), rf"{A} holds NaN"),
    "pickle": (
        lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"x": 1})) and None,
        "not readable as safetensors",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_file_is_refused_and_the_model_untouched(name: str, folder: Path) -> None:
    change, message = CASES[name]
    change(folder)
    model = plain("bert")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(model, folder)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_another_model_is_refused(folder: Path) -> None:
    other = get_peft_model(plain("bert", layers=1), LoraConfig(r=4, target_modules=["query"]))
    save_adapter(other, folder.parent / "other")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(folder / name, folder.parent / "other" / name)
    with pytest.raises(AdapterFileError, match=r"stacks do not fit .*no module .*layer\.1\."):
        load_adapter(plain("bert", layers=1), folder.parent / "other")
