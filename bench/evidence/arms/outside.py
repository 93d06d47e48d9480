"""What comes from PEFT: its default modules, EVA, AdaLoRA, and the optimizer of LoRA+."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from transformers import TrainerCallback

from heterolora.bench.evidence.arms.setting import SCALING, Adapted, Setting, onto
from heterolora.bench.harness.timing import BenchError
from heterolora.search import uniform

__all__ = ["AllocateRanks", "adalora", "eva", "peft_targets"]


def peft_targets(setting: Setting) -> Adapted:
    """One rank on the modules that PEFT adapts where it is told none (query and value, mostly), the
    highest that the budget pays for.

    Raises:
        BenchError: PEFT has no default for the model.
    """
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    plain = uniform(setting.model, setting.rank, setting.space)
    kind = setting.model.config.model_type
    endings = DEFAULTS.get(kind, ())
    chosen = [name for name in plain.ranks if name.split(".")[-1] in endings]
    if not chosen:
        raise BenchError(f"PEFT adapts no module of {kind!r} by default; leave out peft-targets")
    cost = sum(plain.sites[name].unit_cost for name in chosen)
    ranks = dict.fromkeys(plain.ranks, 0) | dict.fromkeys(chosen, plain.budget_parameters // cost)
    return onto(setting, replace(plain, ranks=ranks))


def eva(setting: Setting) -> Adapted:
    """EVA (arXiv 2410.07170, PEFT's code): A from the activations' principal components, as many
    for a module as their share of the explained variance earns, up to twice the average.

    EVA keeps the sum of the ranks, not the parameters. Where that exceeds the budget, the last
    component of the module with the most is dropped until it does not.
    """
    from peft import EvaConfig, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights

    plain = uniform(setting.model, setting.rank, setting.space, scaling=SCALING)
    config = plain.lora_config
    config.init_lora_weights = "eva"
    config.eva_config = EvaConfig(rho=2.0)
    start = time.perf_counter()
    model = get_peft_model(setting.model, config)
    # EVA reads labels as one a token, to leave out the tokens without a loss.
    rows = [
        {
            key: value
            for key, value in batch.items()
            if key != "labels" or value.shape == batch["input_ids"].shape
        }
        for batch in setting.batches()
    ]
    state = get_eva_state_dict(model, rows, show_progress_bar=False)
    names = {key: key.removeprefix("base_model.model.") for key in state}
    ranks = {key: len(components) for key, components in state.items()}

    def parameters() -> int:
        return sum(rank * plain.sites[names[key]].unit_cost for key, rank in ranks.items())

    wanted = parameters()
    while parameters() > plain.budget_parameters:
        # The last of equals: what EVA itself lists first reads an input that others share.
        top = max(reversed(ranks), key=ranks.__getitem__)
        ranks[top] -= 1
    state = {key: components[: ranks[key]].clone() for key, components in state.items()}
    initialize_lora_eva_weights(model, eva_state_dict=state)
    return Adapted(
        model,
        {names[key]: rank for key, rank in ranks.items()},
        search_seconds=time.perf_counter() - start,
        notes={"parameters_before_trim": wanted},
    )


class AllocateRanks(TrainerCallback):
    """Has AdaLoRA prune after every optimizer step, which PEFT leaves to the training loop.

    Attributes:
        calls: how often it did.
    """

    def __init__(self) -> None:
        self.calls = 0

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        # Before Trainer clears the gradients, which AdaLoRA reads, and before it counts the step.
        model.base_model.update_and_allocate(state.global_step)
        self.calls += 1


def adalora(setting: Setting) -> Adapted:
    """AdaLoRA (arXiv 2303.10512, PEFT's code) from twice the average rank down to it.

    The first tenth of the steps keeps all ranks and the last three tenths keep what was chosen;
    everything else is PEFT's default. Its budget is the sum of the ranks, so the parameters may be
    above or below those of uniform ranks.
    """
    from peft import AdaLoraConfig, get_peft_model

    plain = uniform(setting.model, setting.rank, setting.space, scaling=SCALING)
    first = 2 * setting.rank
    config = AdaLoraConfig(
        task_type=plain.task_type,
        target_modules=list(plain.ranks),
        init_r=first,
        target_r=setting.rank,
        # PEFT divides by the first rank.
        lora_alpha=int(SCALING * first),
        total_step=setting.steps,
        tinit=setting.steps // 10,
        tfinal=max(1, 3 * setting.steps // 10),
    )
    model = get_peft_model(setting.model, config)
    pruning = AllocateRanks()

    def facts() -> dict[str, Any]:
        left = _ranks(model)
        # A row of A, a column of B and the value between them.
        cost = {name: site.unit_cost + 1 for name, site in plain.sites.items()}
        enabled = sum(rank * cost[name] for name, rank in left.items())
        return {
            "ranks": left,
            "update_and_allocate_calls": pruning.calls,
            "parameters": {
                "enabled": enabled,
                "ever_trained": first * sum(cost.values()),
                "stored": enabled,
            },
        }

    return Adapted(
        model,
        dict.fromkeys(plain.ranks, first),
        fused=False,
        callbacks=[pruning],
        facts=facts,
    )


def _ranks(model: Any) -> dict[str, int]:
    """{module name: singular values that are not zero}."""
    return {
        name: int(torch.count_nonzero(layer.lora_E["default"]))
        for name, layer in model.get_base_model().named_modules()
        if hasattr(layer, "lora_E")
    }
