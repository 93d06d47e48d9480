"""The one reader of safetensors that come from outside: nothing unpickled, no link followed out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["Shapes", "check_inside", "checked_tensors"]

Shapes = Mapping[str, tuple[int, ...]]

_FLOATS = ("F64", "F32", "F16", "BF16")


def check_inside(root: Path, path: Path, error: type[Exception]) -> None:
    """Refuse a link out of a folder.

    Args:
        root: the folder, resolved.
        error: the exception to raise, made from one message.

    Raises:
        error: it is one, and not into the blobs of a Hugging Face cache.
    """
    real = path.resolve()
    # The Hugging Face cache keeps files in blobs/; snapshots/<revision>/ links to them.
    cached = root.parent.name == "snapshots" and real.is_relative_to(root.parents[1] / "blobs")
    if not real.is_relative_to(root) and not cached:
        raise error(f"{path}: a link out of the folder, to {real}. Copy the file itself here.")


def checked_tensors(
    file: Path,
    must: Shapes,
    may: Shapes,
    *,
    config: str,
    rank_axis: Callable[[str], int | None],
    error: type[Exception],
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a file by name, one at a time; names and shapes are checked before the first.

    Args:
        file: a safetensors file.
        must, may: shapes of the tensors that it has to hold, and of those that it may hold besides.
        config: name of the file beside it that these shapes follow from.
        rank_axis: of a factor's name, the axis whose size is its rank; None for another tensor.
        error: the exception to raise, made from one message.

    Raises:
        error: the file cannot be read; a tensor is missing, extra, of the wrong shape or no
            floating point, or holds NaN or infinity. The message names the file and the tensor.
    """
    # Loaded with the first file, as heterolora is imported without it.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as saved:
            names = set(saved.keys())
            if missing := sorted(must.keys() - names):
                raise error(
                    f"{file}: {missing[0]} is missing ({len(missing)} in all). The file is "
                    f"incomplete, or was saved with another {config} or for another model."
                )
            if extra := sorted(names - must.keys() - may.keys()):
                raise error(
                    f"{file}: {extra[0]} does not belong to {config} on this model ({len(extra)} "
                    f"in all). Use the {config} and the model it was saved with."
                )
            for name in sorted(names):
                head = saved.get_slice(name)
                shape, expected = tuple(head.get_shape()), {**may, **must}[name]
                if shape != expected:
                    problem = _shape_problem(shape, expected, rank_axis(name), config)
                    raise error(f"{file}: {name} {problem}")
                if head.get_dtype() not in _FLOATS:
                    raise error(
                        f"{file}: {name} has dtype {head.get_dtype()}, which is none of "
                        f"{', '.join(_FLOATS)}. Save the adapter again."
                    )
            for name in sorted(names):
                tensor = saved.get_tensor(name)
                if not torch.isfinite(tensor).all():
                    raise error(
                        f"{file}: {name} holds NaN or infinite values. Load an earlier checkpoint."
                    )
                yield name, tensor
    except (SafetensorError, OSError) as exc:
        raise error(
            f"{file}: not readable as safetensors ({exc}). It is cut short, or a renamed pickle; "
            "save the adapter again."
        ) from exc


def _shape_problem(
    shape: tuple[int, ...], expected: tuple[int, ...], axis: int | None, config: str
) -> str:
    if axis is not None and len(shape) == 2 and shape[1 - axis] == expected[1 - axis]:
        return (
            f"has rank {shape[axis]}, and {config} says {expected[axis]}. Use the two files of the "
            "same save."
        )
    return (
        f"has shape {list(shape)}, and this model needs {list(expected)}. Use the model that the "
        "adapter was trained on."
    )
