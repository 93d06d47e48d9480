"""Peers of other projects, where they are installed: Unsloth and Liger.

Written against `kernels/fast_lora.py` and `models/llama.py` of unsloth 2026.10.9 and against
`transformers/monkey_patch.py` of liger-kernel 0.8.5. Both need a GPU, and no step has been run with
the real packages yet, only with stand-ins of the same signatures.

Importing Unsloth changes parts of transformers for the whole process, whichever of its functions is
used. It is imported when its step is built, and the other variants of that run see those changes.
"""

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.bench.harness.steps import Workload
from heterolora.bench.harness.timing import BenchError

__all__ = ["PEERS", "Peer", "unavailable"]

_QKV = ("q_proj", "k_proj", "v_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"


@dataclass(frozen=True)
class Peer:
    """One project.

    Attributes:
        title: as in a sentence.
        package: what is imported.
        lacks: (workload, ranks by module name) -> what it has nothing for, or None.
        apply: changes one PeftModel in place; raises BenchError where nothing of the model is
            covered, or the installed version lacks the functions used.
    """

    title: str
    package: str
    lacks: Callable[[Workload, Mapping[str, int]], str | None]
    apply: Callable[[Any], None]


def unavailable(
    variant: str, workload: Workload, ranks: Mapping[str, int], device: torch.device
) -> str | None:
    """Why the peer cannot run on `workload` with these ranks here, or None. Imports nothing."""
    peer = PEERS[variant]
    lacking = peer.lacks(workload, ranks)
    if lacking is not None:
        return f"{peer.title} has nothing for {lacking}"
    if device.type != "cuda":
        return f"{peer.title} needs a GPU"
    if importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    return None


def _unsloth_lacks(workload: Workload, ranks: Mapping[str, int]) -> str | None:
    def adapted(name: str, layer: nn.Module) -> bool:
        return ranks.get(name, 0) > 0 and _is_plain(layer)

    if _units(workload.model, adapted):
        return None
    return (
        "this: only q, k, v together, o, a SwiGLU MLP, or one linear alone; "
        "in 16 bits and without bias"
    )


def _units(
    model: nn.Module, adapted: Callable[[str, nn.Module], bool]
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """(parent, names of its linears) for each of Unsloth's functions that applies.

    The conditions are those of Unsloth's own `patch_peft_model`: q, k and v count only if all three
    have adapters, and so do gate, up and down; weights in 16 bits, no bias. What is left out keeps
    PEFT's forward.
    """
    units: list[tuple[nn.Module, tuple[str, ...]]] = []
    for path, parent in model.named_modules():
        layers = {
            name: child
            for name, child in parent.named_children()
            if isinstance(child, nn.Linear) or _is_lora(child)
        }
        chosen = {
            name
            for name, child in layers.items()
            if adapted(f"{path}.{name}" if path else name, child)
        }
        if chosen >= set(_QKV):
            units.append((parent, _QKV))
        activation = getattr(getattr(parent, "config", None), "hidden_act", None)
        if chosen >= set(_MLP) and activation in ("silu", "swish"):
            units.append((parent, _MLP))
        if "o_proj" in chosen:
            units.append((parent, ("o_proj",)))
        elif len(layers) == 1 and chosen:
            units.append((parent, tuple(chosen)))
    return units


def _is_lora(layer: nn.Module) -> bool:
    return hasattr(layer, "lora_A") and hasattr(layer, "base_layer")


def _is_plain(layer: Any) -> bool:
    """Of a base layer."""
    return layer.bias is None and layer.weight.dtype in (torch.bfloat16, torch.float16)


def _apply_unsloth(model: Any) -> None:
    qkv, single, mlp = _functions(
        "unsloth.kernels", "apply_lora_qkv", "apply_lora_o", "apply_lora_mlp_swiglu"
    )
    units = _units(model, lambda name, layer: _is_lora(layer) and _is_plain(layer.base_layer))
    if not units:
        raise BenchError("unsloth: no adapted layer of this model is one it has a function for")
    for parent, names in units:
        layers: list[Any] = [parent.get_submodule(name) for name in names]
        if not all(isinstance(layer.lora_dropout[_ADAPTER], nn.Identity) for layer in layers):
            _check_dropout()
        if names == _MLP:
            parent.forward = MethodType(mlp, parent)
        elif names == _QKV:
            _Siblings(layers, partial(qkv, parent))
        else:
            _Siblings(layers, partial(_alone, single, layers[0]))


def _alone(
    function: Callable[..., Tensor], layer: nn.Module, x: Tensor, inplace: bool
) -> tuple[Tensor]:
    # `inplace` is what the function for q, k and v takes; here dX always has memory of its own.
    return (function(SimpleNamespace(o_proj=layer), x),)


def _check_dropout() -> None:
    # Earlier versions leave an active dropout out without a word.
    (fused,) = _functions("unsloth.kernels.fast_lora", "FUSED_LORA_DROPOUT")
    if not fused:
        raise BenchError("unsloth: dropout is switched off by UNSLOTH_FUSED_LORA_DROPOUT=0")


class _Siblings:
    """Linears on one x whose outputs come from the one call that the first of them makes.

    Unsloth calls its function from an attention forward of its own. Here transformers' attention,
    or a group of linears, calls q, k and v in this order, and k and v pick up what is ready.
    """

    def __init__(
        self, layers: Sequence[nn.Module], function: Callable[..., tuple[Tensor, ...]]
    ) -> None:
        self._function = function
        self._running = False
        self._x: Tensor | None = None
        self._ready: dict[int, Tensor] = {}
        layers[0].forward = self._compute
        for place, layer in enumerate(layers[1:], 1):
            layer.forward = partial(self._take, place)

    def _compute(self, x: Tensor) -> Tensor:
        if self._running:
            raise BenchError("unsloth: its function leaves these layers to PEFT")
        self._running = True
        try:
            # In place, dX overwrites x: right for an activation, wrong for an input of the step.
            first, *others = _with_batch(partial(self._function, inplace=not x.is_leaf), x)
        finally:
            self._running = False
        self._ready = dict(enumerate(others, 1))
        self._x = x if others else None
        return first

    def _take(self, place: int, x: Tensor) -> Tensor:
        if x is not self._x or place not in self._ready:
            raise BenchError("unsloth: q, k and v were not called in this order with one input")
        y = self._ready.pop(place)
        if not self._ready:
            self._x = None
        return y


def _with_batch(function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
    """`function`, which takes and gives [batch, tokens, features] only, on those or [tokens, k]."""
    if x.dim() == 3:
        return function(x)
    return tuple(y.squeeze(0) for y in function(x.unsqueeze(0)))


def _liger_lacks(workload: Workload, ranks: Mapping[str, int]) -> str | None:
    config = getattr(workload.model, "config", None)
    kind = getattr(config, "model_type", None)
    return None if kind == "llama" else "this: only for whole Llama models or layers"


def _apply_liger(model: Any) -> None:
    from transformers.models.llama import modeling_llama

    (patch,) = _functions("liger_kernel.transformers", "apply_liger_kernel_to_llama")
    base = model.get_base_model()
    before = dict(vars(modeling_llama))
    try:
        patch(model=base)
    finally:
        # Beside this model it exchanges names in transformers' module, for every Llama there is.
        theirs = {
            name: value
            for name, value in vars(modeling_llama).items()
            if name in before and value is not before[name]
        }
        for name in theirs:
            setattr(modeling_llama, name, before[name])
    forward = base.forward

    def with_their_names(*args: Any, **kwargs: Any) -> Any:
        # The rotary embedding is one of them, and the attention looks it up by name.
        with _exchanged(modeling_llama, theirs):
            return forward(*args, **kwargs)

    base.forward = with_their_names


@contextlib.contextmanager
def _exchanged(module: ModuleType, values: Mapping[str, Any]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _functions(module: str, *names: str) -> list[Any]:
    """The functions of an installed peer; a version without them, or broken, is a BenchError."""
    try:
        found = importlib.import_module(module)
        return [getattr(found, name) for name in names]
    except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
        wanted = ", ".join(names)
        raise BenchError(
            f"{module}: cannot load {wanted} ({error}); the bench needs a version that has them"
        ) from error


PEERS: dict[str, Peer] = {
    "unsloth": Peer("Unsloth", "unsloth", _unsloth_lacks, _apply_unsloth),
    "liger-peft": Peer("Liger", "liger_kernel", _liger_lacks, _apply_liger),
}
