"""What a group has to satisfy; each check says what is wrong, or nothing."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.kernels import Branch, Site, spec
from heterolora.verify.groups import Draw, Group, dropout_seed, leaves, named_leaves
from heterolora.verify.operations import OPERATIONS, Operation, base_outputs, statistics

__all__ = [
    "OpCounter",
    "check_added_derivative",
    "check_derivative",
    "check_parity",
    "check_repeats",
    "check_score_meaning",
    "compare",
    "converted",
    "error",
    "guarded",
]

Build = Callable[[Draw], Group]
Run = Callable[[Group], tuple[list[Tensor], list[Tensor]]]
_DRAWS = 16


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


def guarded(check: Callable[..., str | None], *arguments: Any, **options: Any) -> str | None:
    """A check whose exceptions are what is wrong."""
    try:
        return check(*arguments, **options)
    except Exception as failure:
        text = str(failure).strip().splitlines()
        return f"{type(failure).__name__}: {text[0] if text else 'no message'}"


def error(value: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error, computed in float64; inf if the value is not finite."""
    difference = (value.double() - truth.double()).norm()
    relative = (difference / truth.double().norm().clamp_min(1e-300)).item()
    return relative if torch.isfinite(difference) else float("inf")


def check_derivative(build: Build) -> str | None:
    """The specification's forward against finite differences, its backward against autograd."""
    group, seed = build(Draw(torch.float64)), dropout_seed()
    tensors = leaves(group)

    def forward(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(spec.group_linear(*group, seed))

    problem = _gradcheck(forward, tensors)
    if problem is not None:
        return problem
    outputs = spec.group_linear(*group, seed)
    grads = [torch.randn_like(y) for y in outputs]
    truth = torch.autograd.grad(outputs, tensors, grads, materialize_grads=True)
    written = _written_out(grads, group, seed)
    for tensor, expected in zip(tensors, truth, strict=True):
        off = error(written[tensor], expected)
        if not off < 1e-12:
            return f"written-out gradient of {named_leaves(group)[tensor]} is off by {off:.1e}"
    return None


def check_added_derivative(build: Build) -> str | None:
    """`spec.low_rank_add` against finite differences, and against `spec.group_linear`."""
    group, seed = build(Draw(torch.float64)), dropout_seed()
    x, sites, branches = group

    def forward(*_: Tensor) -> tuple[Tensor, ...]:
        return tuple(spec.low_rank_add(base_outputs(group), x, branches, seed))

    problem = _gradcheck(forward, leaves(group))
    if problem is not None:
        return problem
    base = [y.detach() for y in spec.group_linear(x, sites, [], seed)]
    found, expected = spec.low_rank_add(base, x, branches, seed), spec.group_linear(*group, seed)
    worst = max(error(value, truth) for value, truth in zip(found, expected, strict=True))
    return None if worst < 1e-12 else f"not what group_linear adds: off by {worst:.1e}"


def check_score_meaning(build: Build) -> str | None:
    """`spec.group_score` against sums over the gradients that autograd gives."""
    group, seed = build(Draw(torch.float64)), dropout_seed()
    outputs = spec.group_linear(*group, seed)
    grads = [torch.randn_like(y) for y in outputs]
    for j, (branch, score) in enumerate(
        zip(group[2], spec.group_score(grads, *group, seed), strict=True)
    ):
        d_a, d_b = torch.autograd.grad(
            outputs, [branch.a, branch.b], grads, retain_graph=True, materialize_grads=True
        )
        expected = (
            torch.einsum("ik,jk->ij", d_a, d_a),
            torch.einsum("ni,nj->ij", d_b, d_b),
            torch.tensordot(branch.a.abs(), d_a.abs(), 2),
            torch.tensordot(branch.b.abs(), d_b.abs(), 2),
        )
        for value, truth in zip(statistics(score), expected, strict=True):
            if not error(value, truth) < 1e-12:
                return f"a statistic of branch {j} is off by {error(value, truth):.1e}"
    return None


def _gradcheck(forward: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> str | None:
    try:
        torch.autograd.gradcheck(forward, tensors)
    except GradcheckError as failure:
        return str(failure).strip().splitlines()[0]
    return None


def _written_out(grads: list[Tensor], group: Group, seed: Tensor) -> dict[Tensor, Tensor]:
    """spec.group_linear_backward by tensor; a tensor used twice gets the sum."""
    x, sites, branches = group
    found = spec.group_linear_backward(grads, *group, seed)
    parts = [(x, found.x), *zip((site.bias for site in sites), found.bias, strict=True)]
    for j, branch in enumerate(branches):
        parts += [(branch.a, found.a[j]), (branch.b, found.b[j])]
        parts.append((branch.source, found.source[j]))
    total: dict[Tensor, Tensor] = {}
    for tensor, grad in parts:
        if tensor is not None and grad is not None:
            total[tensor] = total[tensor] + grad if tensor in total else grad
    return total


def check_parity(
    build: Build,
    dtype: torch.dtype,
    implementation: str,
    *,
    operation: str = "group_linear",
    factors: torch.dtype | None = None,
    device: str = "cpu",
    run: Run | None = None,
) -> str | None:
    """Outputs and all gradients against the specification in float64.

    A result may be off by twice the root mean square error that the specification has, run op by op
    in the dtype; by a rounding where that happens to be exact; and by twice the error expected of
    summing the longest sum in float32 term by term, since no order is promised. In float64, which
    no truth surpasses, it may differ by a rounding for each term. A result of a few elements may
    miss that by chance, so what fails on one draw of operands is judged anew over 16.

    Args:
        operation: one of `OPERATIONS`.
        factors: dtype of A and B, if not that of x.
        run: gives results and dY of a group; the operation, whose calls of ops are counted, if not
            given.
    """
    op = OPERATIONS[operation]
    draws: list[list[_Squares]] = []
    for seed in range(_DRAWS):
        group = build(Draw(dtype, factors, device=device, seed=seed))
        if run is None:
            with OpCounter() as counter:
                values, grads = op.run(group, implementation, None)
            if counter.calls != op.calls(group):
                return f"{counter.calls} calls of ops instead of {op.calls(group)}"
        else:
            values, grads = run(group)
        for tensor, grad in zip(leaves(group), values[len(grads) :], strict=False):
            if operation != "group_score" and (grad.dtype, grad.shape) != (
                tensor.dtype,
                tensor.shape,
            ):
                return f"gradient of {named_leaves(group)[tensor]} is {grad.dtype} {grad.shape}"
        draws.append(_squares(op, group, values, grads))
        if seed == 0 and _judge(op, group, draws, implementation) is None:
            return None
    return _judge(op, group, draws, implementation)


def compare(
    group: Group, values: list[Tensor], grads: list[Tensor], implementation: str
) -> str | None:
    """Judge results of one draw, as `outputs_and_gradients` gave them, by `check_parity`'s rule."""
    op = OPERATIONS["group_linear"]
    return _judge(op, group, [_squares(op, group, values, grads)], implementation)


class _Squares(NamedTuple):
    """Mean squares over the elements of one result."""

    off: float
    eager_off: float
    truth: float


def _squares(
    op: Operation, group: Group, values: list[Tensor], grads: list[Tensor]
) -> list[_Squares]:
    exact = [grad.double() for grad in grads]
    truth, _ = op.run(converted(group, torch.float64), "spec", exact)
    eager, _ = op.run(converted(group, group[0].dtype), "spec", grads)
    return [
        _Squares(_mean_square(v.double() - t), _mean_square(e.double() - t), _mean_square(t))
        for v, e, t in zip(values, eager, truth, strict=True)
    ]


def _judge(
    op: Operation, group: Group, draws: list[list[_Squares]], implementation: str
) -> str | None:
    dtype = group[0].dtype
    terms, eps32 = _longest_sum(group), torch.finfo(torch.float32).eps
    rounding = torch.finfo(dtype).eps
    if dtype != torch.float64:
        # The k-th partial sum of t equal terms is rounded by eps / sqrt(12) of its size, sqrt(k).
        rounding = max(rounding, 2 * eps32 * math.sqrt(terms / 24))
    elif implementation == "triton" and not _exact_scalars(group):
        rounding = eps32
    else:
        rounding *= terms
    for name, results in zip(op.names(group), zip(*draws, strict=True), strict=True):
        off, eager, truth = (
            math.sqrt(sum(column) / len(draws)) for column in zip(*results, strict=True)
        )
        if not math.isfinite(eager):
            return f"{name} overflows in {dtype} as specified: the case is too large"
        allowed = rounding * truth
        if dtype != torch.float64:
            allowed = max(allowed, 2 * eager)
        if not off <= allowed:
            size = max(truth, 1e-300)
            return f"{name} is off by {off / size:.1e}, allowed {allowed / size:.1e}"
    return None


def check_repeats(
    build: Build,
    dtype: torch.dtype,
    implementation: str,
    *,
    operation: str = "group_linear",
    device: str = "cpu",
) -> str | None:
    """The results of three runs are equal bit for bit."""
    op = OPERATIONS[operation]
    group = build(Draw(dtype, device=device))
    first, grads = op.run(group, implementation, None)
    for _ in range(2):
        again, _ = op.run(group, implementation, grads)
        wrong = sum(not torch.equal(a, b) for a, b in zip(first, again, strict=True))
        if wrong:
            return f"{wrong} of {len(first)} results differ between two runs"
    return None


def converted(group: Group, dtype: torch.dtype) -> Group:
    """A copy of the group, all of one dtype, with the same tensors shared."""
    known: dict[Tensor, Tensor] = {}

    def to(tensor: Any) -> Any:
        if tensor is None:
            return None
        if tensor not in known:
            copy = tensor.detach().to(dtype, copy=True)
            known[tensor] = copy.requires_grad_(tensor.requires_grad)
        return known[tensor]

    x, sites, branches = group
    return (
        to(x),
        [Site(to(s.weight), to(s.bias)) for s in sites],
        [
            Branch(b.site, to(b.a), to(b.b), b.scale, to(b.source), to(b.mask), b.dropout)
            for b in branches
        ],
    )


def _mean_square(tensor: Tensor) -> float:
    """The mean square of the elements: 0 if there is none, inf if any is not finite."""
    found = tensor.square().mean().item() if tensor.numel() else 0.0
    return found if math.isfinite(found) else float("inf")


def _exact_scalars(group: Group) -> bool:
    """Whether what a kernel takes as float32 arguments loses nothing by it."""
    scalars = [65536 / (65536 - round(b.dropout * 65536)) for b in group[2]]
    scalars += [float(b.scale) for b in group[2] if not isinstance(b.scale, Tensor)]
    return all(torch.tensor(scalar).item() == scalar for scalar in scalars)


def _longest_sum(group: Group) -> int:
    x, sites, branches = group
    rows = x.numel() // max(x.shape[-1], 1)
    outputs = sum(site.weight.shape[0] for site in sites)
    inputs = x.shape[-1] + sum(b.a.shape[0] for b in branches)
    widths = [b.source.shape[-1] for b in branches if b.source is not None]
    return max(rows, outputs + sum(b.a.shape[0] for b in branches), inputs, *widths, 2)
