"""Whole PEFT models on the Triton path, under the interpreter, against PEFT's own forward."""

import pytest
import torch
from helpers import build, error
from peft import LoraConfig, get_peft_model
from shortcut_models import decoder_targets, plain, with_shortcuts
from torch import nn

import heterolora

IDS = torch.arange(18).view(2, 9) * 5 % 97
LABELS = {"bert": torch.tensor([0, 1]), "llama": IDS, "gpt2": IDS}
RANKS = {
    "bert": {"query": 17, "value": 1},
    "llama": {"q_proj": 17, "v_proj": 1},
    "gpt2": {"c_attn": 17},
}


def _adapted(name):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", rank_pattern=RANKS[name])
    model = get_peft_model(build(name), config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.02)
    return model


def _step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach().clone(), **grads}


@pytest.mark.parametrize("name", [pytest.param("bert", marks=pytest.mark.quick), "llama", "gpt2"])
def test_a_fused_model_is_pefts(name, launches):
    model = _adapted(name)
    batch = {"input_ids": IDS, "labels": LABELS[name]}
    expected = _step(model, batch)
    report = heterolora.fuse(model, backend="triton", example=batch)
    assert set(report.fused.values()) == {"triton"} and not report.declined
    launches.clear()
    found = _step(model, batch)
    assert launches["expand_kernel"] == launches["shrink_kernel"] > 0
    assert launches["dx_kernel"] > 0 and launches["da_kernel"] == launches["dy_kernel"] > 0
    assert found.keys() == expected.keys()
    assert max(error(found[key], expected[key]) for key in expected) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("targets", [True, False], ids=["q,v", "all-linear"])
def test_shortcuts_run_in_the_kernels(name, targets, launches):
    model = with_shortcuts(plain(name), targets=decoder_targets(name) if targets else None)
    batch = {"input_ids": IDS, "labels": LABELS[name]}
    expected = _step(model, batch)
    heterolora.fuse(model, backend="triton", example=batch)
    launches.clear()
    found = _step(model, batch)
    assert launches["expand_kernel"] > 0 and launches["dx_kernel"] > 0
    assert found.keys() == expected.keys()
    assert max(error(found[key], expected[key]) for key in expected) < 1e-5
