"""Arms that adapt a single module: what it is worth alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from heterolora.bench.evidence.arms.setting import Adapted, Setting, onto
from heterolora.bench.harness.timing import BenchError
from heterolora.search import uniform

__all__ = ["KINDS", "PARTS", "ablated", "part_of"]

# Of a BERT encoder: 6 layers of 6 linear layers in MiniLM.
KINDS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention-out": "attention.output.dense",
    "ffn-in": "intermediate.dense",
    "ffn-out": "output.dense",
}
PARTS = tuple(f"{layer}-{kind}" for layer in range(6) for kind in KINDS)


def ablated(part: str) -> Callable[[Setting], Adapted]:
    """Builds a model with the budget's rank on one module, and none on all others.

    Args:
        part: one of `PARTS`.
    """

    def build(setting: Setting) -> Adapted:
        plain = uniform(setting.model, setting.rank, setting.space)
        if part not in {part_of(name) for name in plain.ranks}:
            raise BenchError(f"the model has no module {part}; its ablation is of six layers")
        ranks = {name: rank if part_of(name) == part else 0 for name, rank in plain.ranks.items()}
        return onto(setting, replace(plain, ranks=ranks))

    return build


def part_of(name: str) -> str | None:
    """The entry of `PARTS` for a module's name, or None."""
    match = re.search(r"\.layer\.(\d+)\.(.+)$", name)
    kinds = {ending: kind for kind, ending in KINDS.items()}
    if match is None or match.group(2) not in kinds:
        return None
    return f"{match.group(1)}-{kinds[match.group(2)]}"
