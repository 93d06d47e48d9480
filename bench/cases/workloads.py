"""Whole models and stacks of linears, built from configs with random weights.

No download, and the time of a step does not depend on what the weights are. Vocabularies are shrunk
to 1000 tokens, since embedding and output head are the same frozen work in every variant and only
dilute the ratios. Dropout of the model's own is 0.
"""

from typing import Any

import torch
from torch import Tensor, nn

from heterolora.bench.harness.steps import SEED, Inputs, Workload, linears

__all__ = ["LinearStack", "bert", "linear_stack", "llama", "opt", "roberta"]

VOCABULARY = 1000


def bert(*, length: int, **sizes: Any) -> Workload:
    """BERT with SDPA attention and a two-class head; the six linears of each layer are adapted.

    Args:
        sizes: layers, hidden, ffn, heads; batch, dtype, device.
    """
    from transformers import BertConfig, BertForSequenceClassification

    return _encoder(BertConfig, BertForSequenceClassification, length, length, **sizes)


def roberta(*, length: int, **sizes: Any) -> Workload:
    """As `bert`, in RoBERTa."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    # RoBERTa counts positions from the padding id, 1, on.
    positions = length + 2
    return _encoder(RobertaConfig, RobertaForSequenceClassification, positions, length, **sizes)


def _encoder(
    config_class: Any,
    architecture: Any,
    positions: int,
    length: int,
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    **batch: Any,
) -> Workload:
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
        attn_implementation="sdpa",
    )
    adapted = rf"{architecture.base_model_prefix}\.encoder\..*"
    return _transformer(architecture, config, adapted, 2, length=length, **batch)


def opt(
    *,
    layers: int,
    hidden: int,
    embedding: int,
    ffn: int,
    heads: int,
    length: int,
    **batch: Any,
) -> Workload:
    """OPT with post-norm and a projected embedding, as OPT-350M has; the six linears of each layer
    are adapted.
    """
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        word_embed_proj_dim=embedding,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        do_layer_norm_before=False,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    adapted = r"model\.decoder\.layers\..*"
    return _transformer(OPTForCausalLM, config, adapted, None, length=length, **batch)


def llama(
    *,
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    kv_heads: int,
    length: int,
    **batch: Any,
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
    adapted = r"model\.layers\..*"
    return _transformer(LlamaForCausalLM, config, adapted, None, length=length, **batch)


def _transformer(
    architecture: Any,
    config: Any,
    adapted: str,
    classes: int | None,
    *,
    batch: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Workload:
    torch.manual_seed(SEED)
    # Made in the dtype and place it stays in: a float32 copy of a large model would not fit.
    with torch.device(device):
        model = architecture._from_config(config, dtype=dtype)
        ids = torch.randint(2, VOCABULARY, (batch, length))
        labels = ids if classes is None else torch.randint(classes, (batch,))
    common = {"attention_mask": torch.ones_like(ids), "labels": labels}
    model.requires_grad_(False).train()
    entry = model.get_input_embeddings()(ids).detach().requires_grad_()
    return Workload(
        model=model,
        targets=linears(model, adapted),
        inputs={"input_ids": ids, **common},
        floor_inputs={"inputs_embeds": entry, **common},
        run=_model_loss,
        tokens=batch * length,
        layers=config.num_hidden_layers,
    )


def _model_loss(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [module(**inputs).loss]


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
    return Workload(
        model=model,
        targets=linears(model, r"layers\..*"),
        inputs={"hidden_states": x},
        floor_inputs={"hidden_states": x.clone().requires_grad_()},
        run=_mean_square_loss,
        tokens=tokens,
        layers=layers,
    )


def _mean_square_loss(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [module(**inputs).float().square().mean()]
