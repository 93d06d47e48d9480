"""A fused PEFT model against itself unfused."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from heterolora.verify.checks import OpCounter, error

__all__ = ["MODELS", "check_model"]


def check_model(name: str) -> str | None:
    """Compare logits and adapter gradients in float32; None if they agree."""
    import heterolora

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = MODELS[name]()
    plain = _logits_and_gradients(model, batch)
    report = heterolora.fuse(model, example=batch, backend="aten")
    if report.declined:
        return f"declined: {report.declined}"
    with OpCounter() as counter:
        fused = _logits_and_gradients(model, batch)
    if not counter.calls:
        return "the op did not run"
    worst = max(error(fused[name], value) for name, value in plain.items())
    return None if worst < 1e-5 else f"off by {worst:.1e}, allowed 1e-5"


def _adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def _encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(0, 97, (3, 9))
    return _adapted(BertForSequenceClassification(config)), {
        "input_ids": ids,
        "labels": torch.tensor([0, 1, 1]),
    }


def _decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
    )
    ids = torch.randint(0, 97, (3, 9))
    return _adapted(LlamaForCausalLM(config)), {"input_ids": ids, "labels": ids}


def _logits_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "bert": _encoder,
    "llama": _decoder,
}
