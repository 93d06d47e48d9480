"""Save and load adapters in PEFT's own layout, and check every file before a model is touched.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`, as written by
`PeftModel.save_pretrained`. What is saved here loads in stock PEFT. What is loaded may come from
anywhere, so it is not trusted: nothing is unpickled, imported or fetched, and every tensor is
compared with what PEFT would build from the configuration, on a copy of the model without weights.
"""

import copy
import json
import re
import sys
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heterolora.errors import AdapterFileError, ModelError
from heterolora.files.expressions import check_expression
from heterolora.fusion.fuse import fuse
from heterolora.shortcuts.files import (
    SavedShortcuts,
    check_inside,
    check_shortcuts,
    write_shortcuts,
)
from heterolora.shortcuts.model import Shortcuts

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["load_adapter", "save_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MAX_RANK = 65536
# Of a regular expression: characters, open-ended repeats, and repeats plus choices. PEFT matches
# target_modules once with every module's name, but each key of a pattern.
_EXPRESSION_LIMITS = (65536, 4, 8)
_KEY_LIMITS = (1024, 2, 4)

# Settings of plain LoRA, DoRA and aLoRA. Others must be at PEFT's default: some import a module
# the file names, read a path, or rewrite base weights (megatron_core, corda_config, kasa_config).
_KNOWN = {
    *("peft_type", "peft_version", "task_type", "inference_mode", "auto_mapping", "revision"),
    *("base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "rank_pattern", "bias"),
    *("alpha_pattern", "use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "eva_config"),
    *("target_modules", "exclude_modules", "target_parameters", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "init_lora_weights"),
    *("alora_invocation_tokens", "ensure_weight_tying"),
}
# pissa, olora, corda, loftq and lora_ga move a part of the base weight into the adapter.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")

Shapes = dict[str, tuple[int, ...]]


def save_adapter(model: nn.Module, folder: str | PathLike[str], *, stock: bool = False) -> None:
    """Write every adapter of a PEFT LoRA model as safetensors, as `PeftModel.save_pretrained` does.

    Works alike on a fused and an unfused model, and the files need nothing but PEFT to load. The
    adapter called `default` goes into `folder` itself, any other into a sub-folder of its name.
    Shortcuts go into two more files in `folder`, which `load_adapter` reads and PEFT passes over.

    Args:
        stock: write only what stock PEFT loads, so that it computes what this model does.

    Raises:
        AdapterFileError: `model` is not a PeftModel with LoRA adapters, a weight is NaN or infinite
            (nothing is written then), `folder` cannot be written, or the model has shortcuts that
            carry weight, with `stock`.
    """
    from peft import PeftModel, PeftType, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise AdapterFileError(
            f"save_adapter needs a PeftModel, and got {type(model).__name__}. Pass what "
            "heterolora.adapt or peft.get_peft_model returned; a plain model has its own "
            "save_pretrained."
        )
    for name, config in model.peft_config.items():
        if config.peft_type != PeftType.LORA:
            raise AdapterFileError(
                f"save_adapter saves LoRA adapters, and {name!r} is {config.peft_type}. "
                "Use the model's own save_pretrained."
            )
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        for key, tensor in state.items():
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(
                    f"adapter {name!r}: {key} holds NaN or infinite values, so nothing was saved. "
                    "Go back to an earlier checkpoint, and train on with a lower learning rate."
                )
    shortcuts = Shortcuts.of(model)
    check_shortcuts(shortcuts, stock=stock)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder))
        write_shortcuts(None if stock else shortcuts, Path(folder))
    except OSError as exc:
        raise AdapterFileError(
            f"{folder}: the adapter cannot be written here ({exc}). Name another folder."
        ) from exc


def load_adapter(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> "PeftModel":
    """Put the saved LoRA adapter of `folder`, with its shortcuts if any, on `model`, and fuse it.

    Everything is checked first; on an error `model` is as it was. Only the adapter's files are
    read: the base model they name is neither loaded nor looked for. Once unfused, the result equals
    that of `peft.PeftModel.from_pretrained` bit for bit, if there are no shortcuts.

    Args:
        model: the base model, which becomes part of the result, as with PEFT.
        folder: what `save_adapter` or `PeftModel.save_pretrained` wrote, or a snapshot in the
            Hugging Face cache.
        adapter_name: the adapter's name in the result.
        is_trainable: whether the adapter requires gradients; if not, the model is set to eval mode.

    Raises:
        ModelError: `model` already carries an adapter.
        AdapterFileError: a file is missing, unreadable, a pickle, or a link out of `folder`; a
            setting is unsafe or senseless; a tensor is missing, extra, of the wrong shape, rank or
            dtype, or not finite. The message names the file and the key.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ModelError(
            "load_adapter needs the base model, and this one already carries an adapter. "
            "Call its unload() first, or add a second adapter with PeftModel.load_adapter."
        )
    root = Path(folder).resolve()
    config, weights = _adapter_files(root)
    settings = _read_settings(config)
    _check_settings(config, settings)
    _check_tensors(weights, *_expected_shapes(config, settings, model, adapter_name))
    shortcuts = SavedShortcuts.read(root, model)
    loaded = PeftModel.from_pretrained(
        model, str(root), adapter_name=adapter_name, is_trainable=is_trainable
    )
    if shortcuts is not None:
        shortcuts.attach(loaded, is_trainable=is_trainable)
    fuse(loaded)
    return loaded


def _adapter_files(root: Path) -> tuple[Path, Path]:
    if not root.is_dir():
        raise AdapterFileError(
            f"{root}: no such folder. Name the one that save_adapter or save_pretrained wrote; "
            "fetch an adapter from the Hub first, with huggingface_hub.snapshot_download."
        )
    config, weights = root / _CONFIG, root / _WEIGHTS
    for path in (config, weights):
        check_inside(root, path)
    if not config.is_file():
        inner = sorted(path.parent.name for path in root.glob(f"*/{_CONFIG}"))
        hint = f"Name one of its sub-folders: {', '.join(inner)}." if inner else "Save it again."
        raise AdapterFileError(f"{config}: the adapter's configuration is missing. {hint}")
    if not weights.is_file():
        pickles = sorted(path for path in root.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise AdapterFileError(
                f"{pickles[0]}: refused, because loading a pickle can run code. If you trust it, "
                f"load it with PEFT and call save_pretrained, which writes {_WEIGHTS}."
            )
        raise AdapterFileError(f"{weights}: the adapter's weights are missing. Save it again.")
    return config, weights


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise AdapterFileError(f"{file}: not readable as JSON ({exc}). Save it again.") from exc
    if not isinstance(settings, dict):
        raise AdapterFileError(f"{file}: holds no JSON object. Save the adapter again.")
    if settings.get("peft_type") != "LORA":
        raise AdapterFileError(
            f"{file}: peft_type is {settings.get('peft_type')!r}, and only 'LORA' is loaded here. "
            "Load other adapters with peft.PeftModel.from_pretrained."
        )
    return settings


def _is_number(value: Any) -> bool:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MAX_RANK


def _is_dropout(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    from peft import LoraConfig

    defaults = LoraConfig().to_dict()
    for key, value in settings.items():
        if key not in _KNOWN and value != defaults.get(key) and (value or defaults.get(key)):
            raise AdapterFileError(
                f"{file}: {key} is {value!r:.80}, and only settings of plain LoRA are loaded here. "
                "If you trust the file, use peft.PeftModel.from_pretrained"
                f"{'.' if key in defaults else ' of a newer peft release.'}"
            )
    settings = {**defaults, **settings}

    numbers: dict[str, tuple[Callable[[Any], bool], str]] = {
        "r": (_is_rank, f"a whole number from 1 to {_MAX_RANK}"),
        "lora_alpha": (_is_number, "a finite number"),
        "lora_dropout": (_is_dropout, "at least 0 and below 1"),
    }
    for key, (valid, kind) in numbers.items():
        if not valid(settings[key]):
            raise AdapterFileError(f"{file}: {key} is {settings[key]!r:.80}; it must be {kind}.")
    for key, single in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        pattern = settings[key] or {}
        if not isinstance(pattern, dict):
            raise AdapterFileError(f"{file}: {key} must map module names to numbers.")
        valid, kind = numbers[single]
        for name, value in pattern.items():
            where = f"{key}[{name!r:.80}]"
            if not valid(value):
                raise AdapterFileError(f"{file}: {where} is {value!r:.80}; it must be {kind}.")
            check_expression(file, where, name, _KEY_LIMITS)
    if settings["init_lora_weights"] not in _KEEPS_BASE:
        raise AdapterFileError(
            f"{file}: init_lora_weights is {settings['init_lora_weights']!r:.80}, which changes "
            "base weights when loaded. Save it as plain LoRA, with PEFT's "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = settings[key] or []
        if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
            check_expression(file, key, value, _EXPRESSION_LIMITS)
        elif not isinstance(value, list):
            raise AdapterFileError(f"{file}: {key} is {value!r:.80}; it must be a list of names.")
        else:
            for name in value:
                if not isinstance(name, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
                    raise AdapterFileError(
                        f"{file}: {key} holds {name!r:.80}, which is not a module's name."
                    )
    layers = settings["layers_pattern"] or []
    for text in layers if isinstance(layers, list) else [layers]:
        if not isinstance(text, str):
            raise AdapterFileError(f"{file}: layers_pattern holds {text!r:.80}; it must be text.")
        check_expression(file, "layers_pattern", text, _KEY_LIMITS)


def _expected_shapes(
    file: Path, settings: dict[str, Any], model: nn.Module, adapter_name: str
) -> tuple[Shapes, Shapes]:
    """The tensors a file must hold, and those it may hold besides: resized embeddings."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    # Parameters turn into meta tensors, so the copy holds no weights. Subclasses, which quantised
    # layers use, carry state that a meta tensor would lose, and are copied in full.
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(
            torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad
        )
        for parameter in model.parameters()
        if type(parameter) is nn.Parameter
    }
    skeleton = copy.deepcopy(model, memo)
    try:
        config = LoraConfig.from_peft_type(**copy.deepcopy(settings))
        config.init_lora_weights = False
        adapted = get_peft_model(skeleton, config, adapter_name, low_cpu_mem_usage=True)
    except Exception as exc:
        raise AdapterFileError(
            f"{file}: PEFT cannot put this adapter on {type(model).__name__} ({exc}). "
            "Use the model that the adapter was trained on."
        ) from exc

    def shapes(embeddings: bool) -> Shapes:
        state = get_peft_model_state_dict(
            adapted, adapter_name=adapter_name, save_embedding_layers=embeddings
        )
        return {key: tuple(tensor.shape) for key, tensor in state.items()}

    return shapes(False), shapes(True) if hasattr(model, "get_input_embeddings") else {}


def _check_tensors(file: Path, must: Shapes, may: Shapes) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device="cpu") as saved:
            keys = set(saved.keys())
            if missing := sorted(must.keys() - keys):
                raise AdapterFileError(
                    f"{file}: {missing[0]} is missing ({len(missing)} in all). The file is "
                    f"incomplete, or was saved with another {_CONFIG} or for another model."
                )
            if extra := sorted(keys - must.keys() - may.keys()):
                raise AdapterFileError(
                    f"{file}: {extra[0]} does not belong to this adapter on this model "
                    f"({len(extra)} in all). Use the {_CONFIG} and the model it was saved with."
                )
            for key in sorted(keys):
                head = saved.get_slice(key)
                _check_head(file, key, tuple(head.get_shape()), {**may, **must}[key])
                if head.get_dtype() not in _FLOATS:
                    raise AdapterFileError(
                        f"{file}: {key} has dtype {head.get_dtype()}, which is none of "
                        f"{', '.join(_FLOATS)}. Save the adapter again."
                    )
                if not torch.isfinite(saved.get_tensor(key)).all():
                    raise AdapterFileError(
                        f"{file}: {key} holds NaN or infinite values. Load an earlier checkpoint."
                    )
    except (SafetensorError, OSError) as exc:
        raise AdapterFileError(
            f"{file}: not readable as safetensors ({exc}). It is cut short, or a renamed pickle; "
            "save the adapter again."
        ) from exc


def _check_head(file: Path, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape == expected:
        return
    # The rank is the number of rows of A and of columns of B.
    axis = 0 if ".lora_A." in key else 1 if ".lora_B." in key else None
    if axis is not None and len(shape) == 2 and shape[1 - axis] == expected[1 - axis]:
        raise AdapterFileError(
            f"{file}: {key} has rank {shape[axis]}, and r and rank_pattern in {_CONFIG} say "
            f"{expected[axis]}. Use the two files of the same save."
        )
    raise AdapterFileError(
        f"{file}: {key} has shape {list(shape)}, and this model needs {list(expected)}. "
        "Use the model that the adapter was trained on."
    )
