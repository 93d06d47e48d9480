"""Kernels for frozen linear layers with mixed-rank low-rank branches.

Imports only torch, triton and the standard library. `group_linear` is the op, `spec` its meaning.
"""

from . import spec
from .layout import Branch, Site
from .ops import group_linear

__all__ = ["Branch", "Site", "group_linear", "spec"]
