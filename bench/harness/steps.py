"""A workload, what adapters make of it, and one training step of the result."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "RANK",
    "SEED",
    "Run",
    "Step",
    "Workload",
    "adapter_parameters",
    "linears",
    "mixed_ranks",
    "sparse_ranks",
    "twin",
    "uniform_ranks",
    "with_adapters",
]

RANK = 8
SEED = 0

Inputs = Mapping[str, Tensor]
Run = Callable[[nn.Module, Inputs], list[Tensor]]


@dataclass
class Workload:
    """A frozen base model with random weights, a batch, and the linear layers to adapt.

    Attributes:
        model: only what a shortcut adds requires grad; training mode.
        targets: adapted linear layers in forward order, {module name: (in_features, out_features)}.
        inputs: what the model is called with.
        floor_inputs: the same batch for the frozen model alone; what requires grad in it gets one.
        run: (module, inputs) -> the tensors that backward starts from.
        tokens: rows that each adapted layer sees.
        layers: transformer layers, or copies of a group, that one step runs.
        output_grads: dY of each tensor of `run`; None for a scalar loss.
        repeats: copies of a group that one step runs; 1 for whole models.
        trains: whether a step ends with the optimizer's.
    """

    model: nn.Module
    targets: dict[str, tuple[int, int]]
    inputs: dict[str, Tensor]
    floor_inputs: dict[str, Tensor]
    run: Run
    tokens: int
    layers: int
    output_grads: list[Tensor] | None = None
    repeats: int = 1
    trains: bool = True


@dataclass
class Step:
    """One training step: forward, backward and, where there is one, the optimizer's."""

    module: nn.Module
    inputs: dict[str, Tensor]
    run: Run
    output_grads: Sequence[Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    fuse_report: Any = None

    @classmethod
    def of(cls, workload: Workload, module: Any, **options: Any) -> "Step":
        return cls(module, workload.inputs, workload.run, workload.output_grads, **options)

    def forward(self) -> list[Tensor]:
        return self.run(self.module, self.inputs)

    def clear_gradients(self) -> None:
        for tensor in (*self._parameters, *self.inputs.values()):
            tensor.grad = None

    @cached_property
    def _parameters(self) -> list[Tensor]:
        # Looked up once: walking a model's modules takes longer than a small step.
        return [p for p in self.module.parameters() if p.requires_grad]

    def __call__(self) -> None:
        self.clear_gradients()
        torch.autograd.backward(self.forward(), self.output_grads)
        if self.optimizer is not None:
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and optimizer state."""
        found = [*self.module.parameters(), *self.module.buffers()]
        if self.optimizer is not None:
            for state in self.optimizer.state.values():
                found += [value for value in state.values() if isinstance(value, Tensor)]
        return found

    def in_float64(self) -> "Step":
        """A copy of model and batch in float64, without the optimizer."""
        inputs = {
            name: value.detach().double().requires_grad_(value.requires_grad)
            if value.is_floating_point()
            else value
            for name, value in self.inputs.items()
        }
        grads = None if self.output_grads is None else [g.double() for g in self.output_grads]
        return Step(copy.deepcopy(self.module).double(), inputs, self.run, grads)


def twin(workload: Workload) -> Workload:
    """The same workload around another model object, which shares the frozen weights."""
    kept = [p for p in workload.model.parameters() if not p.requires_grad]
    memo = {id(tensor): tensor for tensor in (*kept, *workload.model.buffers())}
    return replace(workload, model=copy.deepcopy(workload.model, memo))


def linears(model: nn.Module, adapted: str) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of the linear layers whose whole name matches."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(adapted, name)
    }


def uniform_ranks(targets: Mapping[str, tuple[int, int]], rank: int = RANK) -> dict[str, int]:
    return dict.fromkeys(targets, rank)


def mixed_ranks(targets: Mapping[str, tuple[int, int]], rank: int = RANK) -> dict[str, int]:
    """Ranks between 0 and 4 x rank with exactly the parameters of `uniform_ranks`."""
    return _cycled(targets, rank, [0, 4 * rank, rank // 4, rank, rank // 2, rank // 4])


def sparse_ranks(targets: Mapping[str, tuple[int, int]], rank: int = RANK) -> dict[str, int]:
    """As `mixed_ranks`, with rank 0 for four of six layers."""
    return _cycled(targets, rank, [0, 0, 4 * rank, 0, 0, 2 * rank])


def _cycled(
    targets: Mapping[str, tuple[int, int]], rank: int, cycle: Sequence[int]
) -> dict[str, int]:
    """Layers of one shape class (equal in_features + out_features, hence equal cost of a rank)
    share the cycle, whose mean is `rank`; what is left over after the last full cycle keeps `rank`.
    """
    classes: dict[int, list[str]] = {}
    for name, shape in targets.items():
        classes.setdefault(sum(shape), []).append(name)
    ranks = uniform_ranks(targets, rank)
    for names in classes.values():
        whole = len(names) - len(names) % len(cycle)
        for index, name in enumerate(names[:whole]):
            # The shift by one per cycle keeps a kind of linear from having one rank in every layer.
            ranks[name] = cycle[(index + index // len(cycle)) % len(cycle)]
    return ranks


def with_adapters(
    workload: Workload,
    ranks: Mapping[str, int],
    *,
    dropout: float = 0.0,
    autocast_adapter_dtype: bool = True,
) -> Any:
    """PEFT LoRA on `workload.model`, alpha = 2 x rank everywhere, A and B both random.

    B is not left at zero: then every gradient of A would be zero too, and comparing them would
    prove nothing.
    """
    from peft import LoraConfig, get_peft_model

    chosen = {name: rank for name, rank in ranks.items() if rank > 0}
    config = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        lora_dropout=dropout,
        target_modules=list(chosen),
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in chosen.items()},
        alpha_pattern={f"^{re.escape(name)}$": 2 * rank for name, rank in chosen.items()},
    )
    torch.manual_seed(SEED + 1)
    model = get_peft_model(
        workload.model, config, autocast_adapter_dtype=autocast_adapter_dtype
    ).train()
    generator = torch.Generator().manual_seed(SEED + 2)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values)
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
