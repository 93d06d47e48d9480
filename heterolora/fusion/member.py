"""What a member of a group is: one LoRA layer, as it takes part in operations."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from heterolora.fusion.decline import active_adapter, dense_weight, dropout_probability, why
from heterolora.fusion.interface import changes_of, factors_in_use
from heterolora.kernels import Branch, Site

__all__ = ["Member"]


class Member:
    """One LoRA layer: what it brings into an operation, and what was learnt about it.

    Attributes:
        name: that in the base model.
        layer: the PEFT layer.
        further: branches that end at it beside its adapter's, or None.
        unfit: why nothing can be added to what its base returns; seen only once the base has run.
        asked: shape and dtype of the last input for which "auto" chose a path.
        left: shapes and dtypes of inputs that "auto" leaves to PEFT's own forward.
    """

    def __init__(self, name: str, layer: Any) -> None:
        self.name = name
        self.layer = layer
        self.further = changes_of(layer).further
        self.unfit: str | None = None
        self.asked: tuple[torch.Size, torch.dtype] | None = None
        self.left: set[tuple[torch.Size, torch.dtype]] = set()

    def why(
        self,
        backend: str,
        x: Tensor,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Reason why PEFT has to run a call with these arguments, or None."""
        return self.unfit or why(self.layer, backend, x, args, kwargs or {})

    def site(self) -> Site:
        """The base layer, where it is dense."""
        return Site(dense_weight(self.layer), self.layer.base_layer.bias)

    def adapter_branch(self, site: int) -> Branch:
        """The adapter's branch at the site of this index."""
        layer = self.layer
        name = active_adapter(layer)
        a, b = factors_in_use(layer, layer.lora_A[name].weight, layer.lora_B[name].weight)
        p = dropout_probability(layer, name)
        return Branch(site, a, b, layer.scaling[name], dropout=p)

    def branches(self, site: int, x: Tensor, *, in_pass: bool = True) -> list[Branch]:
        """All branches of an operation on x at the site of this index, the adapter's first.

        Args:
            in_pass: whether the model runs, so that the sources of further branches are known.
        """
        if self.further is None:
            return [self.adapter_branch(site)]
        further = self.further.branches if in_pass else self.further.shapes
        return [self.adapter_branch(site), *further(site, x)]

    def branch_names(self) -> list[str]:
        """A name for each of `branches`."""
        return [self.name, *(() if self.further is None else self.further.names())]
