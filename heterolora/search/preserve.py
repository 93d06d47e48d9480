"""Leave a model and the random generators exactly as they were found."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from heterolora.errors import ModelError

__all__ = ["buffers_kept", "preserved", "seeded"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put `model` back on exit, also after an exception or Ctrl-C.

    Restored: the module tree (same objects, same order), every attribute of every module and of its
    `config`, hooks, modes, `requires_grad`, `.grad` (the same tensors) and the content of buffers.
    Parameters are not copied, since nothing done to a frozen model writes to them; that is checked.

    Raises:
        ModelError: `torch.inference_mode` is on or the model was created under it, or a parameter
            was written to by the model's own forward pass (an embedding with `max_norm`).
    """
    if torch.is_inference_mode_enabled():
        raise ModelError("torch.inference_mode is on, and scoring needs autograd; leave it first")
    parameters = [
        (name, p, p.requires_grad, p.grad, p._version)
        for name, p in model.named_parameters()
        if not _refuse_inference(name, p)
    ]
    owners: list[tuple[Any, type]] = []
    seen: set[int] = set()
    for module in list(model.modules()):
        configs = (module.__dict__.get(key) for key in ("config", "generation_config"))
        for owner in (module, *configs):
            if owner is not None and hasattr(owner, "__dict__") and id(owner) not in seen:
                seen.add(id(owner))
                owners.append((owner, type(owner)))
    attributes = [(owner, cls, _copy_attributes(owner.__dict__)) for owner, cls in owners]
    with buffers_kept(model):
        try:
            yield
        finally:
            for owner, cls, saved in attributes:
                _restore_attributes(owner.__dict__, saved)
                if type(owner) is not cls:
                    owner.__class__ = cls
            for _, parameter, requires_grad, gradient, _ in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = gradient
    for name, parameter, _, _, version in parameters:
        if parameter._version != version:
            raise ModelError(
                f"the forward pass of {type(model).__name__} writes to its own parameter {name!r}, "
                "so scoring changed it; make it a buffer or turn that off (for an embedding: "
                "max_norm=None)"
            )


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the content of every buffer back on exit (batch norm writes to its own in training mode).

    Raises:
        ModelError: the model was created under `torch.inference_mode`.
    """
    buffers = [
        (buffer, buffer.detach().clone())
        for name, buffer in model.named_buffers()
        if not _refuse_inference(name, buffer)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            # Not by version counter: batch norm writes its statistics without raising it.
            for buffer, content in buffers:
                if not _same_bits(buffer, content):
                    buffer.copy_(content)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch (CPU and initialised CUDA), numpy and `random`, and restore all of them on exit.

    `seed` lies in 0..2**32-1. CUDA is left alone unless it is in use: seeding it earlier would be
    queued for its start-up.
    """
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    numpy_state = np.random.get_state()
    python_state = random.getstate()
    try:
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        np.random.seed(seed)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(cpu_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _refuse_inference(name: str, tensor: torch.Tensor) -> bool:
    if tensor.is_inference():
        raise ModelError(
            f"{name!r} was created under torch.inference_mode and can take no part in autograd; "
            "load the model outside of it"
        )
    return False


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def _copy_attributes(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    # Containers are kept by identity and refilled, so that others who hold them see no change.
    return {
        key: (value, value.copy() if isinstance(value, (dict, list, set)) else None)
        for key, value in attributes.items()
    }


def _restore_attributes(attributes: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    attributes.clear()
    for key, (value, content) in saved.items():
        if isinstance(value, list):
            value[:] = content
        elif isinstance(value, (dict, set)):
            value.clear()
            value.update(content)
        attributes[key] = value
