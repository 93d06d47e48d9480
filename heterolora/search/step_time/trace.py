"""What one training step of a model does, operation by operation, and what each of them waits for.

One forward and backward pass of the frozen model runs with a zero that requires grad added to the
output of every candidate. Autograd then builds exactly the graph that adapters on all of them would
make it build, and the graph says below which candidates each backward operation is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from heterolora.errors import ModelError
from heterolora.kernels.cost import Step
from heterolora.kernels.cost_steps import Matmul, Problem
from heterolora.search.preserve import preserved, seeded
from heterolora.search.scores.proxies import Batch, batch_loss
from heterolora.search.sites import Site, head_modules

__all__ = ["Group", "Trace", "trace"]

_aten = torch.ops.aten
# These read as much of a table as they write.
_LOOKUPS = {_aten.embedding, _aten.index, _aten.index_select, _aten.gather}
_FREE = {_aten._unsafe_view, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}
# Attention on a CPU takes the arguments of the counted one on a GPU.
_ALIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True)
class Group:
    """Candidates called one after the other with the same tensor: what `fuse` runs as one.

    Attributes:
        names: of the candidates, in order of execution.
        problem: their shapes, without branches. A group that is called again counts all its rows.
        above: the latest group that its input depends on; -1 for none, and then its input needs no
            gradient whatever is adapted; the number of groups if it needs one in any case.
    """

    names: tuple[str, ...]
    problem: Problem
    above: int


@dataclass(frozen=True)
class Trace:
    """The operations of one forward and backward pass of the frozen model.

    Attributes:
        groups: in order of execution; candidates that the pass did not call are in none.
        forward: all of the forward pass.
        backward: [groups + 1] entries. Those of entry i run if a group up to i is adapted: i is the
            latest group that they depend on. The last entry always runs (a head that trains).
    """

    groups: tuple[Group, ...]
    forward: tuple[Step, ...]
    backward: tuple[tuple[Step, ...], ...]


def trace(
    model: nn.Module, batch: Batch, sites: Sequence[Site], *, factor_itemsize: int = 4
) -> Trace:
    """One training step of `model` on `batch`, under the caller's autocast; `model` is preserved.

    Parameters are frozen but for the heads that PEFT trains.

    Args:
        sites: the candidates.
        factor_itemsize: bytes of an element of the adapters; PEFT keeps them in float32.

    Raises:
        ModelError: a candidate is called with gradients off (reentrant checkpointing).
        DataError, ModelError, ScoreError: as `heterolora.search.scores.proxies.batch_loss`.
    """
    with preserved(model), seeded(0), torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for head in head_modules(model):
            head.requires_grad_(True)
        model.train()
        recorder = _Recorder()
        calls = _Calls(model, sites, recorder)
        forward: list[Step] = []
        with recorder, calls.marking():
            with recorder.into(forward):
                loss = batch_loss(model, batch)
            calls.counting = False
            assert loss.grad_fn is not None
            after = _latest(loss.grad_fn, calls.marks, len(calls.runs))
            backward: list[list[Step]] = [[] for _ in range(len(calls.runs) + 1)]
            _route(after, calls.marks, recorder, backward)
            loss.backward()
    groups = tuple(
        Group(tuple(names), calls.problem(names, factor_itemsize), after.get(source, -1))
        for names, source in zip(calls.runs, calls.sources, strict=True)
    )
    return Trace(groups, tuple(forward), tuple(map(tuple, backward)))


class _Calls:
    """Hooks on the candidates: who reads the same tensor, and which node of the graph is whose."""

    def __init__(self, model: nn.Module, sites: Sequence[Site], recorder: _Recorder) -> None:
        modules = dict(model.named_modules())
        self.runs: list[list[str]] = []
        self.sources: list[Any] = []
        self.marks: dict[Any, int] = {}
        # Off in the backward pass, where checkpointing calls the layers again.
        self.counting = True
        self._layers = {site.name: (site, modules[site.name]) for site in sites}
        self._recorder = recorder
        self._rows: dict[str, int] = {}
        self._itemsize: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._last: tuple[Tensor, int] | None = None
        self._zeros: dict[torch.device, Tensor] = {}

    @contextmanager
    def marking(self) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(self._hook(name))
            for name, (_, layer) in self._layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def problem(self, names: Sequence[str], factor_itemsize: int) -> Problem:
        sites = [self._layers[name][0] for name in names]
        return Problem(
            self._rows[names[0]],
            (sites[0].in_features,),
            tuple(site.out_features for site in sites),
            itemsize=self._itemsize[names[0]],
            factor_itemsize=factor_itemsize,
            bias=any(getattr(self._layers[name][1], "bias", None) is not None for name in names),
        )

    def _hook(self, name: str) -> Callable[..., Tensor]:
        def called(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.counting:
                self._count(name, inputs[0], output.dtype.itemsize)
            with self._recorder.into(None):
                device = output.device
                if device not in self._zeros:
                    self._zeros[device] = torch.zeros((), device=device, requires_grad=True)
                marked = output + self._zeros[device]
            if marked.grad_fn is None:
                raise ModelError(
                    f"{name!r} is called with gradients off, as reentrant checkpointing does it, "
                    "so a budget of time cannot see the backward pass; enable checkpointing with "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            self.marks[marked.grad_fn] = self._first[name]
            return marked

        return called

    def _count(self, name: str, x: Tensor, itemsize: int) -> None:
        rows = math.prod(x.shape[:-1])
        if name in self._first:
            self._rows[name] += rows
            return
        last, self._last = self._last, (x, x._version)
        if last is None or last[0] is not x or last[1] != x._version:
            self.runs.append([])
            self.sources.append(x.grad_fn)
        self.runs[-1].append(name)
        self._first[name] = len(self.runs) - 1
        self._rows[name], self._itemsize[name] = rows, itemsize


class _Recorder(TorchDispatchMode):
    """Writes down every operation that takes time, into whichever list is open."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: list[Step] | None = None

    @contextmanager
    def into(self, sink: list[Step] | None) -> Iterator[None]:
        before, self.sink = self.sink, sink
        try:
            yield
        finally:
            self.sink = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.sink is not None and not func.is_view and func.overloadpacket not in _FREE:
            self.sink.append(_step(func.overloadpacket, args, kwargs or {}, out))
        return out


def _step(packet: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> Step:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    written = sum(_bytes(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
    read = sum(map(_bytes, tensors))
    counted = flop_registry.get(_ALIKE.get(packet, packet))
    floating = [t for t in tensors if t.is_floating_point()]
    return Step(
        str(packet),
        min(read, 2 * written) if packet in _LOOKUPS else read,
        written,
        0 if counted is None else int(counted(*args, **kwargs, out_val=out)),
        itemsize=floating[0].dtype.itemsize if floating else 4,
        matmul=_matmul(packet, args),
    )


def _matmul(packet: Any, args: Any) -> Matmul | None:
    if packet not in (_aten.mm, _aten.addmm):
        return None
    (m, k), (_, n) = (tuple(operand.shape) for operand in args[-2:])
    return Matmul("expand", m, (n,), k, (0,))


def _bytes(tensor: Tensor) -> int:
    # An expanded tensor has more elements than memory.
    return min(tensor.numel() * tensor.dtype.itemsize, tensor.untyped_storage().nbytes())


def _latest(root: Any, marks: Mapping[Any, int], always: int) -> dict[Any, int]:
    """For every node of the graph the latest mark that it depends on.

    Args:
        always: for nodes that depend on a parameter that trains.
    """
    found: dict[Any, int] = {}
    stack = [root]
    zeros = {
        edge
        for node in marks
        for edge, _ in node.next_functions
        if edge is not None and not edge.next_functions
    }
    while stack:
        node = stack[-1]
        if node in found:
            stack.pop()
            continue
        inputs = [edge for edge, _ in node.next_functions if edge is not None]
        waiting = [edge for edge in inputs if edge not in found]
        if waiting:
            stack += waiting
            continue
        own = marks.get(node, -1)
        if not inputs and node not in zeros:
            own = always
        found[node] = max([own, *(found[edge] for edge in inputs)])
        stack.pop()
    return found


def _route(
    after: Mapping[Any, int],
    marks: Mapping[Any, int],
    recorder: _Recorder,
    sinks: Sequence[list[Step]],
) -> None:
    """Send what a node does in the backward pass to the list of its latest mark."""
    for node, latest in after.items():
        sink = None if node in marks or latest < 0 else sinks[latest]

        def enter(_: Any, sink: list[Step] | None = sink) -> None:
            recorder.sink = sink

        node.register_prehook(enter)
