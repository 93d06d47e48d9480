"""Mixed-rank LoRA: search where the rank goes, and train it with fused kernels.

Importing this package costs nothing: what a name needs (torch, transformers, peft) is loaded when
the name is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heterolora import errors, kernels
    from heterolora.files.adapters import load_adapter, save_adapter
    from heterolora.fusion.fuse import FuseReport, fuse, unfuse
    from heterolora.search import Allocation, Budget, SearchSpace, Variant, adapt, allocate
    from heterolora.search.dynamic.callback import DynamicSearchCallback
    from heterolora.shortcuts.checkpoints import ShortcutCallback
    from heterolora.shortcuts.model import add_shortcuts, remove_shortcuts
    from heterolora.train.callbacks import FuseCallback
    from heterolora.train.trainers import GraphedTrainer

__version__ = "0.1.0"

__all__ = [
    "Allocation",
    "Budget",
    "DynamicSearchCallback",
    "FuseCallback",
    "FuseReport",
    "GraphedTrainer",
    "SearchSpace",
    "ShortcutCallback",
    "Variant",
    "adapt",
    "add_shortcuts",
    "allocate",
    "errors",
    "fuse",
    "kernels",
    "load_adapter",
    "remove_shortcuts",
    "save_adapter",
    "unfuse",
]

# Where each name lies; a module lies in itself.
_HOME = {
    "Allocation": "search",
    "Budget": "search",
    "DynamicSearchCallback": "search.dynamic.callback",
    "FuseCallback": "train.callbacks",
    "FuseReport": "fusion.fuse",
    "GraphedTrainer": "train.trainers",
    "SearchSpace": "search",
    "ShortcutCallback": "shortcuts.checkpoints",
    "Variant": "search",
    "adapt": "search",
    "add_shortcuts": "shortcuts.model",
    "allocate": "search",
    "errors": "errors",
    "fuse": "fusion.fuse",
    "kernels": "kernels",
    "load_adapter": "files.adapters",
    "remove_shortcuts": "shortcuts.model",
    "save_adapter": "files.adapters",
    "unfuse": "fusion.fuse",
}


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    return module if home == name else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
