"""The rungs: each a list of cases and a check that says what is wrong with one, or nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

import heterolora
from heterolora.kernels import Branch, Site, group_linear, spec
from heterolora.verify.groups import GROUPS, Draw, Group, leaves

__all__ = ["NOT_HERE", "RUNGS", "Rung"]

NOT_HERE = {
    "interpreter": "this version has no Triton kernels yet",
    "compile": "this version has no Triton kernels yet",
    "gpu": "this version has no Triton kernels yet",
}


@dataclass(frozen=True)
class Rung:
    """One kind of proof.

    Attributes:
        title: what it proves.
        cases: names of its cases.
        check: takes a case, returns what is wrong, or None.
    """

    title: str
    cases: Sequence[str]
    check: Callable[[str], str | None]


class OpCounter(TorchDispatchMode):
    """Counts calls of this package's ops, so that no check passes on a fallback."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func.namespace == "heterolora"
        return func(*args, **(kwargs or {}))


def error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error, computed in float64; inf if the value is not finite."""
    difference = (value.double() - truth.double()).norm()
    relative = (difference / truth.double().norm().clamp_min(1e-300)).item()
    return relative if torch.isfinite(difference) else float("inf")


def _check_spec(case: str) -> str | None:
    """The specification's forward against finite differences, its backward against autograd."""
    torch.manual_seed(0)
    group = GROUPS[case](Draw(torch.float64))
    tensors = leaves(group)
    try:
        torch.autograd.gradcheck(lambda *_: tuple(spec.group_linear(*group)), tensors)
    except GradcheckError as failure:
        return str(failure).strip().splitlines()[0]
    outputs = spec.group_linear(*group)
    grads = [torch.randn_like(y) for y in outputs]
    found = spec.group_linear_backward(grads, *group)
    truth = dict(
        zip(
            tensors,
            torch.autograd.grad(outputs, tensors, grads, materialize_grads=True),
            strict=True,
        )
    )
    x, sites, branches = group
    pairs = [(found.x, truth[x])]
    pairs += [
        (grad, truth[site.bias])
        for grad, site in zip(found.bias, sites, strict=True)
        if grad is not None and site.bias is not None
    ]
    for branch, d_a, d_b in zip(branches, found.a, found.b, strict=True):
        pairs += [(d_a, truth[branch.a]), (d_b, truth[branch.b])]
    worst = max(error(value, expected) for value, expected in pairs)
    return None if worst < 1e-12 else f"written-out backward is off by {worst:.1e}"


def _check_aten(case: str) -> str | None:
    """Outputs and all gradients against the specification in float64.

    The bound is twice the error of the specification itself run in the dtype, and at least one
    rounding of it.
    """
    name, _, label = case.partition(" ")
    dtype: torch.dtype = getattr(torch, label)
    torch.manual_seed(0)
    group = GROUPS[name](Draw(dtype))
    with OpCounter() as counter:
        values, grads = _outputs_and_gradients(group_linear, group)
    if counter.calls != 2:
        return f"{counter.calls} calls of the op instead of a forward and a backward"
    truth, _ = _outputs_and_gradients(
        spec.group_linear, _double(group), [grad.double() for grad in grads]
    )
    eager, _ = _outputs_and_gradients(spec.group_linear, group, grads)
    for index, (value, other, expected) in enumerate(zip(values, eager, truth, strict=True)):
        bound = max(2 * error(other, expected), torch.finfo(dtype).eps)
        if expected.numel() and not error(value, expected) <= bound:
            return f"result {index} is off by {error(value, expected):.1e}, allowed {bound:.1e}"
    return None


def _check_peft(case: str) -> str | None:
    """A fused model against the same model unfused: logits and adapter gradients in float32."""
    torch.manual_seed(0)
    model, batch = _MODELS[case]()
    plain = _logits_and_gradients(model, batch)
    report = heterolora.fuse(model, example=batch)
    if report.declined:
        return f"declined: {report.declined}"
    with OpCounter() as counter:
        fused = _logits_and_gradients(model, batch)
    if not counter.calls:
        return "the op did not run"
    worst = max(error(fused[name], value) for name, value in plain.items())
    return None if worst < 1e-5 else f"off by {worst:.1e}, allowed 1e-5"


def _outputs_and_gradients(
    function: Callable[..., list[Tensor]], group: Group, grads: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    outputs = function(*group)
    if grads is None:
        grads = [torch.randn_like(y) for y in outputs]
    found = torch.autograd.grad(outputs, leaves(group), grads, materialize_grads=True)
    return [*outputs, *found], grads


def _double(group: Group) -> Group:
    known: dict[Tensor, Tensor] = {}

    def to(tensor: Any) -> Any:
        if tensor is None:
            return None
        if tensor not in known:
            known[tensor] = tensor.detach().double().requires_grad_(tensor.requires_grad)
        return known[tensor]

    x, sites, branches = group
    return (
        to(x),
        [Site(to(s.weight), to(s.bias)) for s in sites],
        [Branch(b.site, to(b.a), to(b.b), b.scale, to(b.source), to(b.mask)) for b in branches],
    )


def _adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return adapted


def _encoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    ids = torch.randint(0, 97, (3, 9))
    return _adapted(BertForSequenceClassification(config)), {
        "input_ids": ids,
        "labels": torch.tensor([0, 1, 1]),
    }


def _decoder() -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=80,
    )
    ids = torch.randint(0, 97, (3, 9))
    return _adapted(LlamaForCausalLM(config)), {"input_ids": ids, "labels": ids}


def _logits_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **grads}


_MODELS = {"bert": _encoder, "llama": _decoder}
# Not float64: the truth is computed in it.
_DTYPES = ("float32", "bfloat16", "float16")

RUNGS = {
    # gradcheck moves one element of an input at a time, which an expanded input does not have.
    "spec": Rung(
        "spec is its own derivative (gradcheck, float64)",
        [name for name in GROUPS if name != "expanded_input"],
        _check_spec,
    ),
    "aten": Rung(
        "aten is as exact as spec in every dtype",
        [f"{name} {dtype}" for name in GROUPS for dtype in _DTYPES],
        _check_aten,
    ),
    "peft": Rung("a fused PEFT model equals PEFT (float32)", list(_MODELS), _check_peft),
}
