"""Adapters whose factors are computed (`torch.nn.utils.parametrize`), as the plain ones they equal.

A parametrised factor is stored by what it is computed from, under names of its own, which neither
PEFT nor `load_adapter` can read. What it comes to is an ordinary factor, so that is what is saved.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from heterolora.errors import AdapterFileError

__all__ = ["baked_state"]

_COPIES = "modules_to_save"


def baked_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of a model with every parametrised factor of its adapters as it comes out.

    Each stands under the name that it would have without its parametrization, with its value in
    evaluation mode.

    Args:
        model: a PeftModel, which is not changed.

    Returns:
        None if no tensor of an adapter is parametrised.

    Raises:
        AdapterFileError: a parametrised tensor is not that of a linear factor, has not the shape
            that PEFT gives it, or comes out differently each time.
    """
    found = list(_parametrised(model))
    if not found:
        return None
    state = model.state_dict()
    for name, module, label in found:
        value = _value(name, module, label)
        for key in [key for key in state if key.startswith(f"{name}.parametrizations.{label}.")]:
            del state[key]
        state[f"{name}.{label}"] = value
    return state


def _parametrised(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Parametrised tensors of adapters: name of the module, the module, name of the tensor in it.

    A copy in `modules_to_save` of a module that was parametrised before PEFT came is passed over:
    whoever loads it has the same names.
    """
    for name, module in model.named_modules():
        parts = name.split(".")
        ours = any(part.startswith("lora_") for part in parts)
        if not parametrize.is_parametrized(module) or not (ours or _COPIES in parts):
            continue
        if not ours:
            place = parts.index(_COPIES)
            original = [*parts[:place], "original_module", *parts[place + 2 :]]
            if parametrize.is_parametrized(model.get_submodule(".".join(original))):
                continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        yield from ((name, module, label) for label in module.parametrizations)


def _value(name: str, module: nn.Module, label: str) -> Tensor:
    assert isinstance(module.parametrizations, nn.ModuleDict)
    with torch.no_grad(), _evaluating(module.parametrizations[label]):
        value, again = (getattr(module, label).clone() for _ in range(2))
    problem = None
    if not isinstance(module, nn.Linear) or _COPIES in name.split("."):
        problem = "is no factor of a linear layer"
    elif (shape := list(value.shape)) != [module.out_features, module.in_features]:
        problem = f"has shape {shape}, and not [{module.out_features}, {module.in_features}]"
    elif torch.isfinite(value).all() and not torch.equal(value, again):
        problem = "comes out differently each time"
    if problem is not None:
        raise AdapterFileError(
            f"{name}.{label} is parametrised and {problem}, so it cannot be saved as a plain "
            "tensor, and nothing was saved. Take the parametrization off first: "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {label!r})."
        )
    return value


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for the duration: some parametrizations change their buffers in training."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
