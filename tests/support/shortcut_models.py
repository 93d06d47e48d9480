"""Small models with shortcuts, and slow forward passes of two of them, by formula."""

import copy
import math

import torch
import transformers
from helpers import DECODER, TEXT, build, linear_names
from peft import LoraConfig, get_peft_model
from torch.nn.functional import gelu, layer_norm, silu

import heterolora
from heterolora.shortcuts.model import KINDS

# OPT-350M is post-norm and embeds in fewer columns than its layers have.
OPT_350M = {
    **TEXT,
    "ffn_dim": 80,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "word_embed_proj_dim": 32,
    "do_layer_norm_before": False,
}
FAMILIES = (
    *("bert", "roberta", "distilbert", "opt", "opt-350m"),
    *("gpt2", "llama", "qwen3", "gemma", "gemma2", "gemma3", "mistral"),
)
# These normalise what a sub-layer returns, before the residual connection adds it.
_NORMED = {
    "gemma2": (transformers.Gemma2ForCausalLM, transformers.Gemma2Config),
    "gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig),
}
# One pre-norm and one post-norm model of each way to be built.
FEW = ("bert", "opt-350m", "opt", "gpt2", "llama")
# Of each kind another, so that a mix-up shows as a wrong shape or value.
RANKS = {"in-attn": 3, "in-ffn": 8, "cross-ffn": 5, "cross-layer": 17}


def plain(name: str, layers: int = 2) -> torch.nn.Module:
    """A model without adapters, in training mode."""
    if name == "opt-350m":
        torch.manual_seed(0)
        config = transformers.OPTConfig(**OPT_350M)
        base = transformers.OPTForCausalLM(config)
    elif name in _NORMED:
        torch.manual_seed(0)
        kind, settings = _NORMED[name]
        sizes = {**DECODER, "num_hidden_layers": layers}
        base = kind(settings(**sizes, attn_implementation="eager"))
    else:
        base = build(name)
    base.config.use_cache = False
    if layers == base.config.num_hidden_layers:
        return base.train()
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = layers
    torch.manual_seed(0)
    return type(base)(config).train()


def with_shortcuts(
    base: torch.nn.Module,
    kinds: tuple[str, ...] = KINDS,
    targets: list[str] | None = None,
    weighty: bool = True,
    ranks: dict[str, int] | int | None = None,
) -> torch.nn.Module:
    """LoRA on every linear layer, or on the targets, and shortcuts of mixed ranks.

    Args:
        ranks: by kind or name, else RANKS.
        weighty: whether B is drawn, for LoRA and shortcuts, or 0 as in a fresh model.
    """
    config = LoraConfig(
        r=4,
        target_modules=linear_names(base) if targets is None else targets,
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    torch.manual_seed(3)
    model = get_peft_model(base, config)
    heterolora.add_shortcuts(model, kinds, rank=ranks or {k: RANKS[k] for k in kinds}, alpha=16)
    if weighty:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        for shortcut in model.low_rank_shortcuts:
            torch.nn.init.normal_(shortcut.b, std=0.02)
    return model


def decoder_targets(name: str) -> list[str]:
    """Q and V, as in the original runs: no shortcut ends at a LoRA layer then."""
    return {"gpt2": ["c_attn"], "bert": ["query", "value"]}.get(name, ["q_proj", "v_proj"])


def slow_logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a BERT or a Llama, written out from its weights alone."""
    base = model.get_base_model()
    return (_slow_bert if base.config.model_type == "bert" else _slow_llama)(model, base, batch)


class _Weights:
    """Linear layers and shortcuts by name."""

    def __init__(self, model: torch.nn.Module, base: torch.nn.Module) -> None:
        self.modules = dict(base.named_modules())
        self.shortcuts = {shortcut.name: shortcut for shortcut in model.low_rank_shortcuts}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        layer = self.modules[name]
        if not hasattr(layer, "lora_A"):
            return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        y = x @ layer.base_layer.weight.T + x @ a.T @ b.T * layer.scaling["default"]
        return y if layer.base_layer.bias is None else y + layer.base_layer.bias

    def shortcut(self, projection: str, kind: str, u: torch.Tensor | None) -> torch.Tensor | float:
        found = self.shortcuts.get(f"{projection}:{kind}")
        if found is None:
            return 0.0
        assert u is not None
        return 16 / RANKS[kind] * (u @ found.a.T @ found.b.T)


def _slow_bert(model, base, batch):
    w = _Weights(model, base)
    heads = base.config.num_attention_heads
    x = base.bert.embeddings(input_ids=batch["input_ids"])
    mask = torch.where(batch["attention_mask"][:, None, None, :] == 1, 0.0, -math.inf).to(x)
    before = None
    for i in range(base.config.num_hidden_layers):
        name = f"bert.encoder.layer.{i}"
        q, k, v = (
            w.linear(f"{name}.attention.self.{part}", x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        out = f"{name}.attention.output.dense"
        attention = w.linear(out, context)
        attention = attention + w.shortcut(out, "in-attn", x) + w.shortcut(out, "cross-ffn", before)
        z = _norm(w.modules[f"{name}.attention.output.LayerNorm"], x + attention)
        out = f"{name}.output.dense"
        ffn = w.linear(out, gelu(w.linear(f"{name}.intermediate.dense", z)))
        ffn = ffn + w.shortcut(out, "in-ffn", z) + w.shortcut(out, "cross-layer", x)
        x, before = _norm(w.modules[f"{name}.output.LayerNorm"], z + ffn), z
    pooled = torch.tanh(w.linear("bert.pooler.dense", x[:, 0]))
    return w.linear("classifier", pooled)


def _norm(norm, x):
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _slow_llama(model, base, batch):
    w = _Weights(model, base)
    config = base.config
    x = base.model.embed_tokens(batch["input_ids"])
    length = x.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen & (batch["attention_mask"][:, None, None, :] == 1)
    mask = torch.where(seen, 0.0, -math.inf).to(x)
    before = None
    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        u = _rms(w.modules[f"{name}.input_layernorm"], x)
        q, k, v = (
            w.linear(f"{name}.self_attn.{part}_proj", u)
            .unflatten(-1, (-1, config.head_dim))
            .transpose(1, 2)
            for part in "qkv"
        )
        q, k = _rotated(q), _rotated(k)
        share = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + mask).softmax(-1)
        context = (weights @ v).transpose(1, 2).flatten(2)
        out = f"{name}.self_attn.o_proj"
        attention = w.linear(out, context)
        attention = attention + w.shortcut(out, "in-attn", x) + w.shortcut(out, "cross-ffn", before)
        z = x + attention
        u = _rms(w.modules[f"{name}.post_attention_layernorm"], z)
        gate, up = (w.linear(f"{name}.mlp.{part}_proj", u) for part in ("gate", "up"))
        out = f"{name}.mlp.down_proj"
        ffn = w.linear(out, silu(gate) * up)
        ffn = ffn + w.shortcut(out, "in-ffn", z) + w.shortcut(out, "cross-layer", x)
        x, before = z + ffn, z
    return w.linear("lm_head", _rms(w.modules["model.norm"], x))


def _rms(norm, x):
    return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


def _rotated(x):
    half = x.shape[-1] // 2
    speed = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[2], dtype=torch.float64)[:, None] * speed
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
