"""Search: which module deserves which LoRA rank under a parameter budget."""

from heterolora.search.adapt import adapt
from heterolora.search.allocation import Allocation, allocate, uniform
from heterolora.search.budget import Budget
from heterolora.search.proxies import PROXIES
from heterolora.search.space import SearchSpace

__all__ = ["PROXIES", "Allocation", "Budget", "SearchSpace", "adapt", "allocate", "uniform"]
