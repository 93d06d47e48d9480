"""Write of an adapter and its shortcuts only what is in use."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from heterolora.errors import AdapterFileError, ModelError
from heterolora.files.baked import baked_state
from heterolora.fusion.interface import rank_in_use
from heterolora.shortcuts.files import check_shortcuts, write_shortcuts
from heterolora.shortcuts.model import Shortcuts

__all__ = ["save_enabled"]

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_enabled(model: Any, folder: str | Path) -> dict[str, int]:
    """Write the adapter at the ranks in use (after a dynamic search), in PEFT's layout.

    Modules that are switched off are left out, and the others are cut to their rank, alpha_i/r_i
    being as before. Shortcuts likewise, into the two further files that `heterolora.save_adapter`
    describes. If no shortcut is in use, the files need nothing but PEFT to load; otherwise
    `heterolora.load_adapter` loads them, while PEFT would pass the shortcuts over. Either way the
    logits are the same. Without a search this writes what `heterolora.save_adapter` does.

    Args:
        model: a `PeftModel` with one LoRA adapter; it is not changed.
        folder: created if need be.

    Returns:
        {name of a module in the base model, or of a shortcut: rank written}, without those left
        out.

    Raises:
        ModelError: not such a model, or no LoRA layer is in use.
        AdapterFileError: the folder cannot be written, a shortcut's weight is not finite, or a
            factor is so parametrised that it is no plain one.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    if not isinstance(model, PeftModel) or len(model.peft_config) != 1:
        raise ModelError("save_enabled needs a PeftModel with exactly one adapter")
    (adapter,) = model.peft_config
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.lora_A
    }
    ranks: dict[str, int] = {}
    for name, layer in layers.items():
        rank = rank_in_use(layer)
        ranks[name] = layer.lora_A[adapter].weight.shape[0] if rank is None else rank
    written = {name: rank for name, rank in ranks.items() if rank}
    if not written:
        raise ModelError(
            "no LoRA layer of the model is in use, and PEFT's files need one; if shortcuts are in "
            "use, save everything with heterolora.save_adapter"
        )
    shortcuts = Shortcuts.of(model)
    check_shortcuts(shortcuts, stock=False)

    config = copy.deepcopy(model.peft_config[adapter])
    config.r = max(written.values())
    config.use_rslora = False
    scales = {name: layers[name].scaling[adapter] for name in written}
    config.lora_alpha = next(s * config.r for n, s in scales.items() if written[n] == config.r)
    others = {
        name: rank
        for name, rank in written.items()
        if rank != config.r or scales[name] * config.r != config.lora_alpha
    }
    config.rank_pattern = {f"^{re.escape(name)}": rank for name, rank in others.items()}
    config.alpha_pattern = {f"^{re.escape(n)}": scales[n] * rank for n, rank in others.items()}
    rest = [name for name, _ in model.get_base_model().named_modules() if name not in written]
    # PEFT takes a list for endings of names, and an expression for whole names.
    leaks = any(other.endswith(f".{name}") for name in written for other in rest)
    config.target_modules = "|".join(map(re.escape, written)) if leaks else list(written)
    config.inference_mode = True
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(model.get_base_model(), "name_or_path", None)

    state = get_peft_model_state_dict(
        model, state_dict=baked_state(model), adapter_name=adapter, save_embedding_layers=False
    )
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name, found, factor = key.removeprefix(_PREFIX).rpartition(".lora_")
        rank = ranks.get(name) if found else None
        if rank == 0:
            continue
        if rank is not None:
            tensor = tensor[:rank] if factor.startswith("A") else tensor[:, :rank]
        tensors[key] = tensor.detach().contiguous()
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / _WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        written |= write_shortcuts(shortcuts, Path(folder), in_use=True)
    except OSError as error:
        raise AdapterFileError(
            f"{folder}: the adapter cannot be written here ({error}). Name another folder."
        ) from error
    return written
