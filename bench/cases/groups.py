"""One linear, or several that read one input: the operation alone, forward and backward.

A step runs several copies of the group, each with its own weights, input and output gradient, so
that each starts with cold caches, as a layer inside a model does.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from heterolora.bench.harness.steps import SEED, Inputs, Step, Workload, linears, with_adapters
from heterolora.kernels import Branch, Site, group_linear

__all__ = ["SHORTCUT_RANK", "bytes_of_group", "copies", "group", "shortcut_step"]

# Several times the last-level cache of a GPU (50 MB on an H100) or a CPU core's share of one.
COLD_BYTES = 128 * 2**20
MOST_COPIES = 48
SHORTCUT_RANK = 16


def bytes_of_group(m: int, k: int, n: int, itemsize: int) -> int:
    """What forward and backward touch: W, x, dX, Y and dY; n is summed over the sites."""
    return itemsize * (k * n + 2 * m * (k + n))


def copies(m: int, k: int, n: int, itemsize: int, *, multiple: int = 1) -> int:
    """How many copies of a group together exceed the caches, rounded up to `multiple`."""
    wanted = -(-COLD_BYTES // bytes_of_group(m, k, n, itemsize))
    wanted = max(1, min(wanted, MOST_COPIES))
    return -(-wanted // multiple) * multiple


class Group(nn.Module):
    """Linears on one input, without bias, and optionally a shortcut added to the first output.

    The shortcut is a LoRA pair on another source, computed as PEFT computes its own: in the dtype
    of A, then cast back.
    """

    def __init__(self, k: int, sites: Mapping[str, int], *, shortcut: bool) -> None:
        super().__init__()
        self.names = list(sites)
        for name, n in sites.items():
            self.add_module(name, nn.Linear(k, n, bias=False).requires_grad_(False))
        # By this name the gate counts it among the adapters.
        self.lora_shortcut: nn.ParameterList | None = None
        if shortcut:
            n = next(iter(sites.values()))
            factors = torch.randn(SHORTCUT_RANK, k) * k**-0.5, torch.randn(n, SHORTCUT_RANK) * 0.02
            self.lora_shortcut = nn.ParameterList(factors)
        self.fused = False

    def forward(self, x: Tensor, u: Tensor | None = None) -> list[Tensor]:
        if self.fused:
            return self._as_one_operation(x, u)
        outputs = [self.get_submodule(name)(x) for name in self.names]
        if u is not None and self.lora_shortcut is not None:
            a, b = self.lora_shortcut
            s = nn.functional.linear(u.to(a.dtype), a)
            outputs[0] = outputs[0] + (2.0 * nn.functional.linear(s, b)).to(x.dtype)
        return outputs

    def _as_one_operation(self, x: Tensor, u: Tensor | None) -> list[Tensor]:
        layers: list[Any] = [self.get_submodule(name) for name in self.names]
        branches = [
            Branch(i, layer.lora_A["default"].weight, layer.lora_B["default"].weight, 2.0)
            for i, layer in enumerate(layers)
        ]
        if u is not None and self.lora_shortcut is not None:
            a, b = self.lora_shortcut
            branches.append(Branch(0, a, b, 2.0, source=u))
        return group_linear(x, [Site(layer.base_layer.weight) for layer in layers], branches)


class Groups(nn.Module):
    def __init__(self, count: int, k: int, sites: Mapping[str, int], *, shortcut: bool) -> None:
        super().__init__()
        self.copies = nn.ModuleList(Group(k, sites, shortcut=shortcut) for _ in range(count))

    def forward(self, **inputs: Tensor) -> list[Tensor]:
        outputs = []
        for i, one in enumerate(self.copies):
            outputs += one(inputs[f"x{i}"], inputs.get(f"u{i}"))
        return outputs


def group(
    *,
    m: int,
    k: int,
    sites: Mapping[str, int],
    repeats: int,
    shortcut: bool = False,
    dtype: torch.dtype,
    device: torch.device,
) -> Workload:
    """`repeats` copies of a group; every input requires a gradient, as inside a model.

    Args:
        m: rows of the input.
        k: its columns.
        sites: out_features by name.
        shortcut: adds a rank-16 branch that reads a second input of k columns.
    """
    torch.manual_seed(SEED)
    with torch.device(device):
        model = Groups(repeats, k, sites, shortcut=shortcut)
        draw = partial(torch.randn, dtype=dtype)
        inputs = {f"x{i}": draw(m, k) for i in range(repeats)}
        if shortcut:
            inputs |= {f"u{i}": draw(m, k) for i in range(repeats)}
        grads = [draw(m, n) for _ in range(repeats) for n in sites.values()]
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for value in inputs.values():
        value.requires_grad_()
    return Workload(
        model=model,
        targets=linears(model, r"copies\..*"),
        inputs=inputs,
        floor_inputs={name: x for name, x in inputs.items() if name.startswith("x")},
        run=_outputs,
        tokens=m,
        layers=repeats,
        output_grads=grads,
        repeats=repeats,
        trains=False,
    )


def _outputs(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    return module(**inputs)


def shortcut_step(variant: str, workload: Workload, ranks: Mapping[str, int]) -> Step:
    """The step of a group with a shortcut, which PEFT has no layer for.

    Args:
        variant: "peft", "peft-lowp" (all factors in the base dtype) or "fused".
    """
    low = variant == "peft-lowp"
    model = with_adapters(workload, ranks, autocast_adapter_dtype=not low)
    for one in model.get_base_model().copies:
        one.fused = variant == "fused"
        if low:
            one.lora_shortcut.to(next(iter(workload.inputs.values())).dtype)
        # PEFT freezes what it did not make itself.
        one.lora_shortcut.requires_grad_(True)
    return Step.of(workload, model)
