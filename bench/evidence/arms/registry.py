"""The arms: how each gets from a fresh model and a budget to a model that trains.

An arm is a line in `ARMS`: a name, the family it shares a learning rate with, what it is, and a
function from a `Setting` to an `Adapted` model. One that scores with `heterolora.allocate` needs no
function of its own: ``Arm("name", "uniform", "...", allocated("proxy", floor=1))``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from heterolora.bench.evidence.arms import outside
from heterolora.bench.evidence.arms.ablation import PARTS, ablated
from heterolora.bench.evidence.arms.candidates import all_linear, encoder_shuffled, pooler_by_hand
from heterolora.bench.evidence.arms.dynamic import ON_OFF, dynamic
from heterolora.bench.evidence.arms.setting import Adapted, Setting, onto, searched
from heterolora.data.models import disable_dropout
from heterolora.search import Budget, Variant, uniform
from heterolora.shortcuts.model import KINDS, shortcut_candidates

__all__ = ["ARMS", "PAST", "Arm", "allocated", "families"]

# The part of uniform's training time that arms about time may take.
SHORT = 0.6

# The part of the steps that keeps within it: 0.6 of them were measured to take 0.62 of the time.
FEWER = 0.57

# The part of the steps that keeps within it without dropout, also where uniform ranks have the
# faster attention too: a step was measured to take 0.75 to 0.9 of theirs then.
FEWER_WITHOUT_DROPOUT = 0.65

# Steps of the head before spectral scores are taken.
WARM = 70

# Of `heterolora search`, for a model with a head and a budget of parameters above rank 1.
_DEFAULTS: dict[str, Any] = {"proxy": "spectral", "head_steps": WARM, "floor": 1}


@dataclass(frozen=True)
class Arm:
    """One way to spend a budget.

    Attributes:
        family: arms of one family train at the learning rate that `families` chose for it.
        about: a line for the list of arms.
        build: adapts the fresh model of a setting.
        encoder: it trains a task head beforehand, or goes by the names of BERT's layers.
    """

    name: str
    family: str
    about: str
    build: Callable[[Setting], Adapted]
    encoder: bool = False


def allocated(
    proxy: str,
    *,
    on_off: bool = False,
    shortcuts: bool = False,
    **variant: Any,
) -> Callable[[Setting], Adapted]:
    """Builds a model with the ranks of `heterolora.allocate`.

    Args:
        proxy: as of `allocate`.
        on_off: a module has `ON_OFF` times the average rank or none.
        shortcuts: they compete for the budget, which stays that of the modules.
        variant: fields of `heterolora.Variant`.
    """

    def build(setting: Setting) -> Adapted:
        budget = Budget(rank=setting.rank)
        if shortcuts:
            plain = uniform(setting.model, setting.rank, setting.space)
            budget = Budget(params=plain.parameters)
            setting = replace(setting, space=replace(setting.space, shortcuts=KINDS))
        ranks = (0, ON_OFF * setting.rank) if on_off else None
        found = searched(setting, proxy, ranks, budget, variant=Variant(**variant))
        return onto(setting, found)

    return build


def _uniform(setting: Setting) -> Adapted:
    return onto(setting, uniform(setting.model, setting.rank, setting.space))


def _varied(*, share: float = 1.0, dropout: bool = True) -> Callable[[Setting], Adapted]:
    """Builds uniform ranks, to be trained for fewer steps or without dropout."""

    def build(setting: Setting) -> Adapted:
        if not dropout:
            disable_dropout(setting.model)
            if setting.bf16 and next(setting.model.parameters()).device.type == "cpu":
                # PyTorch's attention takes its flash form without dropout, and on a CPU a training
                # step of rows this short was measured to take 1.4 to 1.8 times as long with it.
                setting.model.set_attn_implementation("eager")
        return replace(_uniform(setting), share=share)

    return build


def _shortcuts(setting: Setting) -> Adapted:
    """LoRA of the given rank everywhere, and every shortcut at that rank and scale too."""
    space = replace(setting.space, shortcuts=KINDS)
    return onto(setting, uniform(setting.model, setting.rank, space))


def _higher(setting: Setting) -> Adapted:
    """LoRA at the parameters of `shortcuts-all`: two neighbouring ranks, the modules at random."""
    plain = uniform(setting.model, setting.rank, setting.space)
    more = sum(candidate.unit_cost for candidate in shortcut_candidates(setting.model))
    budget = plain.parameters + setting.rank * more
    low = budget // sum(site.unit_cost for site in plain.sites.values())
    found = searched(setting, "constant", (low, low + 1), Budget(params=budget))
    return onto(setting, found)


def _warm(
    name: str, about: str, *, proxy: str = "spectral", family: str = "uniform", **options: Any
) -> Arm:
    """An arm that scores after `WARM` steps of the head, which a decoder does not have."""
    return Arm(name, family, about, allocated(proxy, head_steps=WARM, **options), encoder=True)


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("uniform", "uniform", "the same rank everywhere", _uniform),
        Arm(
            "peft-targets",
            "peft-targets",
            "PEFT's default modules (query and value), all at one rank",
            outside.peft_targets,
        ),
        Arm(
            "all-linear",
            "all-linear",
            "as heterolora train --rank: the pooler has an adapter, and is not trained in full",
            all_linear(_uniform),
        ),
        Arm(
            "all-linear-search",
            "all-linear",
            "the same with the ranks of heterolora search and its defaults",
            all_linear(allocated(**_DEFAULTS)),
            encoder=True,
        ),
        Arm(
            "all-linear-shuffled",
            "all-linear",
            "all-linear-search's scores dealt out anew",
            all_linear(allocated(**_DEFAULTS, shuffle=True)),
            encoder=True,
        ),
        Arm(
            "all-linear-encoder-shuffled",
            "all-linear",
            "all-linear-search's ranks, dealt out anew but for the pooler's",
            all_linear(encoder_shuffled(**_DEFAULTS)),
            encoder=True,
        ),
        Arm(
            "all-linear-pooler",
            "all-linear",
            "the pooler at four times the rank by hand, the others by equal scores",
            all_linear(pooler_by_hand),
            encoder=True,
        ),
        Arm(
            "all-linear-peft-targets",
            "all-linear-peft-targets",
            "PEFT's default modules at the same parameters, and no more trained in full",
            all_linear(outside.peft_targets),
        ),
        Arm("random", "uniform", "ranks of equal scores", allocated("constant")),
        Arm(
            "random-onoff",
            "on-off",
            "equal scores: modules of a quarter of the size of all, at four times the rank",
            allocated("constant", on_off=True),
        ),
        Arm("grad-norm", "uniform", "ranks by gradient norm", allocated("grad-norm")),
        Arm(
            "grad-norm-onoff",
            "on-off",
            "HeteroLoRA's form: the top quarter by gradient norm",
            allocated("grad-norm", on_off=True),
        ),
        Arm(
            "grad-norm-layers",
            "uniform",
            "gradient norm, every layer's total the same",
            allocated("grad-norm", by_layer=True),
        ),
        Arm("snip", "uniform", "ranks by SNIP", allocated("snip")),
        Arm("synflow", "uniform", "ranks by SynFlow of the loss", allocated("synflow")),
        Arm(
            "synflow-output",
            "uniform",
            "ranks by SynFlow of the summed output",
            allocated("synflow-output"),
        ),
        Arm("spectral", "uniform", "ranks by spectral gain", allocated("spectral")),
        Arm(
            "spectral-floor",
            "uniform",
            "the same, and rank 1 at least",
            allocated("spectral", floor=1),
        ),
        _warm("spectral-warm", "spectral gain after 70 steps of the head"),
        _warm("spectral-warm-floor", "the same, and rank 1 at least", floor=1),
        _warm(
            "sigma-warm-floor",
            "the same by sigma in place of its square",
            proxy="spectral-sigma",
            floor=1,
        ),
        _warm(
            "spectral-warm-layers",
            "spectral-warm, every layer's total the same",
            by_layer=True,
        ),
        Arm(
            "spectral-trained",
            "uniform",
            "spectral gain, the mean over 40 training steps",
            allocated("spectral", train_steps=40),
        ),
        _warm("shuffled", "spectral-warm's scores dealt out anew", shuffle=True),
        Arm("eva", "eva", "PEFT's EVA, rho 2", outside.eva),
        Arm("adalora", "adalora", "PEFT's AdaLoRA, from twice the rank", outside.adalora),
        Arm(
            "dynamic-grad-norm",
            "dynamic",
            "HeteroLoRA's dynamic form, by gradient norm",
            dynamic("grad-norm"),
        ),
        Arm(
            "dynamic-spectral",
            "dynamic",
            "the same by spectral gain",
            dynamic("spectral"),
        ),
        Arm("shortcuts-all", "shortcuts", "uniform, and all four kinds of shortcut", _shortcuts),
        Arm("lora-higher", "uniform", "LoRA at the parameters of shortcuts-all", _higher),
        Arm(
            "shortcuts-even",
            "shortcuts",
            "ranks of equal scores, 1 at least, of modules and shortcuts, at uniform's parameters",
            allocated("constant", shortcuts=True, floor=1),
        ),
        _warm(
            "shortcuts-spectral",
            "the same by spectral gain after 70 steps of the head",
            family="shortcuts",
            shortcuts=True,
            floor=1,
        ),
        Arm("short", "short", "uniform, 0.6 of the steps", _varied(share=SHORT)),
        Arm("short-57", "short", "uniform, 0.57 of the steps", _varied(share=FEWER)),
        Arm(
            "no-dropout",
            "no-dropout",
            "uniform, the model's dropout off",
            _varied(dropout=False),
        ),
        Arm(
            "no-dropout-65",
            "no-dropout-65",
            "the same, 0.65 of the steps",
            _varied(dropout=False, share=FEWER_WITHOUT_DROPOUT),
        ),
    )
}

for _part in PARTS:
    _about = f"only {_part} is adapted"
    ARMS[f"alone-{_part}"] = Arm(f"alone-{_part}", "alone", _about, ablated(_part), encoder=True)

# Arms that lost, or were only there to bound others, and that nothing uses any more: their results
# are kept and reported, their code is gone.
PAST = {
    "oracle-sick": "ranks by what modules of SICK-E's ablation were worth alone, on its test rows",
    "shortcuts-searched": "modules and shortcuts by gradient norm, at uniform's parameters",
    "quarter-random": "ranks of equal scores at a quarter of the parameters",
    "quarter-grad-norm": "grad-norm at a quarter of the parameters",
    "quarter-spectral-warm": "spectral-warm at a quarter of the parameters",
    "quarter-spectral-layers": "the same, every layer's total the same",
    "time-spectral-warm": "spectral-warm within 0.6 of uniform's step, by a budget of time",
    "plus-57": "uniform, LoRA+ with 4 times the rate for B, 0.57 of the steps",
}

# The arm that chooses the learning rate of a family, where it is not the family's namesake.
_REPRESENTATIVES = {
    "on-off": "random-onoff",
    "dynamic": "dynamic-grad-norm",
    "shortcuts": "shortcuts-all",
    "alone": "alone-3-value",
}


def families(arms: Sequence[str]) -> dict[str, str]:
    """{family: the arm that chooses its learning rate} of these arms, in their order."""
    names = dict.fromkeys(ARMS[arm].family for arm in arms)
    return {family: _REPRESENTATIVES.get(family, family) for family in names}
