"""Tiny models with one batch maker each: a text encoder, a decoder, Conv1D layers, BatchNorm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 61


@dataclass(frozen=True)
class Subject:
    """A model on CPU and a function that makes its i-th batch."""

    model: Any
    batch: Callable[[int], dict[str, torch.Tensor]]

    def batches(self, count: int = 3) -> list[dict[str, torch.Tensor]]:
        return [self.batch(i) for i in range(count)]


def _tokens(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + index)
    ids = torch.randint(3, VOCABULARY, (4, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _classified(index: int) -> dict[str, torch.Tensor]:
    return {**_tokens(index), "labels": torch.tensor([0, 1, 1, index % 2])}


def _causal(index: int) -> dict[str, torch.Tensor]:
    tokens = _tokens(index)
    return {**tokens, "labels": tokens["input_ids"].clone()}


def _seq2seq(index: int) -> dict[str, torch.Tensor]:
    return {**_tokens(index), "labels": _tokens(index + 50)["input_ids"]}


def _pixels(index: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(200 + index)
    return {
        "pixel_values": torch.randn(4, 3, 32, 32, generator=generator),
        "labels": torch.tensor([0, 1, 1, 0]),
    }


def _bert(dropout: float = 0.0) -> Subject:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return Subject(transformers.BertForSequenceClassification(config), _classified)


def _opt(dropout: float = 0.0) -> Subject:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        word_embed_proj_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=64,
        max_position_embeddings=16,
        dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Subject(transformers.OPTForCausalLM(config), _causal)


def _gpt2() -> Subject:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Subject(transformers.GPT2LMHeadModel(config), _causal)


def _t5() -> Subject:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return Subject(transformers.T5ForConditionalGeneration(config), _seq2seq)


def _mobilevit() -> Subject:
    config = transformers.MobileViTConfig(
        image_size=32,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    return Subject(transformers.MobileViTForImageClassification(config), _pixels)


_MAKERS = {"bert": _bert, "opt": _opt, "gpt2": _gpt2, "t5": _t5, "mobilevit": _mobilevit}


@pytest.fixture
def subject() -> Callable[..., Subject]:
    """``subject(name, **options)``: a fresh model, the same weights on every call."""

    def make(name: str, **options: float) -> Subject:
        torch.manual_seed(7)
        made = _MAKERS[name](**options)
        made.model.eval()
        return made

    return make
