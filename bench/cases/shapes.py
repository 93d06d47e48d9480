"""The sizes that cases are made of: models from their published configs, their layers, groups."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from heterolora.bench.cases import reviews, workloads
from heterolora.bench.harness.steps import Workload

__all__ = ["GROUPS", "LAYERS", "MODELS", "OPERATIONS", "TRAINED", "Operations", "Shape"]


@dataclass(frozen=True)
class Shape:
    """A model of some size and a batch.

    Attributes:
        name: with the batch, as in "minilm-16x64".
        builder: (dtype, device, sizes) -> workload.
        sizes: keyword arguments of `builder`.
        quick: a check of the bench, not a result.
        scored: whether there is a scoring case of it.
    """

    name: str
    what: str
    builder: Callable[..., Workload]
    sizes: Mapping[str, int]
    quick: bool = False
    scored: bool = False

    @property
    def batch(self) -> str:
        return f"{self.sizes['batch']}x{self.sizes['length']} tokens"

    @property
    def flops(self) -> float:
        """Of a frozen forward and dX over its adapted linears."""
        sizes = self.sizes
        hidden, ffn, heads = sizes["hidden"], sizes["ffn"], sizes.get("heads", 1)
        gated = "kv_heads" in sizes
        kv = hidden * sizes.get("kv_heads", heads) // heads
        weights = 2 * hidden * (hidden + kv) + (3 if gated else 2) * hidden * ffn
        return 4.0 * sizes["batch"] * sizes["length"] * sizes["layers"] * weights


def _shape(
    name: str,
    what: str,
    builder: Callable[..., Workload],
    *sizes: Mapping[str, int],
    batch: int,
    length: int,
    quick: bool = False,
    scored: bool = False,
) -> Shape:
    merged = {key: value for part in sizes for key, value in part.items()}
    merged |= {"batch": batch, "length": length}
    return Shape(f"{name}-{batch}x{length}", what, builder, merged, quick, scored)


_TINY = {"layers": 2, "hidden": 64, "ffn": 256, "heads": 2}
_MINILM = {"layers": 6, "hidden": 384, "ffn": 1536}
_LLAMA_SMALL = {"layers": 12, "hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3}
_ROBERTA = {"layers": 24, "hidden": 1024, "ffn": 4096, "heads": 16}
_OPT = {"layers": 24, "hidden": 1024, "embedding": 512, "ffn": 4096, "heads": 16}
_LLAMA_1B = {"layers": 16, "hidden": 2048, "ffn": 8192, "heads": 32, "kv_heads": 8}
_LLAMA_8B = {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
_ONE = {"layers": 1}

MODELS = [
    _shape(
        "tiny", "2-layer BERT, hidden 64", workloads.bert, _TINY,
        batch=4, length=16, quick=True, scored=True,
    ),
    _shape(
        "minilm", "MiniLM-L6 shapes", workloads.bert, _MINILM, {"heads": 12},
        batch=16, length=64, scored=True,
    ),
    _shape(
        "llama", "12-layer Llama, hidden 576", workloads.llama, _LLAMA_SMALL,
        batch=8, length=64, scored=True,
    ),
    _shape(
        "linears", "the linears of MiniLM-L6 without attention", workloads.linear_stack, _MINILM,
        batch=16, length=64,
    ),
    _shape(
        "roberta-large", "RoBERTa-large shapes", workloads.roberta, _ROBERTA, batch=2, length=128
    ),
    _shape("opt-350m", "OPT-350M shapes", workloads.opt, _OPT, batch=2, length=128),
    _shape(
        "roberta-large", "RoBERTa-large shapes", workloads.roberta, _ROBERTA, batch=16, length=512
    ),
    _shape("opt-350m", "OPT-350M shapes", workloads.opt, _OPT, batch=16, length=512),
    _shape(
        "llama-1b", "Llama-3.2-1B shapes", workloads.llama, _LLAMA_1B,
        batch=8, length=1024, scored=True,
    ),
    _shape("llama-8b", "Llama-3.1-8B shapes", workloads.llama, _LLAMA_8B, batch=4, length=1024),
]  # fmt: skip

# Trained on real text, so that their builders also bring rows.
TRAINED = [
    _shape(
        "tiny", "2-layer BERT, hidden 64", reviews.classifier, _TINY,
        batch=4, length=16, quick=True,
    ),
    _shape("minilm", "MiniLM-L6", reviews.minilm, _MINILM, {"heads": 12}, batch=32, length=32),
    # As `heterolora train` makes batches; a library that compiles for each size has much to do.
    _shape(
        "minilm-lengths", "MiniLM-L6, batches as long as their longest row",
        partial(reviews.minilm, padded=False), _MINILM, {"heads": 12}, batch=32, length=64,
    ),
    _shape(
        "llama-1b", "Llama-3.2-1B shapes", reviews.language, _LLAMA_1B, batch=8, length=1024
    ),
]  # fmt: skip


def _alone(builder: Callable[..., Workload]) -> Callable[..., Workload]:
    """A layer whose input needs a gradient in every variant, as inside its model."""

    def build(*, dtype: torch.dtype, device: torch.device, **sizes: int) -> Workload:
        load = builder(dtype=dtype, device=device, **sizes)
        return replace(load, inputs=load.floor_inputs)

    return build


LAYERS = [
    _shape(f"{name}-layer", f"one layer of {what}", _alone(builder), sizes, _ONE,
           batch=batch, length=length)
    for batch, length in ((2, 128), (16, 512))
    for name, what, builder, sizes in (
        ("minilm", "MiniLM-L6", workloads.bert, {**_MINILM, "heads": 12}),
        ("roberta-large", "RoBERTa-large", workloads.roberta, _ROBERTA),
        ("opt-350m", "OPT-350M", workloads.opt, _OPT),
        ("llama-1b", "Llama-3.2-1B", workloads.llama, _LLAMA_1B),
        ("llama-8b", "Llama-3.1-8B", workloads.llama, _LLAMA_8B),
    )
]  # fmt: skip


@dataclass(frozen=True)
class Operations:
    """The grid of single linears.

    Attributes:
        shapes: (in_features, out_features): square ones, then k and v of grouped-query attention
            and an MLP up and down, of Llama-3.1-8B.
        tokens: rows of the input.
        varied: (in_features, out_features, tokens) at which ranks, dropout and shortcuts vary.
        ranks: allocations there; r16 everywhere else.
        small: (features, tokens) of square linears so small that calls cost more than their work.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    varied: frozenset[tuple[int, int, int]]
    ranks: tuple[str, ...]
    small: tuple[tuple[int, int], ...]


OPERATIONS = Operations(
    shapes=(
        *((d, d) for d in (768, 1024, 2048, 4096, 8192)),
        (4096, 1024),
        (4096, 14336),
        (14336, 4096),
    ),
    tokens=(256, 1024, 4096, 8192, 16384),
    varied=frozenset({(1024, 1024, 1024), (2048, 2048, 8192), (4096, 4096, 8192)}),
    ranks=("r8", "r16", "r64", "r128", "mixed16", "sparse16"),
    small=((128, 32), (384, 64), (384, 256), (768, 64), (1024, 64)),
)

# in_features, and out_features by name.
GROUPS: dict[str, tuple[int, dict[str, int]]] = {
    **{
        f"qkv-{d}": (d, dict.fromkeys(("q_proj", "k_proj", "v_proj"), d))
        for d in (384, 768, 1024, 2048, 4096)
    },
    "qkv-4096-gqa": (4096, {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}),
    "gate-up-2048": (2048, {"gate_proj": 8192, "up_proj": 8192}),
    "gate-up-4096": (4096, {"gate_proj": 14336, "up_proj": 14336}),
}
