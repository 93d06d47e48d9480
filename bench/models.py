"""The models that cases are made of, and the variants (peers) that are timed on them.

Everything is built from configs with random weights: no download, and the time of a step does not
depend on what the weights are. Vocabularies are shrunk to 1000 tokens, since embedding and output
head are the same frozen work in every variant and only dilute the ratios. Dropout is 0.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import heterolora

__all__ = [
    "BASELINE",
    "COMPILED",
    "VARIANTS",
    "LinearStack",
    "Step",
    "Workload",
    "adapter_parameters",
    "bert",
    "build_step",
    "linear_stack",
    "llama",
    "mixed_ranks",
    "uniform_ranks",
    "with_adapters",
]

VOCABULARY = 1000
RANK = 8
SEED = 0
BASELINE = "peft"
COMPILED = {"compile-peft": "peft", "compile-fused": "fused"}
VARIANTS = {
    "peft": "PEFT, eager: the baseline",
    "fused": "the same PeftModel after heterolora.fuse",
    "base-only": "no adapters: forward, and gradients of activations only; the floor",
    "peft-lowp": "PEFT, autocast_adapter_dtype=False; in fp32 the same computation as the baseline",
    "compile-peft": "torch.compile of PEFT",
    "compile-fused": "torch.compile of the fused model",
}


@dataclass
class Workload:
    """A frozen base model with random weights, a batch, and the linear layers to adapt.

    Attributes:
        model: no parameter requires grad; training mode.
        targets: adapted linear layers in forward order, {module name: (in_features, out_features)}.
        inputs: what the model is called with.
        floor_inputs: the same batch, entering behind the frozen embedding.
        entry: the tensor in `floor_inputs` that requires grad.
        loss: (module, inputs) -> scalar.
        tokens: rows that each adapted layer sees.
    """

    model: nn.Module
    targets: dict[str, tuple[int, int]]
    inputs: dict[str, Tensor]
    floor_inputs: dict[str, Tensor]
    entry: Tensor
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    tokens: int


@dataclass
class Step:
    """One training step: forward, loss, backward and, where something trains, the optimizer."""

    module: nn.Module
    inputs: dict[str, Tensor]
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]
    entry: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = None
    fuse_report: Any = None

    def forward(self) -> Tensor:
        return self.loss(self.module, self.inputs)

    def clear_gradients(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None
        if self.entry is not None:
            self.entry.grad = None

    def __call__(self) -> None:
        self.clear_gradients()
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and optimizer state."""
        found = [*self.module.parameters(), *self.module.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                found += [value for value in state.values() if isinstance(value, Tensor)]
        return found


def bert(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workload:
    """BERT with SDPA attention and a two-class head; the six linears of each layer are adapted."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        attn_implementation="sdpa",
    )
    torch.manual_seed(SEED)
    model = BertForSequenceClassification(config).to(device, dtype)
    labels = torch.randint(2, (batch,), device=device)
    return _transformer(model, r"bert\.encoder\..*", labels, batch, length)


def llama(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workload:
    """Llama with SDPA attention, next-token loss; the seven linears of each layer are adapted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(config).to(device, dtype)
    return _transformer(model, r"model\.layers\..*", None, batch, length)


def _transformer(
    model: Any, adapted: str, labels: Tensor | None, batch: int, length: int
) -> Workload:
    device = model.device
    ids = torch.randint(VOCABULARY, (batch, length), device=device)
    common = {
        "attention_mask": torch.ones_like(ids),
        "labels": ids if labels is None else labels,
    }
    model.requires_grad_(False).train()
    entry = model.get_input_embeddings()(ids).detach().requires_grad_()
    return Workload(
        model=model,
        targets=_linears(model, adapted),
        inputs={"input_ids": ids, **common},
        floor_inputs={"inputs_embeds": entry, **common},
        entry=entry,
        loss=_model_loss,
        tokens=batch * length,
    )


def _model_loss(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return module(**inputs).loss


class LinearStack(nn.Module):
    """Only the linears of a transformer: q, k, v on one input, their sum through o, then up, down.

    Attention is left out because its backward costs several times the adapters in bf16 on a CPU and
    hides what is measured; the activation, because with it a rounding difference can flip a ReLU.
    [tokens, hidden] -> [tokens, hidden].
    """

    def __init__(self, layers: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LinearBlock(hidden, ffn) for _ in range(layers))

    def forward(self, hidden_states: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class LinearBlock(nn.Module):
    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.o_proj = nn.Linear(hidden, hidden)
        self.up_proj = nn.Linear(hidden, ffn)
        self.down_proj = nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.o_proj(self.q_proj(x) + self.k_proj(x) + self.v_proj(x))
        return x + self.down_proj(self.up_proj(x))


def linear_stack(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workload:
    torch.manual_seed(SEED)
    model = LinearStack(layers, hidden, ffn).to(device, dtype).requires_grad_(False).train()
    tokens = batch * length
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    entry = x.clone().requires_grad_()
    return Workload(
        model=model,
        targets=_linears(model, r"layers\..*"),
        inputs={"hidden_states": x},
        floor_inputs={"hidden_states": entry},
        entry=entry,
        loss=_mean_square_loss,
        tokens=tokens,
    )


def _mean_square_loss(module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return module(**inputs).float().square().mean()


def _linears(model: nn.Module, adapted: str) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(adapted, name)
    }


def uniform_ranks(targets: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    return dict.fromkeys(targets, RANK)


def mixed_ranks(targets: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Ranks from {0, 2, 4, 8, 32} with exactly the parameters of `uniform_ranks`; no randomness.

    Layers of one shape class (equal in_features + out_features, hence equal cost of a rank) share a
    cycle of six ranks whose mean is 8, so each full cycle costs what rank 8 costs; what is left
    over after the last full cycle keeps 8.
    """
    classes: dict[int, list[str]] = {}
    for name, shape in targets.items():
        classes.setdefault(sum(shape), []).append(name)
    ranks = uniform_ranks(targets)
    for names in classes.values():
        whole = len(names) - len(names) % len(_MIXED)
        for index, name in enumerate(names[:whole]):
            # The shift by one per cycle keeps a kind of linear from having one rank in every layer.
            ranks[name] = _MIXED[(index + index // len(_MIXED)) % len(_MIXED)]
    return ranks


_MIXED = (0, 32, 2, 8, 4, 2)


def with_adapters(
    workload: Workload, ranks: Mapping[str, int], *, autocast_adapter_dtype: bool = True
) -> Any:
    """PEFT LoRA on `workload.model`, alpha = 2 x rank everywhere, A and B both random.

    B is not left at zero: then every gradient of A would be zero too, and comparing them would
    prove nothing.
    """
    from peft import LoraConfig, get_peft_model

    chosen = {name: rank for name, rank in ranks.items() if rank > 0}
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=0.0,
        target_modules=list(chosen),
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in chosen.items()},
        alpha_pattern={f"^{re.escape(name)}$": 2 * rank for name, rank in chosen.items()},
    )
    torch.manual_seed(SEED + 1)
    model = get_peft_model(
        workload.model, config, autocast_adapter_dtype=autocast_adapter_dtype
    ).train()
    generator = torch.Generator().manual_seed(SEED + 2)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def build_step(variant: str, workload: Workload, ranks: Mapping[str, int]) -> Step:
    """The training step of `variant`. Takes over `workload.model`: each needs its own workload."""
    if variant == "base-only":
        return Step(workload.model, workload.floor_inputs, workload.loss, entry=workload.entry)
    plain = COMPILED.get(variant, variant)
    model = with_adapters(workload, ranks, autocast_adapter_dtype=plain != "peft-lowp")
    # With an example, because a compiler sees only the groups that were found before it.
    report = heterolora.fuse(model, example=workload.inputs) if plain == "fused" else None
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-4, fused=True)
    module: Any = torch.compile(model) if variant in COMPILED else model
    return Step(module, workload.inputs, workload.loss, optimizer=optimizer, fuse_report=report)
