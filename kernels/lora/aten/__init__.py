"""The operations by the library's own matmuls: the path that runs on any device.

`ops` imports the four passes from here, and `linear` and `score` for the pieces of one; `onednn` is
a base matmul for some CPUs.
"""

from .linear import empty_s, group_linear, group_linear_backward, low_rank_add
from .score import group_score

__all__ = ["empty_s", "group_linear", "group_linear_backward", "group_score", "low_rank_add"]
