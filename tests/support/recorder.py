"""CUDA graphs without CUDA: operators on a CPU are recorded once and replayed without Python.

What is as on a GPU: recording changes no tensor and draws no random number; a replay runs the
recorded operators on the tensors they had, whatever Python would do now; reading a tensor on the
host fails; memory is garbage, here NaN, until a replay writes it, and again after the replay of
another recording from the same pool.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heterolora.train.cuda_graphs import Recording, host_read


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.made: dict[int, Tensor] = {}
        self.changed: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reason = host_read(func, args, kwargs, "cpu")
        if func._schema.name == "aten::lift_fresh" and args[0].numel():
            reason = "a tensor made from Python numbers is copied from the host"
        if reason is not None:
            raise RuntimeError(reason)
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                if _address(tensor) not in self.made:
                    self.changed.setdefault(id(tensor), (tensor, tensor.detach().clone()))
        out = func(*args, **kwargs)
        given = {_address(tensor) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            if _address(tensor) not in given:
                self.made.setdefault(_address(tensor), tensor)
        self.calls.append((func, args, kwargs, out))
        return out

    def forget(self) -> None:
        """Undo what recording did."""
        with torch.no_grad():
            for tensor, before in self.changed.values():
                tensor.copy_(before)
            for tensor in self.made.values():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class CpuRecorder:
    """A `heterolora.train.cuda_graphs.Recorder`; counts what it is asked for."""

    def __init__(self) -> None:
        self.warm_ups = 0
        self.recordings = 0
        self.pools: list[Any] = []
        self._outputs: list[list[Tensor]] = []

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return function()

    def record(self, function: Callable[[], Any], pool: Any = None) -> Recording:
        self.recordings += 1
        self.pools.append(pool)
        tape, state = _Tape(), torch.get_rng_state()
        capturing = "transformers.utils.import_utils.is_cuda_stream_capturing"
        try:
            with mock.patch(capturing, lambda: True), tape:
                output = function()
        finally:
            torch.set_rng_state(state)
            tape.forget()
        mine = _tensors(output)
        self._outputs.append(mine)

        def replay() -> None:
            for others in self._outputs:
                if others is not mine:
                    for tensor in others:
                        tensor.detach().fill_(float("nan"))
            tape.replay()

        return Recording(output, replay, object() if pool is None else pool)
