"""Every error a user can cause. Each names what is wrong and what to do about it.

A caller can catch :class:`HeteroLoraError` for all of them; the command line prints the message on
one line and exits with status 2.
"""

__all__ = [
    "AdapterFileError",
    "AllocationFileError",
    "BudgetError",
    "DataError",
    "DegenerateScoreError",
    "FuseError",
    "HeteroLoraError",
    "ModelError",
    "ScoreError",
    "SearchSpaceError",
    "ShortcutError",
    "TrainingError",
]


class HeteroLoraError(Exception):
    """Base class of all errors raised on purpose by heterolora."""


class ModelError(HeteroLoraError):
    """The model cannot be found, loaded, or used for what was asked."""


class DataError(HeteroLoraError):
    """A data set is missing, empty, unreadable, or lacks a usable text or label column."""


class BudgetError(HeteroLoraError):
    """A parameter budget is malformed, or too small for any adapter."""


class SearchSpaceError(HeteroLoraError):
    """The candidate modules or ranks are empty, unknown, or contradictory."""


class ScoreError(HeteroLoraError):
    """Proxy scores cannot be used: not finite, or the proxy does not apply to this model."""


class DegenerateScoreError(ScoreError):
    """A proxy is identically zero (SNIP and SynFlow at B = 0): ranking by it would be noise."""


class AllocationFileError(HeteroLoraError):
    """A saved allocation is malformed or was written by a newer schema."""


class FuseError(HeteroLoraError):
    """`fuse` was given no PEFT LoRA model, or `strict=True` met a module it had to decline."""


class ShortcutError(HeteroLoraError):
    """Shortcuts cannot be put on this model, or a source is not there when its shortcut runs."""


class AdapterFileError(HeteroLoraError):
    """A saved adapter is malformed or unsafe to load; the message names the file and key."""


class TrainingError(HeteroLoraError):
    """Training cannot go on (for example a NaN loss)."""
