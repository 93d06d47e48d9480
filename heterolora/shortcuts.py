"""LoRA-adapted shortcuts: low-rank branches whose input is an earlier activation of the model.

With x the input of a layer, z the input of its FFN sub-layer and z' that of the layer before:

    attention output += s B1 A1 x  (in-attn)  + s B2 A2 z'  (cross-ffn)
    FFN output       += s B3 A3 z  (in-ffn)   + s B4 A4 x   (cross-layer)

`x` and `z` are the residual stream, before the norm in a pre-norm layer, because the frozen part of
an in-layer shortcut is the model's own residual connection. The first layer has no cross-ffn. The
method is HeteroLoRA (arXiv 2406.14956); its code runs a layer's norm a second time where a
cross-layer shortcut ends, so that a fresh model differs from the pretrained one. Here the branch
ends before the existing norm, and with B = 0 nothing changes.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.errors import ShortcutError
from heterolora.fuse import _entries, fuse, unfuse
from heterolora.kernels import Branch, low_rank_add
from heterolora.sources import FFN, LAYER, Key, Sources, Stack
from heterolora.structure import LayerParts, find_layers, layer_name, read_mapping, width

__all__ = ["KINDS", "Attachment", "Shortcut", "Shortcuts", "add_shortcuts", "remove_shortcuts"]

KINDS = ("in-attn", "in-ffn", "cross-ffn", "cross-layer")

_MAX_RANK = 65536


class Shortcut(nn.Module):
    """One branch s (u A^T) B^T, without bias or dropout.

    Attributes:
        a, b: factors [r, d] and [n, r]; float64 beside float64 weights, else float32.
        scale: alpha / r.
        name: "<name of the projection it adds to>:<kind>".
        source: which activation it reads.
    """

    def __init__(
        self, projection: str, kind: str, number: int, like: Tensor, n: int, rank: int, alpha: float
    ) -> None:
        super().__init__()
        self.projection = projection
        self.kind = kind
        self.name = f"{projection}:{kind}"
        self.source: Key = {
            "in-attn": (number, LAYER),
            "in-ffn": (number, FFN),
            "cross-ffn": (number - 1, FFN),
            "cross-layer": (number, LAYER),
        }[kind]
        self.alpha = alpha
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        # The residual stream is as wide as what is added to it.
        self.a = nn.Parameter(torch.empty(rank, n, dtype=dtype, device=like.device))
        self.b = nn.Parameter(torch.zeros(n, rank, dtype=dtype, device=like.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, u: Tensor) -> Tensor:
        """[..., n] for a source [..., d], as PEFT computes a LoRA branch."""
        u = u.to(self.a.dtype)
        return nn.functional.linear(nn.functional.linear(u, self.a), self.b) * self.scale

    def extra_repr(self) -> str:
        return f"{self.name}, rank={self.rank}, alpha={self.alpha}"


class Attachment:
    """The shortcuts that end at one projection.

    Attributes:
        bound: the projection's own forward adds them, as it is fused.
        backend: of `fuse`, or None in a model that is not fused.
    """

    def __init__(self, shortcuts: list[Shortcut], sources: Sources) -> None:
        self.shortcuts = shortcuts
        self.bound = False
        self.backend: str | None = None
        self._sources = sources

    def branches(self, site: int, x: Tensor) -> list[Branch]:
        """For an op on x [..., k], with the sources of the running pass."""
        if not self._sources.on:
            return []
        return [Branch(site, s.a, s.b, s.scale, u) for s, u in self._with_sources(x)]

    def shapes(self, site: int, x: Tensor) -> list[Branch]:
        """As `branches`, but with sources of no content, for asking what an op would take."""
        rows = x.shape[:-1]
        held = {
            s.source: x.new_empty(()).expand(*rows, s.a.shape[1]) for s in reversed(self.shortcuts)
        }
        return [Branch(site, s.a, s.b, s.scale, held[s.source]) for s in self.shortcuts]

    def add(self, y: Tensor, *, in_place: bool) -> Tensor:
        """The projection's output y [..., n] with the shortcuts added.

        Args:
            in_place: nobody but the caller holds y, so that the op may write into it.
        """
        if not self._sources.on:
            return y
        pairs = self._with_sources(y)
        if self.backend is not None and in_place:
            branches = [Branch(0, s.a, s.b, s.scale, u) for s, u in pairs]
            return low_rank_add([y], pairs[0][1], branches, implementation=self.backend)[0]
        total = y
        for shortcut, u in pairs:
            total = total + shortcut(u)
        return total.to(y.dtype)

    def hook(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """Forward hook of the projection."""
        if self.bound:
            return None
        return self.add(output, in_place=len(module._forward_hooks) == 1)

    def _with_sources(self, rows_like: Tensor) -> list[tuple[Shortcut, Tensor]]:
        rows = rows_like.shape[:-1]
        views: dict[Key, Tensor] = {}
        for shortcut in self.shortcuts:
            u = self._sources.get(shortcut.source, shortcut.name)
            if u.shape[-1] != shortcut.a.shape[1] or math.prod(u.shape[:-1]) != math.prod(rows):
                raise ShortcutError(
                    f"{shortcut.name}: the {shortcut.source[1]} has shape {tuple(u.shape)}, and "
                    f"{math.prod(rows)} rows of {shortcut.a.shape[1]} columns are needed"
                )
            # OPT flattens the rows for its FFN. One view a source: the op reads it once.
            if shortcut.source not in views:
                views[shortcut.source] = u if u.shape[:-1] == rows else u.reshape(*rows, -1)
        return [(shortcut, views[shortcut.source]) for shortcut in self.shortcuts]


class Shortcuts(nn.Module):
    """All shortcuts of one model; a child of the model, so that its parameters are the model's."""

    def __init__(self, stacks: list[list[LayerParts]]) -> None:
        super().__init__()
        self.branches = nn.ModuleList()
        self.stacks = stacks
        self.attachments: dict[str, Attachment] = {}
        self._sources: Sources | None = None
        self._handles: list[RemovableHandle] = []

    def __iter__(self) -> Iterator[Shortcut]:
        yield from self.branches  # type: ignore[misc]

    @staticmethod
    def of(model: Any) -> "Shortcuts | None":
        """Those of a model, or None."""
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
            carried = frozenset(s.source[0] + 1 for s in self if s.kind == "cross-ffn")
            windows = _windows(model, base, stack)
            stacks.append(Stack(windows, layers, captures, carried, _witness(windows[-1])))
        self._sources = Sources(stacks)
        by_projection: dict[str, list[Shortcut]] = {}
        for shortcut in self:
            by_projection.setdefault(shortcut.projection, []).append(shortcut)
        for name, shortcuts in by_projection.items():
            attachment = Attachment(shortcuts, self._sources)
            self.attachments[name] = attachment
            module = base.get_submodule(name)
            self._handles.append(module.register_forward_hook(attachment.hook))

    def disconnect(self) -> None:
        """Take every hook off the model; it then runs without shortcuts."""
        if self._sources is not None:
            self._sources.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
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

    The parameters are children of the model, trainable, and saved by `save_adapter`, not by
    `save_pretrained`. A model that is fused stays so: each shortcut is one more branch of the op of
    its projection. Shortcuts run while the adapters are enabled, whichever is active. They cannot
    be merged: `merge_and_unload` and `unload` drop them.

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
    present = Shortcuts.of(model)
    stacks = find_layers(base) if mapping is None else read_mapping(base, mapping)
    if present is not None and present.stacks != stacks:
        raise ShortcutError("the shortcuts that are there were made with another mapping")
    shortcuts = Shortcuts(stacks) if present is None else present
    new = _build(base, stacks, wanted, rank, alpha, {s.name for s in shortcuts})
    for shortcut in new:
        shortcuts.branches.append(shortcut)
    with _unbound(model):
        model.low_rank_shortcuts = shortcuts
        shortcuts.connect(model)
    return tuple(shortcut.name for shortcut in new)


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
    fusion = model.__dict__.get("_heterolora")
    unfuse(model)
    try:
        yield
    finally:
        if fusion is not None:
            fuse(model, backend=fusion.backend, captured=fusion.captured)


def _build(
    base: nn.Module,
    stacks: list[list[LayerParts]],
    kinds: Sequence[str],
    rank: int | Mapping[str, int],
    alpha: float | Mapping[str, float],
    taken: set[str],
) -> list[Shortcut]:
    new, number = [], 0
    keys = set(kinds)
    for stack in stacks:
        for position, parts in enumerate(stack):
            for kind in kinds:
                projection = parts.ffn_out if kind in ("in-ffn", "cross-layer") else None
                projection = projection or parts.attention_out
                name = f"{projection}:{kind}"
                keys.add(name)
                r = _value("rank", rank, name, kind, 0)
                if isinstance(r, bool) or not isinstance(r, int) or not 0 <= r <= _MAX_RANK:
                    raise ShortcutError(f"{name}: rank {r!r} is not an integer in 0..{_MAX_RANK}")
                if r == 0 or (kind == "cross-ffn" and position == 0):
                    continue
                a = _value("alpha", alpha, name, kind, None)
                if isinstance(a, bool) or not isinstance(a, int | float) or not math.isfinite(a):
                    raise ShortcutError(f"{name}: alpha {a!r} is not a finite number")
                if name in taken:
                    raise ShortcutError(f"{name} is there already; remove_shortcuts(model) first")
                module = base.get_submodule(projection)
                like = next(module.parameters())
                n = width(module)
                assert n is not None
                new.append(Shortcut(projection, kind, number, like, n, r, float(a)))
            number += 1
    for label, values in (("rank", rank), ("alpha", alpha)):
        if isinstance(values, Mapping) and (unknown := sorted(values.keys() - keys)):
            raise ShortcutError(
                f"{label}: {unknown[0]!r} is neither a kind that was asked for nor the name of a "
                "shortcut of this model"
            )
    if not new:
        raise ShortcutError("no shortcut is left: every rank is 0")
    return new


def _value(label: str, given: Any, name: str, kind: str, default: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    return given.get(name, given.get(kind, default))


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
    shared = []
    for names in zip(*(layer_name(base, parts).split(".") for parts in stack), strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    # Of a single layer, the list that it stands in.
    if len(stack) == 1 and shared:
        shared.pop()
    while isinstance(base.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return list(dict.fromkeys([*_entries(model), base.get_submodule(".".join(shared))]))


def _witness(module: nn.Module) -> tuple[str, Any] | None:
    """The first LoRA layer below a module, which tells whether adapters are enabled."""
    from peft.tuners.lora.layer import LoraLayer

    return next(((n, m) for n, m in module.named_modules() if isinstance(m, LoraLayer)), None)
