"""Save and load adapters in PEFT's own layout, and check every file before a model is touched.

An adapter folder holds `adapter_config.json` and `adapter_model.safetensors`, as written by
`PeftModel.save_pretrained`. What is saved here loads in stock PEFT. What is loaded may come from
anywhere, so it is not trusted: nothing is unpickled, imported or fetched, and every tensor is
compared with what PEFT would build from the configuration, on a copy of the model without weights.
"""

import copy
import math
import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heterolora.checked import Fields
from heterolora.errors import AdapterFileError, ModelError
from heterolora.files.baked import baked_state
from heterolora.files.expressions import expression_problem
from heterolora.fusion.fuse import fuse
from heterolora.shortcuts.files import SavedShortcuts, check_shortcuts, write_shortcuts
from heterolora.shortcuts.model import MAX_RANK, Shortcuts
from heterolora.tensor_files import Shapes, check_inside, checked_tensors

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["load_adapter", "save_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# The most that a regular expression may have: characters, open-ended repeats, repeats plus choices.
# PEFT matches target_modules once with every module's name, but each key of a pattern.
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


def save_adapter(model: nn.Module, folder: str | PathLike[str], *, stock: bool = False) -> None:
    """Write every adapter of a PEFT LoRA model as safetensors, as `PeftModel.save_pretrained` does.

    Works alike on a fused and an unfused model, and the files need nothing but PEFT to load. The
    adapter called `default` goes into `folder` itself, any other into a sub-folder of its name.
    Shortcuts go into two more files in `folder`, which `load_adapter` reads and PEFT passes over.
    A factor that is parametrised (`torch.nn.utils.parametrize`) is written as it comes out, in
    evaluation mode: the files compute the same, and training cannot go on from them as it was.

    Args:
        stock: write only what stock PEFT loads, so that it computes what this model does.

    Raises:
        AdapterFileError: `model` is not a PeftModel with LoRA adapters, a weight is NaN, infinite
            or so parametrised that it is no plain factor, the model has shortcuts that carry
            weight, with `stock` (nothing is written in these cases), or `folder` cannot be written.
    """
    from peft import PeftModel, PeftType, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        raise AdapterFileError(
            f"save_adapter needs a PeftModel, and got {type(model).__name__}. Pass what "
            "heterolora.adapt or peft.get_peft_model returned; a plain model has its own "
            "save_pretrained."
        )
    baked = baked_state(model)
    for name, config in model.peft_config.items():
        if config.peft_type != PeftType.LORA:
            raise AdapterFileError(
                f"save_adapter saves LoRA adapters, and {name!r} is {config.peft_type}. "
                "Use the model's own save_pretrained."
            )
        state = get_peft_model_state_dict(
            model, state_dict=baked, adapter_name=name, save_embedding_layers=False
        )
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
        model.save_pretrained(str(folder), state_dict=baked)
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
    must, may = _expected_shapes(config, settings, model, adapter_name)
    for _ in checked_tensors(
        weights, must, may, config=_CONFIG, rank_axis=_rank_axis, error=AdapterFileError
    ):
        pass  # Only looked at: PEFT reads the file itself.
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
        check_inside(root, path, AdapterFileError)
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
    """The settings in a file as they are there, all checked."""
    from peft import LoraConfig

    given = Fields.load(file, AdapterFileError)
    if given.value("peft_type", None) != "LORA":
        given.fail(
            "peft_type",
            f"is {given.value('peft_type', None)!r:.80}, and only 'LORA' is loaded here. Load "
            "other adapters with peft.PeftModel.from_pretrained.",
        )
    defaults = LoraConfig().to_dict()
    for key, value in given.values.items():
        if key not in _KNOWN and value != defaults.get(key) and (value or defaults.get(key)):
            newer = "." if key in defaults else " of a newer peft release."
            given.fail(
                key,
                f"is {value!r:.80}, and only settings of plain LoRA are loaded here. If you trust "
                f"the file, use peft.PeftModel.from_pretrained{newer}",
            )
    settings = Fields({**defaults, **given.values}, file, AdapterFileError)
    _check_numbers(settings)
    _check_names(settings)
    start = settings.value("init_lora_weights")
    if start not in _KEEPS_BASE:
        settings.fail(
            "init_lora_weights",
            f"is {start!r:.80}, which changes base weights when loaded. Save it as plain LoRA, "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    return given.values


def _check_numbers(settings: Fields) -> None:
    settings.integer("r", 1, MAX_RANK)
    settings.number("lora_alpha", -math.inf)
    if settings.number("lora_dropout") >= 1:
        settings.fail("lora_dropout", f"is {settings.value('lora_dropout')}; it must be below 1")
    if settings.value("rank_pattern"):
        settings.each("rank_pattern", Fields.integer, low=1, high=MAX_RANK)
    if settings.value("alpha_pattern"):
        settings.each("alpha_pattern", Fields.number, low=-math.inf)


def _check_names(settings: Fields) -> None:
    """Look at what PEFT matches with the names of modules: names, and regular expressions."""
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.value(key):
            settings.each(key, lambda pattern, name: _check_expression(pattern, name, name))
    for key in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        value = settings.value(key)
        if isinstance(value, str) and key in ("target_modules", "exclude_modules"):
            _check_expression(settings, key, value, _EXPRESSION_LIMITS)
        elif value:
            for name in settings.entries(key, Fields.value):
                if not isinstance(name, str) or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
                    settings.fail(key, f"holds {name!r:.80}, which is not a module's name.")
    layers = settings.value("layers_pattern")
    if isinstance(layers, str):
        _check_expression(settings, "layers_pattern", layers)
    elif layers:
        for text in settings.entries("layers_pattern", Fields.text):
            _check_expression(settings, "layers_pattern", text)


def _check_expression(
    fields: Fields, key: str, text: str, limits: tuple[int, int, int] = _KEY_LIMITS
) -> None:
    problem = expression_problem(text, limits)
    if problem is not None:
        fields.fail(key, problem)


def _rank_axis(name: str) -> int | None:
    """The rank is the number of rows of A and of columns of B."""
    return 0 if ".lora_A." in name else 1 if ".lora_B." in name else None


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
