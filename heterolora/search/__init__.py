"""Search: which module deserves which LoRA rank under a budget of parameters."""

from typing import TYPE_CHECKING, Any

from heterolora.search.adapt import adapt
from heterolora.search.allocation import Allocation
from heterolora.search.budget import Budget
from heterolora.search.dynamic.export import save_enabled
from heterolora.search.dynamic.rankings import ParameterCounts
from heterolora.search.recommended import recommended
from heterolora.search.scores.proxies import PROXIES
from heterolora.search.space import SearchSpace
from heterolora.search.static import allocate, uniform
from heterolora.search.variant import Variant

if TYPE_CHECKING:
    from heterolora.search.dynamic.callback import DynamicSearchCallback

__all__ = [
    "PROXIES",
    "Allocation",
    "Budget",
    "DynamicSearchCallback",
    "ParameterCounts",
    "SearchSpace",
    "Variant",
    "adapt",
    "allocate",
    "recommended",
    "save_enabled",
    "uniform",
]


def __getattr__(name: str) -> Any:
    # Transformers takes a second to import, and only this needs its Trainer.
    if name == "DynamicSearchCallback":
        from heterolora.search.dynamic.callback import DynamicSearchCallback

        return DynamicSearchCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
