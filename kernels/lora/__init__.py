"""Kernels for frozen linear layers with mixed-rank low-rank branches.

Imports only torch, triton and the standard library. `group_linear` is the op, `spec` its meaning;
`group_linear_scored` is the same op for a pass whose gradients are only measured; `low_rank_add`
adds the branches to the outputs of base layers that run by themselves.
"""

from . import spec
from .group import Branch, Site
from .ops.add import low_rank_add
from .ops.linear import group_linear
from .ops.scored import group_linear_scored

__all__ = ["Branch", "Site", "group_linear", "group_linear_scored", "low_rank_add", "spec"]
