"""Where the parts of a transformer layer are that a shortcut reads from and adds to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from heterolora.errors import ShortcutError
from heterolora.fusion.modules import parent_of_all

__all__ = ["LayerParts", "find_layers", "layer_name", "read_mapping", "width"]


@dataclass(frozen=True)
class LayerParts:
    """Module names, from the base model's root, of one transformer layer.

    Attributes:
        attention_out: the linear layer that ends the attention sub-layer, but for a norm (Gemma 2
            and 3), which then has a shortcut in its input.
        ffn_out: the linear layer that ends the FFN sub-layer; likewise.
        layer_input: a module that is called with the layer's input [..., d]: the norm before the
            attention in a pre-norm layer, the attention itself in a post-norm one.
        ffn_input: a module that is called with the input of the FFN sub-layer [..., d], which its
            residual connection carries as well: the norm before the FFN in a pre-norm layer, the
            first module of the FFN in a post-norm one.
    """

    attention_out: str
    ffn_out: str
    layer_input: str
    ffn_input: str

    def below(self, prefix: str) -> LayerParts:
        """The same parts, by their names from the module that has the layer as `prefix`."""
        return LayerParts(*(f"{prefix}.{name}" for name in asdict(self).values()))


def _opt(layer: Any) -> LayerParts:
    if layer.do_layer_norm_before:
        return LayerParts("self_attn.out_proj", "fc2", "self_attn_layer_norm", "final_layer_norm")
    return LayerParts("self_attn.out_proj", "fc2", "self_attn", "fc1")


# What a layer of each family has, and its parts. Of several that fit, the first counts.
_FAMILIES: tuple[tuple[tuple[str, ...], Callable[[Any], LayerParts]], ...] = (
    # OPT: 350M is post-norm, the other sizes are pre-norm.
    (("self_attn.out_proj", "fc1", "fc2", "do_layer_norm_before"), _opt),
    # BERT, RoBERTa and their kin. Where the norms stand inside of the two modules (pre-norm
    # RoBERTa), these are still called with the residual stream.
    (
        ("attention.output.dense", "intermediate.dense", "output.dense"),
        lambda _: LayerParts("attention.output.dense", "output.dense", "attention", "intermediate"),
    ),
    # DistilBERT.
    (
        ("attention.out_lin", "sa_layer_norm", "ffn.lin2"),
        lambda _: LayerParts("attention.out_lin", "ffn.lin2", "attention", "ffn"),
    ),
    # GPT-2.
    (
        ("ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"),
        lambda _: LayerParts("attn.c_proj", "mlp.c_proj", "ln_1", "ln_2"),
    ),
    # Gemma 2 and 3: `post_attention_layernorm` normalises what the attention returns.
    (
        ("input_layernorm", "self_attn.o_proj", "pre_feedforward_layernorm", "mlp.down_proj"),
        lambda _: LayerParts(
            "self_attn.o_proj", "mlp.down_proj", "input_layernorm", "pre_feedforward_layernorm"
        ),
    ),
    # Llama, Qwen, Gemma, Mistral.
    (
        ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj"),
        lambda _: LayerParts(
            "self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"
        ),
    ),
)

_ADVICE = (
    "pass mapping=[...] with one dict a layer, which names attention_out, ffn_out, layer_input "
    "and ffn_input"
)


def find_layers(base: nn.Module) -> list[list[LayerParts]]:
    """The transformer layers of a model, in order, one list for each stack of them.

    Args:
        base: a transformers model, with or without LoRA layers in it.

    Raises:
        ShortcutError: no layer, or not every layer of a stack, is of a family known here; the
            message names the module.
    """
    stacks, unread = [], []
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        # A layer that stands there twice is one layer that runs twice.
        first: dict[nn.Module, int] = {}
        for index, layer in enumerate(module):
            first.setdefault(layer, index)
        found = {f"{name}.{index}": _parts(layer) for layer, index in first.items()}
        stack = [parts.below(prefix) for prefix, parts in found.items() if parts is not None]
        missing = next((prefix for prefix, parts in found.items() if parts is None), None)
        if missing is not None:
            unread.append(missing)
        if stack and missing is not None:
            raise ShortcutError(
                f"{missing} ({_kind(base, missing)}) is no layer that shortcuts can read, while "
                f"others of its stack are; {_ADVICE}"
            )
        if stack:
            stacks.append(stack)
    if not stacks:
        example = f"{unread[0]} ({_kind(base, unread[0])})" if unread else "no list of layers"
        raise ShortcutError(
            f"cannot read the layers of {type(base).__name__} for shortcuts: found {example}; "
            f"{_ADVICE}"
        )
    for parts in (parts for stack in stacks for parts in stack):
        _check(base, parts)
    return stacks


def read_mapping(
    base: nn.Module, mapping: Sequence[Mapping[str, str] | LayerParts]
) -> list[list[LayerParts]]:
    """One stack of layers as the caller names them, first layer first.

    Raises:
        ShortcutError: not a sequence of dicts with the four names, or a name of no such module.
    """
    keys = [field.name for field in fields(LayerParts)]
    if isinstance(mapping, str | Mapping) or not isinstance(mapping, Sequence) or not mapping:
        raise ShortcutError(f"mapping must be a list with one dict of {', '.join(keys)} a layer")
    stack = []
    for index, entry in enumerate(mapping):
        if isinstance(entry, LayerParts):
            entry = asdict(entry)
        if not isinstance(entry, Mapping) or sorted(entry) != sorted(keys):
            raise ShortcutError(f"mapping[{index}] must be a dict of exactly {', '.join(keys)}")
        if not all(isinstance(name, str) and name for name in entry.values()):
            raise ShortcutError(f"mapping[{index}]: the values must be module names")
        parts = LayerParts(**entry)
        _check(base, parts)
        stack.append(parts)
    taken = [name for parts in stack for name in (parts.attention_out, parts.ffn_out)]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise ShortcutError(f"mapping names {twice} as an output projection twice")
    return [stack]


def width(module: nn.Module) -> int | None:
    """Columns that a linear layer, LoRA or not, returns; None for another module."""
    from peft.tuners.lora.layer import LoraLayer
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nf)
    if isinstance(module, nn.Linear | LoraLayer):
        return int(module.out_features)
    return None


def layer_name(base: nn.Module, parts: LayerParts) -> str:
    """The name of the innermost module around all parts of a layer, but no bare container."""
    return parent_of_all(base, asdict(parts).values())


def _parts(layer: nn.Module) -> LayerParts | None:
    for names, parts in _FAMILIES:
        if all(_has(layer, name) for name in names):
            found = parts(layer)
            return found if all(_has(layer, name) for name in asdict(found).values()) else None
    return None


def _has(layer: Any, name: str) -> bool:
    for part in name.split("."):
        layer = getattr(layer, part, None)
    return layer is not None


def _check(base: nn.Module, parts: LayerParts) -> None:
    for role, name in asdict(parts).items():
        try:
            module = base.get_submodule(name)
        except AttributeError:
            raise ShortcutError(
                f"{role}: {type(base).__name__} has no module {name!r}; name modules as in "
                "base_model.named_modules()"
            ) from None
        if role in ("attention_out", "ffn_out") and width(module) is None:
            raise ShortcutError(
                f"{role}: {name} is a {type(module).__name__}, and a shortcut adds to a linear "
                f"layer; {_ADVICE}"
            )
    name = layer_name(base, parts)
    if getattr(base.get_submodule(name), "chunk_size_feed_forward", 0):
        raise ShortcutError(
            f"{name} runs its FFN in chunks, which a shortcut's source would not fit; set "
            "chunk_size_feed_forward to 0"
        )


def _kind(base: nn.Module, name: str) -> str:
    return type(base.get_submodule(name)).__name__
