"""LoRA-adapted shortcuts: low-rank branches whose input is an earlier activation of the model.

With x the input of a layer, z the input of its FFN sub-layer and z' that of the layer before:

    attention output += s B1 A1 x  (in-attn)  + s B2 A2 z'  (cross-ffn)
    FFN output       += s B3 A3 z  (in-ffn)   + s B4 A4 x   (cross-layer)

`x` and `z` are the residual stream, before the norm in a pre-norm layer, because the frozen part of
an in-layer shortcut is the model's own residual connection. The first layer has no cross-ffn. The
method is HeteroLoRA (arXiv 2406.14956); its code runs a layer's norm a second time where a
cross-layer shortcut ends, so that a fresh model differs from the pretrained one. Here the branch
ends before the existing norm, and with B = 0 nothing changes. So it does in Gemma 2 and 3, which
normalise what a sub-layer returns before the residual connection adds it: the norm scales a
shortcut together with the sub-layer's own output.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from heterolora.checked import is_integer, is_number
from heterolora.errors import ShortcutError
from heterolora.fusion.fuse import fuse, fusion_of, unfuse
from heterolora.fusion.modules import entries, parent_of_all
from heterolora.shortcuts.attachments import Attachment, Shortcut, ShortcutCandidate
from heterolora.shortcuts.sources import FFN, LAYER, Sources, Stack
from heterolora.shortcuts.structure import LayerParts, find_layers, layer_name, read_mapping, width

__all__ = [
    "KINDS",
    "MAX_RANK",
    "Shortcuts",
    "add_shortcuts",
    "candidates",
    "install",
    "remove_shortcuts",
    "shortcut_candidates",
]

KINDS = ("in-attn", "in-ffn", "cross-ffn", "cross-layer")

# Far above any useful rank: it exists to tell a typing error or a corrupt file from a choice.
MAX_RANK = 65_536


class Shortcuts(nn.Module):
    """All shortcuts of one model; a child of the model, so that its parameters are the model's."""

    def __init__(self, stacks: list[list[LayerParts]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        self.stacks = stacks
        self.attachments: dict[str, Attachment] = {}
        self._sources: Sources | None = None

    def __iter__(self) -> Iterator[Shortcut]:
        yield from self.branches  # type: ignore[misc]

    @staticmethod
    def of(model: Any) -> "Shortcuts | None":
        """The shortcuts of a model, or None where it has none."""
        return next((m for m in model.children() if isinstance(m, Shortcuts)), None)

    def connect(self, model: Any) -> None:
        """Hook the layers up, anew if they were."""
        self.disconnect()
        base = _base(model)
        read = {shortcut.source for shortcut in self}
        stacks, number = [], 0
        for stack in self.stacks:
            layers, captures = {}, {}
            for parts in stack:
                layers[number] = base.get_submodule(layer_name(base, parts))
                modules = {(number, LAYER): parts.layer_input, (number, FFN): parts.ffn_input}
                for key, name in modules.items():
                    if key in read:
                        captures[key] = base.get_submodule(name)
                number += 1
            carried = frozenset(s.candidate.layer for s in self if s.candidate.kind == "cross-ffn")
            windows = _windows(model, base, stack)
            # Within the layers where it can be: there it is found at once.
            home = windows[-1] if _witness(windows[-1]) is not None else base
            stacks.append(Stack(windows, layers, captures, carried, _witness(home), home))
        self._sources = Sources(stacks)
        by_projection: dict[str, list[Shortcut]] = {}
        for shortcut in self:
            by_projection.setdefault(shortcut.candidate.projection, []).append(shortcut)
        for name, shortcuts in by_projection.items():
            projection = base.get_submodule(name)
            self.attachments[name] = Attachment(projection, shortcuts, self._sources)

    def disconnect(self) -> None:
        """Take every hook off the model; it then runs without shortcuts."""
        if self._sources is not None:
            self._sources.remove()
        for attachment in self.attachments.values():
            attachment.remove()
        self.attachments = {}
        self._sources = None


def add_shortcuts(
    model: nn.Module,
    kinds: Sequence[str] = KINDS,
    rank: int | Mapping[str, int] = 8,
    alpha: float | Mapping[str, float] = 16,
    mapping: Sequence[Mapping[str, str]] | None = None,
) -> tuple[str, ...]:
    """Put LoRA-adapted shortcuts on the layers of a model, in place; B = 0, so nothing changes yet.

    The parameters are children of the model, trainable, and saved by `save_adapter` and, in
    Trainer's checkpoints, by `heterolora.ShortcutCallback`, not by `save_pretrained`. A model that
    is fused stays so: each shortcut is one more branch of the op of its projection. Shortcuts run
    while the adapters are enabled, whichever is active. They cannot be merged: `merge_and_unload`
    and `unload` drop them.

    Args:
        model: a PeftModel with LoRA, or a transformers model with LoRA layers injected, of the
            families BERT, RoBERTa, DistilBERT, OPT, GPT-2, Llama, Qwen, Gemma and Mistral.
        kinds: which of the four, for every layer; see the module's docstring.
        rank: of each shortcut, or ranks by kind or by name "<projection>:<kind>", the name first;
            0, or no entry, for no shortcut.
        alpha: the scale is alpha / rank; likewise.
        mapping: for other models: one dict a layer, in order, with the names of the modules
            `attention_out` and `ffn_out` (linear layers, to whose output shortcuts are added),
            `layer_input` and `ffn_input` (called with the two sources), as in
            `base_model.named_modules()`.

    Returns:
        The names of the new shortcuts.

    Raises:
        ShortcutError: an unknown kind, a senseless rank or alpha, a shortcut that is there
            already, a model without LoRA layers, or one whose layers cannot be read.
    """
    wanted = _checked_kinds(kinds)
    base = _base(model)
    if _witness(base) is None:
        raise ShortcutError(
            f"{type(model).__name__} has no LoRA layers; wrap it first with "
            "peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    stacks = _stacks(base, mapping)
    new = _build(base, candidates(base, stacks, wanted), rank, alpha)
    install(model, stacks, new)
    return tuple(shortcut.name for shortcut in new)


def shortcut_candidates(
    model: nn.Module,
    kinds: Sequence[str] = KINDS,
    mapping: Sequence[Mapping[str, str]] | None = None,
) -> tuple[ShortcutCandidate, ...]:
    """The shortcuts that `add_shortcuts` would put on a model, LoRA layers or not, layer by layer.

    Raises:
        ShortcutError: an unknown kind, or a model whose layers cannot be read.
    """
    base = _base(model)
    return tuple(candidates(base, _stacks(base, mapping), _checked_kinds(kinds)))


def candidates(
    base: nn.Module, stacks: list[list[LayerParts]], kinds: Sequence[str] = KINDS
) -> list[ShortcutCandidate]:
    """The shortcuts of these layers: every kind in each, but no cross-ffn in a stack's first."""
    found, layer = [], 0
    for stack in stacks:
        for position, parts in enumerate(stack):
            for kind in kinds:
                projection = parts.attention_out
                if kind in ("in-ffn", "cross-layer"):
                    projection = parts.ffn_out
                # The residual stream is as wide as what is added to it.
                columns = width(base.get_submodule(projection))
                assert columns is not None
                if kind != "cross-ffn" or position:
                    found.append(ShortcutCandidate(projection, kind, layer, columns))
            layer += 1
    return found


def install(model: Any, stacks: list[list[LayerParts]], new: list[Shortcut]) -> None:
    """Make the shortcuts part of the model, beside those it has.

    Raises:
        ShortcutError: one is there already, or others were made for other layers.
    """
    present = Shortcuts.of(model)
    shortcuts = Shortcuts(stacks) if present is None else present
    if shortcuts.stacks != stacks:
        raise ShortcutError("the shortcuts that are there were made with another mapping")
    names = {shortcut.name for shortcut in shortcuts}
    twice = next((shortcut.name for shortcut in new if shortcut.name in names), None)
    if twice is not None:
        raise ShortcutError(f"{twice} is there already; remove_shortcuts(model) first")
    with _unbound(model):
        shortcuts.branches.extend(new)
        model.low_rank_shortcuts = shortcuts
        shortcuts.connect(model)


def remove_shortcuts(model: nn.Module) -> None:
    """Take all shortcuts off a model, weights included. One without any is left alone."""
    shortcuts = Shortcuts.of(model)
    if shortcuts is not None:
        with _unbound(model):
            shortcuts.disconnect()
            del model.low_rank_shortcuts


@contextmanager
def _unbound(model: nn.Module) -> Iterator[None]:
    """Without the fusion meanwhile, and fused again as it was afterwards."""
    fusion = fusion_of(model)
    unfuse(model)
    try:
        yield
    finally:
        if fusion is not None:
            fuse(model, backend=fusion.how.backend, captured=fusion.how.captured)
            again = fusion_of(model)
            assert again is not None
            again.adopt(fusion)


def _stacks(base: nn.Module, mapping: Sequence[Mapping[str, str]] | None) -> list[list[LayerParts]]:
    return find_layers(base) if mapping is None else read_mapping(base, mapping)


def _build(
    base: nn.Module,
    wanted: Sequence[ShortcutCandidate],
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
) -> list[Shortcut]:
    keys = {key for candidate in wanted for key in (candidate.name, candidate.kind)}
    for label, values in (("rank", rank), ("alpha", alpha)):
        if isinstance(values, Mapping) and (unknown := sorted(values.keys() - keys)):
            raise ShortcutError(
                f"{label}: {unknown[0]!r} is neither a kind that was asked for nor the name of a "
                "shortcut of this model"
            )
    new = []
    for candidate in wanted:
        name = candidate.name
        r = _value(rank, candidate, 0)
        if not is_integer(r, high=MAX_RANK):
            raise ShortcutError(f"{name}: rank {r!r} is not an integer in 0..{MAX_RANK}")
        if r == 0:
            continue
        a = _value(alpha, candidate, None)
        if not is_number(a):
            raise ShortcutError(f"{name}: alpha {a!r} is not a finite number")
        like = next(base.get_submodule(candidate.projection).parameters())
        new.append(Shortcut(candidate, like, r, float(a)))
    if not new:
        raise ShortcutError("no shortcut is left: every rank is 0")
    return new


def _value(given: Any, candidate: ShortcutCandidate, default: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    return given.get(candidate.name, given.get(candidate.kind, default))


def _checked_kinds(kinds: Sequence[str]) -> tuple[str, ...]:
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise ShortcutError(f"kinds must be a list of some of {', '.join(KINDS)}, not {kinds!r}")
    unknown = next((kind for kind in kinds if kind not in KINDS), None)
    if unknown is not None:
        raise ShortcutError(f"unknown kind {unknown!r}; choose of {', '.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in kinds)


def _base(model: Any) -> nn.Module:
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _windows(model: Any, base: nn.Module, stack: list[LayerParts]) -> list[nn.Module]:
    """The modules whose call is a pass through the stack, outermost first."""
    around = parent_of_all(base, [layer_name(base, parts) for parts in stack])
    return list(dict.fromkeys([*entries(model), base.get_submodule(around)]))


def _witness(module: nn.Module) -> Any:
    """The first LoRA layer below a module, which tells whether adapters are enabled, or None."""
    from peft.tuners.lora.layer import LoraLayer

    return next((found for found in module.modules() if isinstance(found, LoraLayer)), None)
