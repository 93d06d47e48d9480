"""Rung 1: the specification is its own derivative, and says what the formula says."""

import pytest
import torch

from heterolora.kernels import Branch, spec
from heterolora.verify.groups import GROUPS, Draw, leaves


# gradcheck moves one element of an input at a time, which an expanded input does not have.
@pytest.mark.parametrize("name", [name for name in GROUPS if name != "expanded_input"])
def test_gradcheck(name):
    group = GROUPS[name](Draw(torch.float64))
    tensors = leaves(group)

    def forward(*_):
        return tuple(spec.group_linear(*group))

    assert torch.autograd.gradcheck(forward, tensors, fast_mode=False)


@pytest.mark.parametrize("name", GROUPS)
def test_backward_is_autograd_of_forward(name):
    group = GROUPS[name](Draw(torch.float64))
    x, sites, branches = group
    outputs = spec.group_linear(*group)
    grads = [torch.randn_like(y) for y in outputs]
    found = spec.group_linear_backward(grads, *group)
    tensors = leaves(group)
    truth = dict(
        zip(
            tensors,
            torch.autograd.grad(outputs, tensors, grads, materialize_grads=True),
            strict=True,
        )
    )
    torch.testing.assert_close(found.x, truth[x])
    for site, grad in zip(sites, found.bias, strict=True):
        assert (grad is None) == (site.bias is None)
        if grad is not None:
            torch.testing.assert_close(grad, truth[site.bias])
    for branch, d_a, d_b in zip(branches, found.a, found.b, strict=True):
        torch.testing.assert_close(d_a, truth[branch.a])
        torch.testing.assert_close(d_b, truth[branch.b])
    for source in {b.source for b in branches if b.source is not None}:
        parts = [d for b, d in zip(branches, found.source, strict=True) if b.source is source]
        torch.testing.assert_close(sum(parts), truth[source])


def test_two_by_two_by_hand():
    x = torch.tensor([[1.0, 2.0]])
    site = spec.Site(torch.eye(2), torch.tensor([10.0, 20.0]))
    branch = Branch(0, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0], [-1.0]]), scale=0.5)
    (y,) = spec.group_linear(x, [site], [branch])
    assert y.tolist() == [[1 + 10 + 1.5, 2 + 20 - 1.5]]
