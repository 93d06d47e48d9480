"""Shortcuts in files, beside the two of a PEFT adapter: one of weights, one of JSON.

`heterolora_shortcuts.json`, schema version 1, has the names of every layer's parts (`stacks`, as
`structure` finds them) and one entry a shortcut: projection, kind, rank, alpha.
`heterolora_shortcuts.safetensors` has `<projection>:<kind>.a` [r, d] and `.b` [d, r] of each.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.errors import AdapterFileError, ShortcutError
from heterolora.shortcuts.attachments import Shortcut, ShortcutCandidate
from heterolora.shortcuts.model import KINDS, MAX_RANK, Shortcuts, candidates, install
from heterolora.shortcuts.structure import LayerParts, read_mapping

__all__ = ["SavedShortcuts", "check_inside", "check_shortcuts", "write_shortcuts"]

SCHEMA_VERSION = 1

_CONFIG = "heterolora_shortcuts.json"
_WEIGHTS = "heterolora_shortcuts.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_KEYS = ("schema_version", "shortcuts", "stacks")
_ENTRY_KEYS = ("alpha", "kind", "projection", "rank")


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
        """Those of a folder, or None if it has none.

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
            check_inside(root, path)
            if not path.is_file():
                raise AdapterFileError(
                    f"{path}: missing, and the other file of the shortcuts is there. Save again."
                )
        reader = _Reader(config)
        stacks = reader.stacks(base)
        entries = reader.entries(candidates(base, stacks))
        return cls(stacks, entries, _read_tensors(weights, entries))

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
            AdapterFileError: the model has other shortcuts, ranks or scales; it is as it was then.
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
            self._fill(shortcut)

    def _fill(self, shortcut: Shortcut) -> None:
        with torch.no_grad():
            shortcut.a.copy_(self._tensors[f"{shortcut.name}.a"])
            shortcut.b.copy_(self._tensors[f"{shortcut.name}.b"])


class _Reader:
    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise AdapterFileError(f"{file}: not readable as JSON ({exc}). Save it again.") from exc
        self.document = self._object("the file", document, _KEYS)
        version = self.document["schema_version"]
        if isinstance(version, bool) or not isinstance(version, int) or version < 1:
            raise self._error("schema_version", f"is {version!r:.80}, not a whole number above 0")
        if version > SCHEMA_VERSION:
            raise self._error(
                "schema_version",
                f"is {version}, and this heterolora reads up to {SCHEMA_VERSION}; upgrade it",
            )

    def stacks(self, base: nn.Module) -> list[list[LayerParts]]:
        given = self.document["stacks"]
        if not isinstance(given, list) or not given:
            raise self._error("stacks", "must be a list of lists of layers")
        try:
            return [stack for layers in given for stack in read_mapping(base, layers)]
        except ShortcutError as exc:
            raise self._error("stacks", f"do not fit {type(base).__name__}: {exc}") from exc

    def entries(self, known: list[ShortcutCandidate]) -> list[tuple[ShortcutCandidate, int, float]]:
        given = self.document["shortcuts"]
        if not isinstance(given, list) or not given:
            raise self._error("shortcuts", "must be a list of shortcuts")
        by_name = {candidate.name: candidate for candidate in known}
        found, seen = [], set()
        for index, value in enumerate(given):
            key = f"shortcuts[{index}]"
            entry = self._object(key, value, _ENTRY_KEYS)
            if entry["kind"] not in KINDS:
                raise self._error(key, f"has kind {entry['kind']!r:.80}, none of {list(KINDS)}")
            candidate = by_name.get(f"{entry['projection']}:{entry['kind']}")
            if candidate is None:
                raise self._error(
                    key, f"is no shortcut of these layers: {entry['projection']!r:.80}"
                )
            if candidate.name in seen:
                raise self._error(key, f"is there twice: {candidate.name}")
            seen.add(candidate.name)
            rank, alpha = entry["rank"], entry["alpha"]
            if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
                raise self._error(f"{key}.rank", f"is {rank!r:.80}, not in 1..{MAX_RANK}")
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number or not abs(alpha) <= 1e30 or not math.isfinite(alpha):
                raise self._error(f"{key}.alpha", f"is {alpha!r:.80}, not a finite number")
            found.append((candidate, rank, float(alpha)))
        return found

    def _object(self, key: str, value: Any, keys: tuple[str, ...]) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._error(key, "must be a JSON object")
        if missing := sorted(set(keys) - value.keys()):
            raise self._error(key, f"lacks {missing[0]!r}")
        if extra := sorted(value.keys() - set(keys)):
            raise self._error(key, f"has {extra[0]!r:.80}, which is not a key of it")
        return value

    def _error(self, key: str, problem: str) -> AdapterFileError:
        return AdapterFileError(f"{self.file}: {key} {problem}")


def check_inside(root: Path, path: Path) -> None:
    """Refuse a link out of an adapter's folder.

    Raises:
        AdapterFileError: it is one, and not into the blobs of a Hugging Face cache.
    """
    real = path.resolve()
    # The Hugging Face cache keeps files in blobs/; snapshots/<revision>/ links to them.
    cached = root.parent.name == "snapshots" and real.is_relative_to(root.parents[1] / "blobs")
    if not real.is_relative_to(root) and not cached:
        raise AdapterFileError(
            f"{path}: a link out of the folder, to {real}. Copy the file itself here."
        )


def _read_tensors(
    file: Path, entries: list[tuple[ShortcutCandidate, int, float]]
) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    expected = {}
    for candidate, rank, _ in entries:
        expected[f"{candidate.name}.a"] = [rank, candidate.width]
        expected[f"{candidate.name}.b"] = [candidate.width, rank]
    tensors = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as saved:
            keys = set(saved.keys())
            if missing := sorted(expected.keys() - keys):
                raise AdapterFileError(
                    f"{file}: {missing[0]} is missing ({len(missing)} in all). Use the two files "
                    "of the same save."
                )
            if extra := sorted(keys - expected.keys()):
                raise AdapterFileError(
                    f"{file}: {extra[0]} belongs to no shortcut of {_CONFIG} ({len(extra)} in "
                    "all). Use the two files of the same save."
                )
            for key, shape in expected.items():
                head = saved.get_slice(key)
                if head.get_shape() != shape:
                    raise AdapterFileError(
                        f"{file}: {key} has shape {head.get_shape()}, and this model and {_CONFIG} "
                        f"need {shape}."
                    )
                if head.get_dtype() not in _FLOATS:
                    raise AdapterFileError(
                        f"{file}: {key} has dtype {head.get_dtype()}, which is none of "
                        f"{', '.join(_FLOATS)}."
                    )
                tensors[key] = saved.get_tensor(key)
                if not torch.isfinite(tensors[key]).all():
                    raise AdapterFileError(
                        f"{file}: {key} holds NaN or infinite values. Load an earlier checkpoint."
                    )
    except (SafetensorError, OSError) as exc:
        raise AdapterFileError(
            f"{file}: not readable as safetensors ({exc}). It is cut short, or a renamed pickle; "
            "save the adapter again."
        ) from exc
    return tensors
