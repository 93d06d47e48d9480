"""Shortcuts in files, beside the two of a PEFT adapter: one of weights, one of JSON.

`heterolora_shortcuts.json`, schema version 1, has the names of every layer's parts (`stacks`, as
`structure` finds them) and one entry a shortcut: projection, kind, rank, alpha.
`heterolora_shortcuts.safetensors` has `<projection>:<kind>.a` [r, d] and `.b` [d, r] of each.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from heterolora.checked import Fields
from heterolora.errors import AdapterFileError, ShortcutError
from heterolora.shortcuts.attachments import Shortcut, ShortcutCandidate
from heterolora.shortcuts.model import KINDS, MAX_RANK, Shortcuts, candidates, install
from heterolora.shortcuts.structure import LayerParts, read_mapping
from heterolora.tensor_files import check_inside, checked_tensors

__all__ = ["SavedShortcuts", "check_shortcuts", "write_shortcuts"]

SCHEMA_VERSION = 1

_CONFIG = "heterolora_shortcuts.json"
_WEIGHTS = "heterolora_shortcuts.safetensors"
# Of alpha, far above any that is meant.
_MOST = 1e30


def check_shortcuts(shortcuts: Shortcuts | None, *, stock: bool) -> None:
    """Refuse what must not be saved.

    Raises:
        AdapterFileError: a weight is not finite, or, for `stock`, a shortcut carries weight.
    """
    for shortcut in shortcuts or ():
        for label, factor in (("A", shortcut.a), ("B", shortcut.b)):
            if not torch.isfinite(factor).all():
                raise AdapterFileError(
                    f"shortcut {shortcut.name}: {label} holds NaN or infinite values, so nothing "
                    "was saved. Go back to an earlier checkpoint, and train on with a lower "
                    "learning rate."
                )
        if stock and shortcut.b.any():
            raise AdapterFileError(
                f"shortcut {shortcut.name} carries weight, and stock PEFT has no shortcuts: it "
                "would compute something else from these files. They cannot be merged into other "
                "weights either. Save without stock=True and load with heterolora.load_adapter, "
                "or call heterolora.remove_shortcuts(model) and train on without them."
            )


def write_shortcuts(
    shortcuts: Shortcuts | None, folder: Path, *, in_use: bool = False
) -> dict[str, int]:
    """Write both files, or delete those of an earlier save if there is nothing to write.

    Args:
        in_use: leave out the shortcuts that a search has switched off, and cut the others to the
            rank in use, with alpha_i/r_i as before.

    Returns:
        {name of the shortcut: rank written}.

    Raises:
        OSError: as the file system does.
    """
    from safetensors.torch import save_file

    ranks = {s.name: s.in_use if in_use else s.rank for s in shortcuts or ()}
    ranks = {name: rank for name, rank in ranks.items() if rank}
    if shortcuts is None or not ranks:
        for name in (_CONFIG, _WEIGHTS):
            (folder / name).unlink(missing_ok=True)
        return {}
    written = [shortcut for shortcut in shortcuts if shortcut.name in ranks]
    document = {
        "schema_version": SCHEMA_VERSION,
        "stacks": [[asdict(parts) for parts in stack] for stack in shortcuts.stacks],
        "shortcuts": [
            {
                "projection": shortcut.candidate.projection,
                "kind": shortcut.candidate.kind,
                "rank": ranks[shortcut.name],
                "alpha": _alpha(shortcut, ranks[shortcut.name]),
            }
            for shortcut in written
        ],
    }
    tensors = {}
    for shortcut in written:
        rank = ranks[shortcut.name]
        tensors[f"{shortcut.name}.a"] = shortcut.a.detach()[:rank].cpu().contiguous()
        tensors[f"{shortcut.name}.b"] = shortcut.b.detach()[:, :rank].cpu().contiguous()
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    (folder / _CONFIG).write_text(text, encoding="utf-8")
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    return ranks


def _alpha(shortcut: Shortcut, rank: int) -> float:
    # Not by way of the scale at the full rank: a resumed run compares it to the bit.
    return shortcut.alpha if rank == shortcut.rank else shortcut.scale * rank


class SavedShortcuts:
    """The shortcuts of a folder, checked against the model that they are for."""

    def __init__(
        self,
        stacks: list[list[LayerParts]],
        entries: list[tuple[ShortcutCandidate, int, float]],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self._stacks = stacks
        self._entries = entries
        self._tensors = tensors

    @classmethod
    def read(cls, root: Path, base: nn.Module) -> "SavedShortcuts | None":
        """The shortcuts of a folder, or None if it has none.

        Args:
            root: the folder, resolved.
            base: the base model, with LoRA layers in it or not; it is only looked at.

        Raises:
            AdapterFileError: a file is missing, unreadable or a link out of the folder; a key is
                unknown, missing or senseless; a tensor is missing, extra, of the wrong shape or
                dtype, or not finite; or the model has not the layers. The message names file and
                key.
        """
        config, weights = root / _CONFIG, root / _WEIGHTS
        if not any(path.is_file() or path.is_symlink() for path in (config, weights)):
            return None
        for path in (config, weights):
            check_inside(root, path, AdapterFileError)
            if not path.is_file():
                raise AdapterFileError(
                    f"{path}: missing, and the other file of the shortcuts is there. Save again."
                )
        document = Fields.load(config, AdapterFileError)
        document.keys("schema_version", "shortcuts", "stacks")
        document.version(SCHEMA_VERSION)
        stacks = _read_stacks(document, base)
        entries = _read_entries(document, candidates(base, stacks))
        shapes: dict[str, tuple[int, ...]] = {}
        for candidate, rank, _ in entries:
            shapes[f"{candidate.name}.a"] = (rank, candidate.width)
            shapes[f"{candidate.name}.b"] = (candidate.width, rank)
        tensors = checked_tensors(
            weights, shapes, {}, config=_CONFIG, rank_axis=_rank_axis, error=AdapterFileError
        )
        return cls(stacks, entries, dict(tensors))

    def attach(self, model: nn.Module, *, is_trainable: bool) -> None:
        """Put them on the PeftModel around the model that they were checked against."""
        base: Any = model
        base = base.get_base_model()
        new = []
        for candidate, rank, alpha in self._entries:
            like = next(base.get_submodule(candidate.projection).parameters())
            shortcut = Shortcut(candidate, like, rank, alpha).requires_grad_(is_trainable)
            self._fill(shortcut)
            new.append(shortcut)
        install(model, self._stacks, new)

    def restore(self, shortcuts: Shortcuts) -> None:
        """Copy the weights into the shortcuts of a model, as when a run is resumed.

        Raises:
            AdapterFileError: the model has other shortcuts, ranks or scales, or one of its
                shortcuts is parametrised; it is as it was then.
        """
        saved = {candidate.name: (rank, alpha) for candidate, rank, alpha in self._entries}
        own = {shortcut.name: (shortcut.rank, shortcut.alpha) for shortcut in shortcuts}
        differs = next((n for n in {**own, **saved} if own.get(n) != saved.get(n)), None)
        if differs is not None:
            raise AdapterFileError(
                f"shortcut {differs} has rank and alpha {saved.get(differs)} in the file and "
                f"{own.get(differs)} in the model; build the model as it was when it was saved"
            )
        for shortcut in shortcuts:
            if is_parametrized(shortcut):
                raise AdapterFileError(
                    f"shortcut {shortcut.name} is parametrised, and the file holds what that came "
                    "to, from which it cannot go on; add the parametrization after loading"
                )
        for shortcut in shortcuts:
            self._fill(shortcut)

    def _fill(self, shortcut: Shortcut) -> None:
        with torch.no_grad():
            shortcut.a.copy_(self._tensors[f"{shortcut.name}.a"])
            shortcut.b.copy_(self._tensors[f"{shortcut.name}.b"])


def _read_entries(
    document: Fields, known: list[ShortcutCandidate]
) -> list[tuple[ShortcutCandidate, int, float]]:
    by_name = {candidate.name: candidate for candidate in known}
    found: dict[str, tuple[ShortcutCandidate, int, float]] = {}
    for entry in document.entries("shortcuts", Fields.fields):
        entry.keys("alpha", "kind", "projection", "rank")
        projection, kind = entry.text("projection"), entry.choice("kind", KINDS)
        name = f"{projection}:{kind}"
        if name not in by_name:
            entry.fail("projection", f"is {projection!r:.80}, where no {kind} of these layers ends")
        if name in found:
            entry.fail("projection", f"is there twice: {name}")
        rank, alpha = entry.integer("rank", 1, MAX_RANK), entry.number("alpha", -_MOST, _MOST)
        found[name] = by_name[name], rank, alpha
    if not found:
        document.fail("shortcuts", "is empty; save again")
    return list(found.values())


def _read_stacks(document: Fields, base: nn.Module) -> list[list[LayerParts]]:
    given = document.entries("stacks", Fields.value)
    if not given:
        document.fail("stacks", "is empty; save again")
    try:
        return [stack for layers in given for stack in read_mapping(base, layers)]
    except ShortcutError as exc:
        document.fail("stacks", f"do not fit {type(base).__name__}: {exc}")


def _rank_axis(name: str) -> int:
    """The rank is the number of rows of A and of columns of B."""
    return 0 if name.endswith(".a") else 1
