"""Where the modules of a model stand to each other."""

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["entries", "parent_of_all"]


def entries(model: Any) -> list[nn.Module]:
    """The modules a forward pass can start at, outermost first; the last one is the base model."""
    if not hasattr(model, "get_base_model"):
        return [model]
    # A PeftModel's forward calls the tuner, its generate() calls the base model directly.
    return list(dict.fromkeys([model, model.base_model, model.get_base_model()]))


def parent_of_all(root: nn.Module, names: Iterable[str]) -> str:
    """The name of the innermost module that holds all named ones and has calls of its own.

    A bare list or dict of modules is never called, so hooks on it would never run.
    """
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while isinstance(root.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict):
        shared.pop()
    return ".".join(shared)
