"""The score op: its meaning, `aten` against it, and that no gradient of A or B is written."""

from dataclasses import replace

import pytest
import torch
from helpers import CountOps
from torch.utils.checkpoint import checkpoint

from heterolora.kernels import Branch, Site, group_linear, group_linear_scored, spec
from heterolora.verify.groups import GROUPS, SEEDED, Draw, dropout_seed, leaves

ALL = {**GROUPS, **SEEDED}
FIELDS = ("gram_a", "gram_b", "abs_a", "abs_b")


def seed_for(name):
    return dropout_seed() if name in SEEDED else None


def flat(scores):
    return [getattr(score, field) for score in scores for field in FIELDS]


def sums_like(branches, dtype=None):
    """Gradient sums of imagined earlier batches, as large as the gradients of one."""
    return [
        tuple(3 * torch.randn(f.shape, dtype=dtype or f.dtype) for f in (j.a, j.b))
        for j in branches
    ]


def columns_of(previous):
    if previous is None:
        return {}
    return {"previous_a": [pair[0] for pair in previous], "previous_b": [p[1] for p in previous]}


def detached(group, dtype):
    """The group in another dtype, each shared tensor once, nothing requiring a gradient."""
    made = {None: None}

    def to(tensor):
        if tensor not in made:
            made[tensor] = tensor.detach().to(dtype)
        return made[tensor]

    x, sites, branches = group
    return (
        to(x),
        [Site(to(s.weight), to(s.bias)) for s in sites],
        [
            replace(
                j, a=to(j.a), b=to(j.b), scale=float(j.scale), source=to(j.source), mask=to(j.mask)
            )
            for j in branches
        ],
    )


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_spec_is_what_autograd_and_plain_sums_say(name, earlier):
    group, seed = ALL[name](Draw(torch.float64)), seed_for(name)
    branches = group[2]
    outputs = spec.group_linear(*group, seed)
    grads = [torch.randn_like(y) for y in outputs]
    previous = sums_like(branches) if earlier else None
    scores = spec.group_score(grads, *group, seed, **columns_of(previous))
    assert len(scores) == len(branches)
    for j, branch in enumerate(branches):
        factors = (branch.a, branch.b)
        d_a, d_b = torch.autograd.grad(
            outputs, factors, grads, retain_graph=True, materialize_grads=True
        )
        if previous is not None:
            d_a, d_b = d_a + previous[j][0], d_b + previous[j][1]
        expected = spec.BranchScore(
            torch.einsum("ik,jk->ij", d_a, d_a),
            torch.einsum("ni,nj->ij", d_b, d_b),
            torch.tensordot(branch.a.abs(), d_a.abs(), 2),
            torch.tensordot(branch.b.abs(), d_b.abs(), 2),
        )
        torch.testing.assert_close(flat([scores[j]]), flat([expected]))


def test_two_by_two_by_hand():
    x, site = torch.tensor([[1.0, 2.0]]), Site(torch.eye(2))
    branch = Branch(0, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]), scale=0.5)
    # S = 3, dS = 0.5 (3 + 1) = 2, dB = 0.5 * 3 * (3, -1) = (4.5, -1.5), dA = 2 * (1, 2).
    (score,) = spec.group_score([torch.tensor([[3.0, -1.0]])], x, [site], [branch])
    assert (score.gram_a.item(), score.gram_b.item()) == (20.0, 22.5)
    assert (score.abs_a.item(), score.abs_b.item()) == (6.0, 6.0)


def scored(group, grads, *, seed=None, previous=None, **options):
    """(outputs, gradients of all leaves with None where there is none, scores)."""
    records = []
    outputs = group_linear_scored(*group, records.append, previous=previous, seed=seed, **options)
    found = torch.autograd.grad(outputs, leaves(group), grads, allow_unused=True)
    return outputs, found, records


class ScoreCalls(CountOps):
    """Counts operators, and keeps how many B each call of the score op was given."""

    def __init__(self):
        super().__init__()
        self.b = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.heterolora.group_score.default:
            names = [argument.name for argument in func._schema.arguments]
            self.b.append(len(args[names.index("b")]))
        return super().__torch_dispatch__(func, types, args, kwargs)


def zeroed(group):
    """The group with every B zero, as PEFT starts."""
    with torch.no_grad():
        for branch in group[2]:
            branch.b.zero_()
    return group


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("b_is_zero", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("dtype", "factors"),
    [
        (torch.float64, None),
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.bfloat16, torch.float32),
        (torch.float16, None),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ALL)
def test_aten_within_twice_eager(name, dtype, factors, earlier, b_is_zero):
    """Eager: the specification op by op in the dtype of x, against itself in float64."""
    group = ALL[name](Draw(dtype, factors))
    if b_is_zero:
        zeroed(group)
    seed, branches = seed_for(name), group[2]
    grads = [torch.randn_like(y) for y in spec.group_linear(*detached(group, dtype), seed)]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    previous = sums_like(branches, sums) if earlier else None
    with ScoreCalls() as calls:
        _, _, (scores,) = scored(group, grads, seed=seed, previous=previous)
    # dS is made once: dX comes out of the same call.
    assert (calls.forward, calls.backward, len(calls.b)) == (1, 0, 1)
    assert calls.b == [0 if b_is_zero else len(branches)]

    def meaning(dtype):
        pairs = previous and [[total.to(dtype) for total in pair] for pair in previous]
        operands = [g.to(dtype) for g in grads], *detached(group, dtype), seed
        return spec.group_score(*operands, **columns_of(pairs))

    truth, eager = meaning(torch.float64), meaning(dtype)
    assert {t.dtype for t in flat(scores)} <= {sums}
    if dtype == torch.float64:
        torch.testing.assert_close(flat(scores), flat(truth))
    elif truth:
        # One rounding of each statistic is allowed even where eager happens to be exact.
        floor = torch.finfo(dtype).eps * len(flat(truth)) ** 0.5
        assert error(scores, truth) <= max(2 * error(eager, truth), floor)


def error(scores, truth):
    """Root of the summed squares of every statistic's relative error."""
    total = 0.0
    for value, expected in zip(flat(scores), flat(truth), strict=True):
        assert value.shape == expected.shape
        scale = expected.norm().item()
        difference = (value.double() - expected).norm().item()
        assert scale > 0 or difference == 0
        total += (difference / scale) ** 2 if scale else 0.0
    return total**0.5


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ALL)
def test_all_but_a_and_b_is_as_in_group_linear(name):
    (x, sites, branches), seed = ALL[name](Draw(torch.float32)), seed_for(name)
    # The scored op takes a scale that is a tensor as a number.
    group = x, sites, [replace(branch, scale=float(branch.scale)) for branch in branches]
    expected = group_linear(*group, seed=seed)
    grads = [torch.randn_like(y) for y in expected]
    truth = torch.autograd.grad(expected, leaves(group), grads, allow_unused=True)
    outputs, found, _ = scored(group, grads, seed=seed)
    factors = [f for j in group[2] for f in (j.a, j.b)]
    assert all(torch.equal(y, other) for y, other in zip(outputs, expected, strict=True))
    for leaf, value, other in zip(leaves(group), found, truth, strict=True):
        if any(leaf is factor for factor in factors):
            assert value is None
        else:
            assert torch.equal(value, other)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("select", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_all_but_a_and_b_is_as_in_group_linear_where_b_is_zero(name, dtype, select):
    """A and B get right gradients too, where `select` asks for them and no source was kept."""
    (x, sites, branches), seed = ALL[name](Draw(dtype)), seed_for(name)
    group = x, sites, [replace(branch, scale=float(branch.scale)) for branch in branches]
    expected = group_linear(*zeroed(group), seed=seed)
    grads = [torch.randn_like(y) for y in expected]
    truth = torch.autograd.grad(expected, leaves(group), grads, allow_unused=True)
    outputs, found, records = scored(group, grads, seed=seed, select=lambda: select)
    torch.testing.assert_close(outputs, expected)
    assert bool(records) == select
    factors = [f for j in group[2] for f in (j.a, j.b)]
    for leaf, value, other in zip(leaves(group), found, truth, strict=True):
        if select and any(leaf is factor for factor in factors):
            assert value is None
        else:
            torch.testing.assert_close(value, other)


def test_no_source_is_kept_where_b_is_zero():
    x, sites, branches = zeroed(GROUPS["two_sources"](Draw(torch.float32)))
    sources = dict.fromkeys([x, *(j.source for j in branches if j.source is not None)])
    read = {source.untyped_storage().data_ptr() for source in sources}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        group_linear_scored(x, sites, branches, print)
    assert read.isdisjoint(t.untyped_storage().data_ptr() for t in kept)
    assert [t.shape for t in kept[: len(sources)]] == [source.shape for source in sources]


def test_one_nonzero_or_nan_b_is_enough():
    for value in (1e-30, float("nan")):
        group = zeroed(GROUPS["mixed_siblings"](Draw(torch.float32)))
        with torch.no_grad():
            group[2][1].b[-1, -1] = value
        with ScoreCalls() as calls:
            outputs, _, _ = scored(group, [torch.ones_like(y) for y in group_linear(*group)])
        assert calls.b == [len(group[2])]
        assert bool(outputs[group[2][1].site].isnan().any()) == (value != value)


def test_no_gradient_is_written_saved_or_returned():
    group = GROUPS["mixed_siblings"](Draw(torch.float32))
    branches = group[2]

    def saved_by(function):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            return function(), saved

    _, plain = saved_by(lambda: group_linear(*group))
    records = []
    outputs, saved = saved_by(lambda: group_linear_scored(*group, records.append))
    assert [tuple(t.shape) for t in saved] == [tuple(t.shape) for t in plain]
    torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    assert all(f.grad is None for j in branches for f in (j.a, j.b))
    assert group[0].grad is not None
    for branch, score in zip(branches, records[0], strict=True):
        rank = branch.a.shape[0]
        assert [tuple(t.shape) for t in flat([score])] == [(rank, rank), (rank, rank), (), ()]
        for tensor in flat([score]):
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            assert not tensor.requires_grad


def test_recorded_once_even_if_x_needs_no_gradient():
    x, sites, branches = GROUPS["mixed_siblings"](Draw(torch.float64))
    bare = [Site(site.weight) for site in sites]
    records = []
    outputs = group_linear_scored(x.detach(), bare, branches, records.append)
    sum(y.square().sum() for y in outputs).backward()
    (scores,) = records
    grads = [2 * y.detach() for y in outputs]
    truth = spec.group_score(grads, x.detach(), bare, branches)
    torch.testing.assert_close(flat(scores), flat(truth))


def test_select_false_writes_gradients_and_records_nothing():
    group = GROUPS["two_sources"](Draw(torch.float32))
    expected = group_linear(*group)
    grads = [torch.randn_like(y) for y in expected]
    truth = torch.autograd.grad(expected, leaves(group), grads)
    _, found, records = scored(group, grads, select=lambda: False)
    assert not records
    assert all(torch.equal(value, other) for value, other in zip(found, truth, strict=True))


def test_without_gradients_nothing_is_recorded():
    group = GROUPS["single"](Draw(torch.float32))
    records = []
    with torch.no_grad():
        (y,) = group_linear_scored(*group, records.append)
    assert torch.equal(y, group_linear(*group)[0]) and not y.requires_grad and not records


@pytest.mark.parametrize("b_is_zero", [False, True])
def test_an_output_that_nothing_depends_on_adds_nothing(b_is_zero):
    group = GROUPS["mixed_siblings"](Draw(torch.float64))
    if b_is_zero:
        zeroed(group)
    previous = sums_like(group[2])
    previous[1] = (None, previous[1][1])
    records = []
    outputs = group_linear_scored(*group, records.append, previous=previous)
    outputs[0].sum().backward()
    grads = [torch.ones_like(outputs[0]), *(torch.zeros_like(y) for y in outputs[1:])]
    previous[1] = (torch.zeros_like(group[2][1].a), previous[1][1])
    truth = spec.group_score(grads, *group, **columns_of(previous))
    (score, *rest) = records[0]
    torch.testing.assert_close(flat([score]), flat(truth[:1]))
    assert rest == [None] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_recorded_once_under_checkpointing(reentrant):
    group = GROUPS["two_branches_one_source"](Draw(torch.float64))
    x, sites, branches = group
    records = []

    def block(x):
        return group_linear_scored(x, sites, branches, records.append)[0]

    y = checkpoint(block, x, use_reentrant=reentrant)
    y.sum().backward()
    assert len(records) == 1
    truth = spec.group_score([torch.ones_like(y)], *group)
    torch.testing.assert_close(flat(records[0]), flat(truth))


def test_autocast_around_the_backward_pass_lowers_no_statistic():
    group = GROUPS["mixed_siblings"](Draw(torch.float32))
    records = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = group_linear_scored(*group, records.append, previous=None)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    plain, cast = map(flat, records)
    assert all(torch.equal(value, other) for value, other in zip(plain, cast, strict=True))


def _op_arguments(name, earlier, missing, b_is_zero):
    x, sites, branches = detached(GROUPS[name](Draw(torch.float32)), torch.float32)
    sources = list(dict.fromkeys([x, *(j.source for j in branches if j.source is not None)]))
    position = {source: i for i, source in enumerate(sources)}
    grads = [torch.randn(*x.shape[:-1], site.weight.shape[0]) for site in sites]
    previous = sums_like(branches) if earlier else []
    return (
        [None if missing and i == 0 else g for i, g in enumerate(grads)],
        torch.randn(x.shape[:-1].numel(), sum(j.a.shape[0] for j in branches)),
        [i != 1 for i in range(len(sources) + len(sites))],
        [pair[0] for pair in previous],
        [pair[1] for pair in previous],
        sources,
        [site.weight for site in sites],
        [],
        [j.a for j in branches],
        [] if b_is_zero else [j.b for j in branches],
        None,
        [float(j.scale) for j in branches],
        [j.site for j in branches],
        [0 if j.source is None else position[j.source] for j in branches],
        [0.0] * len(branches),
        "aten",
    )


@pytest.mark.parametrize("b_is_zero", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize("name", ["mixed_siblings", "only_shortcut"])
def test_opcheck(name, earlier, b_is_zero):
    for missing in (False, True):
        results = torch.library.opcheck(
            torch.ops.heterolora.group_score.default,
            _op_arguments(name, earlier, missing, b_is_zero),
        )
        assert set(results.values()) == {"SUCCESS"}


def test_refusals():
    x, sites, branches = GROUPS["single"](Draw(torch.float32))
    with pytest.raises(ValueError, match="previous holds 2 pairs for 1 branches"):
        group_linear_scored(x, sites, branches, print, previous=[(None, None)] * 2)
    with pytest.raises(
        ValueError, match=r"branch 0: a previous sum is \(7, 3\), its factor \(3, 7"
    ):
        group_linear_scored(x, sites, branches, print, previous=[(branches[0].a.t(), None)])
    learned = [replace(branches[0], scale=torch.tensor(2.0, requires_grad=True))]
    with pytest.raises(ValueError, match="scale that requires a gradient"):
        group_linear_scored(x, sites, learned, print)
    (y,) = group_linear_scored(x, sites, branches, print)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(y.sum(), [x], create_graph=True)
