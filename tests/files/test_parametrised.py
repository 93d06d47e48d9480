"""Factors that are computed (`torch.nn.utils.parametrize`) are saved as what they come to."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import build, step, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heterolora.errors import AdapterFileError
from heterolora.files.adapters import load_adapter, save_adapter
from heterolora.fusion.fuse import fuse
from heterolora.search import save_enabled

IDS = torch.arange(3, 21).reshape(2, 9)
LAYER = "bert.encoder.layer.0.attention.self.query"


class Gate(nn.Module):
    """A trained gate on every row of A, as in SoRA."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.gate[:, None]


class Rotated(nn.Module):
    """B made of rotated copies of its first row, as PRoLoRA shares."""

    def forward(self, weight: Tensor) -> Tensor:
        return torch.stack([weight[0].roll(i) for i in range(len(weight))])


class Drawn(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * torch.rand_like(weight)


class DrawnInTraining(Drawn):
    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) if self.training else weight * 0.5


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight[: len(weight) // 2]


def adapted() -> Any:
    return with_lora(build("bert"), {LAYER: 4, "bert.pooler.dense": 3}, task_type="SEQ_CLS")


def layer_of(model: Any, name: str = LAYER) -> Any:
    return model.get_base_model().get_submodule(name)


def parametrised() -> Any:
    model = adapted()
    layer = layer_of(model)
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Gate(4))
    parametrize.register_parametrization(layer.lora_B["default"], "weight", Rotated())
    pooler = layer_of(model, "bert.pooler.dense")
    parametrize.register_parametrization(pooler.lora_A["default"], "weight", DrawnInTraining())
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("save", [save_adapter, save_enabled])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_saved_computes_the_same(save: Callable[..., Any], fused: bool, tmp_path: Path):
    model = parametrised()
    expected = logits(model)
    assert not torch.equal(expected, logits(adapted()))
    if fused:
        fuse(model, backend="aten")
        expected = logits(model)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save(model, tmp_path)
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(
        "parametrizations" in k for k in load_file(tmp_path / "adapter_model.safetensors")
    )

    stock = PeftModel.from_pretrained(build("bert"), str(tmp_path))
    loaded = load_adapter(build("bert"), tmp_path)
    fuse(loaded, backend="aten")
    assert torch.equal(logits(loaded if fused else stock), expected)
    torch.testing.assert_close(logits(stock if fused else loaded), expected, rtol=1e-5, atol=1e-6)


def test_they_train_fused_as_unfused():
    model, batch = parametrised(), {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    # The one that draws is no function.
    parametrize.remove_parametrizations(
        layer_of(model, "bert.pooler.dense").lora_A["default"], "weight"
    )
    expected, wanted = step(copy.deepcopy(model).double(), batch)
    fuse(model.double(), backend="aten")
    found, grads = step(model, batch)
    torch.testing.assert_close(found, expected)
    assert grads.keys() == wanted.keys() and any("gate" in key for key in grads)
    for key, grad in wanted.items():
        torch.testing.assert_close(grads[key], grad)


REFUSED = {
    "drawn anew": (Drawn(), {}, "comes out differently each time"),
    "another shape": (Halved(), {"unsafe": True}, r"has shape \[2, 48\], and not \[4, 48\]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_factor_is_refused_before_anything_is_written(case: str, tmp_path: Path):
    parametrization, options, message = REFUSED[case]
    model = adapted()
    factor = layer_of(model).lora_A["default"]
    parametrize.register_parametrization(factor, "weight", parametrization, **options)
    name = rf"{LAYER}.lora_A.default.weight is parametrised and {message}.*remove_parametrizations"
    for save in (save_adapter, save_enabled):
        with pytest.raises(AdapterFileError, match=name):
            save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_value_that_is_not_finite_is_named_as_before(tmp_path: Path):
    model = parametrised()
    with torch.no_grad():
        layer_of(model).lora_A["default"].parametrizations.weight[0].gate[1] = torch.nan
    with pytest.raises(AdapterFileError, match=r"query\.lora_A\.weight holds NaN"):
        save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_trained_copy_that_is_parametrised_is_refused(tmp_path: Path):
    model = adapted()
    classifier = model.get_base_model().classifier.modules_to_save["default"]
    parametrize.register_parametrization(classifier, "weight", nn.Identity())
    with pytest.raises(
        AdapterFileError, match=r"classifier\.modules_to_save.*no factor of a linea"
    ):
        save_adapter(model, tmp_path / "new")


def test_a_copy_of_what_was_parametrised_before_is_saved_as_ever(tmp_path: Path):
    def base() -> nn.Module:
        model = build("bert")
        nn.utils.parametrizations.weight_norm(model.classifier)
        return model

    config = LoraConfig(r=3, target_modules=["query"], modules_to_save=["classifier"])
    model = get_peft_model(base(), config)
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path))), expected)
