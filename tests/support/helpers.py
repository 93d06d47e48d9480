"""Tools shared by the tests: small real models, mixed ranks, op counting, error measures."""

import copy
import random
import re
from collections import Counter

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

HIDDEN = 48
TEXT = {"vocab_size": 97, "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER = {
    **TEXT,
    "intermediate_size": 80,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _bert() -> torch.nn.Module:
    config = transformers.BertConfig(**TEXT, **NO_DROPOUT, intermediate_size=80, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _roberta() -> torch.nn.Module:
    config = transformers.RobertaConfig(**TEXT, **NO_DROPOUT, intermediate_size=80, num_labels=3)
    return transformers.RobertaForSequenceClassification(config)


def _distilbert() -> torch.nn.Module:
    config = transformers.DistilBertConfig(
        vocab_size=97,
        dim=HIDDEN,
        n_layers=2,
        n_heads=4,
        hidden_dim=80,
        dropout=0.0,
        attention_dropout=0.0,
        seq_classif_dropout=0.0,
        num_labels=3,
    )
    return transformers.DistilBertForSequenceClassification(config)


def _opt() -> torch.nn.Module:
    config = transformers.OPTConfig(
        **TEXT, ffn_dim=80, dropout=0.0, attention_dropout=0.0, word_embed_proj_dim=32
    )
    return transformers.OPTForCausalLM(config)


def _gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=97,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def _t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=97,
        d_model=HIDDEN,
        d_kv=12,
        d_ff=80,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        image_size=16,
        patch_size=4,
        num_labels=3,
        **NO_DROPOUT,
    )
    return transformers.ViTForImageClassification(config)


ARCHITECTURES = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "opt": _opt,
    "gpt2": _gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**DECODER)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**DECODER)),
    "t5": _t5,
    "vit": _vit,
}


def build(name: str) -> torch.nn.Module:
    """A small randomly initialised model of a real architecture, in training mode."""
    torch.manual_seed(0)
    return ARCHITECTURES[name]().train()


def batch_for(
    model: torch.nn.Module, rows: int = 3, length: int = 9, seed: int = 1
) -> dict[str, torch.Tensor]:
    """A batch with labels, padded where the model takes a mask."""
    model = getattr(model, "get_base_model", lambda: model)()
    generator = torch.Generator().manual_seed(seed)
    if model.config.model_type == "vit":
        pixels = torch.randn(rows, 3, 16, 16, generator=generator)
        return {"pixel_values": pixels, "labels": torch.arange(rows) % 3}
    ids = torch.randint(3, 97, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "SequenceClassification" in type(model).__name__:
        return {**batch, "labels": torch.arange(rows) % 3}
    return {**batch, "labels": ids.masked_fill(mask == 0, -100)}


def linear_names(model: torch.nn.Module) -> list[str]:
    """What PEFT's "all-linear" adapts."""
    probe = get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules="all-linear"))
    names = [n for n, m in probe.get_base_model().named_modules() if hasattr(m, "lora_A")]
    return names


RANKS = (0, 1, 3, 8, 12, 17, 32)


def with_lora(
    model: torch.nn.Module, ranks: dict[str, int] | int | None = None, **options: object
) -> torch.nn.Module:
    """The model with non-zero LoRA factors; by default a rank from RANKS for each linear layer."""
    names = linear_names(model)
    if ranks is None:
        draw = random.Random(0)
        ranks = {name: RANKS[(i + draw.randrange(7)) % 7] for i, name in enumerate(names)}
    elif isinstance(ranks, int):
        ranks = dict.fromkeys(names, ranks)
    used = {"^" + re.escape(name): rank for name, rank in ranks.items() if rank}
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=[name for name, rank in ranks.items() if rank],
        rank_pattern=used,
        alpha_pattern={name: 2 * rank for name, rank in used.items()},
        fan_in_fan_out=model.config.model_type == "gpt2",
        **options,
    )
    torch.manual_seed(2)
    adapted = get_peft_model(model, config)
    # Non-zero, and of the size a trained adapter has: small beside the base weight.
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return adapted


def step(model: torch.nn.Module, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and adapter gradients of one forward and backward pass."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach().clone(), grads


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative Frobenius error."""
    truth = truth.double()
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


class CountOps(TorchDispatchMode):
    """Counts the operators that run, so that a test cannot pass on a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def forward(self) -> int:
        return self.counts["heterolora::group_linear"]

    @property
    def backward(self) -> int:
        return self.counts["heterolora::group_linear_backward"]
