"""A tiny BERT or Llama folder and a tiny review file, made in a second, no download."""

import json
import random
from pathlib import Path

GOOD = ("good", "great", "fine", "lovely", "superb", "warm")
BAD = ("bad", "awful", "dull", "poor", "weak", "cold")
FILLER = ("the", "film", "a", "story", "actor", "scene", "plot", "was", "is", "very", "and")


def save_model(folder: Path, kind: str = "bert", *, layers: int = 2, dropout: float = 0.0) -> Path:
    """A model of hidden size 32 with random weights of a fixed seed, and its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *GOOD, *BAD, *FILLER]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    if kind == "bert":
        raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        tokens = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        config = BertConfig(
            **sizes,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            pad_token_id=0,
        )
        model = BertForSequenceClassification(config).bert
    else:
        tokens = {"eos_token": "</s>"}
        model = LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=4, bos_token_id=None))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", model_max_length=64, **tokens
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reviews(rows: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows whose label says which of two word lists they draw from."""
    draw = random.Random(seed)
    table = []
    for row in range(rows):
        label = ("neg", "pos")[row % 2]
        opinion = draw.choices((BAD, GOOD)[row % 2], k=4)
        words = [*draw.choices(FILLER, k=draw.randint(1, 4)), *opinion]
        table.append({"text": " ".join(words), "label": label})
    return table


def save_reviews(path: Path, rows: int = 64, seed: int = 0) -> Path:
    """`reviews` as jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in reviews(rows, seed)))
    return path
