"""The activations that shortcuts read, held from where they arise to where they are read.

They are held in frames. A frame opens when the stack of layers is called and closes when that call
ends, whatever happens inside, so two forward passes never see each other's sources.

Under gradient checkpointing a layer is run once more in the backward pass, when no frame is open.
What a layer takes from itself is captured again then. What it takes from the layer before becomes
an output of that layer's checkpoint and an input of its own, so values and gradients are those of a
pass without checkpoints, for either setting of `use_reentrant`. transformers 5 gives every layer
the function that checkpoints it as an attribute, which is where this is put in.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from heterolora.errors import ShortcutError

__all__ = ["FFN", "LAYER", "Key", "Sources", "Stack"]

logger = logging.getLogger("heterolora")

LAYER, FFN = "layer input", "FFN input"

_NOT_COMPILED = (
    "torch.compile cannot trace shortcuts through gradient checkpoints, which hand a tensor from "
    "one layer to another; compile, or checkpoint, but not both"
)

# Number of a layer in the model, and which of its activations.
Key = tuple[int, str]

_CHECKPOINT = "_gradient_checkpointing_func"


@dataclass(frozen=True)
class Stack:
    """Layers that follow each other: what has to be watched, as modules.

    Attributes:
        windows: a call of one of these is a pass, outermost first.
        layers: the layer modules by number.
        captures: the modules that are called with a source.
        carried: numbers of layers that read a source of the layer before.
        witness: a LoRA layer, which tells whether adapters are on.
        home: the module that `witness` was found in, as the first below it.
    """

    windows: Sequence[nn.Module]
    layers: Mapping[int, nn.Module]
    captures: Mapping[Key, nn.Module]
    carried: frozenset[int]
    witness: Any
    home: nn.Module


class _Frame:
    def __init__(self, owner: Any, on: bool) -> None:
        self.owner = owner
        self.on = on
        self.tensors: dict[Key, Tensor] = {}


class Sources:
    """The hooks on one model's layers and the frames that they fill."""

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self._frames: list[_Frame] = []
        self._stacks = list(stacks)
        self._handles: list[RemovableHandle] = []
        self._warned = False
        for stack in self._stacks:
            for window in stack.windows:
                self._watch(window, partial(self._open_window, stack))
            for layer in stack.layers.values():
                self._watch(layer, partial(self._open_layer, stack))
            for key, module in stack.captures.items():
                hook = partial(self._capture, key)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stack in self._stacks:
            for layer in stack.layers.values():
                carrier = layer.__dict__.get(_CHECKPOINT)
                if isinstance(carrier, _Carrier):
                    setattr(layer, _CHECKPOINT, carrier.original)

    @property
    def on(self) -> bool:
        """Whether shortcuts run in this pass: not where the adapters are disabled or unloaded."""
        return not self._frames or self._frames[-1].on

    def get(self, key: Key, reader: str) -> Tensor:
        """The source of the pass that is running.

        Raises:
            ShortcutError: there is none.
        """
        found = self._frames[-1].tensors.get(key) if self._frames else None
        if found is None:
            raise ShortcutError(
                f"{reader}: the {key[1]} of layer {key[0]} is not known in this call. Call the "
                "model, not a part of a layer; checkpoint by gradient_checkpointing_enable(), not "
                "by wrapping single layers; and do not drop layers (layerdrop) with cross-ffn"
            )
        return found

    def push(self, owner: Any, on: bool) -> _Frame:
        """Open a frame, which `owner` will close."""
        frame = _Frame(owner, on)
        self._frames.append(frame)
        return frame

    def pop(self, owner: Any) -> None:
        """Close the innermost frame, if `owner` opened it."""
        # Not one of another's: the hook that should have opened ours may never have run.
        if self._frames and self._frames[-1].owner is owner:
            self._frames.pop()

    def keep(self, key: Key, source: Tensor | None) -> None:
        """Note a source of the running pass, and let go of those that no later layer reads."""
        if not self._frames:
            return
        frame, number = self._frames[-1], key[0]
        frame.tensors = {
            other: tensor
            for other, tensor in frame.tensors.items()
            if other[0] == number or other == (number - 1, FFN)
        }
        if source is not None:
            frame.tensors[key] = source

    def _watch(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook))
        self._handles.append(module.register_forward_hook(self._close, always_call=True))

    def _open_window(self, stack: Stack, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            if any(_checkpoints(layer) for layer in stack.layers.values()):
                raise ShortcutError(_NOT_COMPILED)
        else:
            for number, layer in stack.layers.items():
                # Looked at in every pass, as checkpointing may be enabled at any time.
                original = layer.__dict__.get(_CHECKPOINT)
                if original is not None and not isinstance(original, _Carrier):
                    carrier = _Carrier(self, number, original, number in stack.carried)
                    setattr(layer, _CHECKPOINT, carrier)
        self.push(module, self._adapters_on(stack, module))

    def _open_layer(self, stack: Stack, module: nn.Module, args: Any) -> None:
        # A layer called by hand, or recomputed by code that checkpoints its whole call.
        if not self._frames:
            self.push(module, stack.witness is None or not stack.witness.disable_adapters)

    def _close(self, module: nn.Module, args: Any, output: Any) -> None:
        self.pop(module)

    def _capture(self, key: Key, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        if not isinstance(x, Tensor):
            raise ShortcutError(
                f"{type(module).__name__} should be called with the {key[1]} of layer {key[0]}, "
                f"and was called with a {type(x).__name__}; correct the mapping"
            )
        self.keep(key, x)

    def _adapters_on(self, stack: Stack, module: nn.Module) -> bool:
        if stack.witness is None:
            return True
        if stack.witness.disable_adapters:
            return False
        if torch.compiler.is_compiling() or module is not stack.windows[-1]:
            return True
        # As the first of its kind it is found at once, unless it is not there any more.
        there = any(found is stack.witness for found in stack.home.modules())
        if not there and not self._warned:
            self._warned = True
            logger.warning("the LoRA layers were unloaded, and the shortcuts with them")
        return there


def _checkpoints(layer: nn.Module) -> bool:
    return bool(getattr(layer, "gradient_checkpointing", False)) and layer.training


class _Carrier:
    """Stands for a layer's checkpoint function, and takes the layer's foreign source through it."""

    def __init__(
        self, sources: Sources, number: int, original: Callable[..., Any], carries: bool
    ) -> None:
        self.sources = sources
        self.number = number
        self.original = original
        self.carries = carries

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if torch.compiler.is_compiling():
            raise ShortcutError(_NOT_COMPILED)
        frames = self.sources._frames
        before = (self.number - 1, FFN)
        source = frames[-1].tensors.get(before) if frames and self.carries else None
        several: list[bool] = []
        run = partial(self._run, function, self.sources.on, several)
        *outputs, own = self.original(run, source, *args)
        self.sources.keep((self.number, FFN), own)
        return tuple(outputs) if several[-1] else outputs[0]

    def _run(
        self,
        function: Callable[..., Any],
        on: bool,
        several: list[bool],
        source: Tensor | None,
        *args: Any,
    ) -> tuple[Any, ...]:
        frame = self.sources.push(self, on)
        if source is not None:
            frame.tensors[self.number - 1, FFN] = source
        try:
            outputs = function(*args)
        finally:
            own = frame.tensors.get((self.number, FFN))
            # Not only when all goes well: a recompute ends by an exception once it has enough.
            self.sources.pop(self)
        several.append(isinstance(outputs, tuple))
        return (*(outputs if several[-1] else (outputs,)), own)
