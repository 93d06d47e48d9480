"""Operands, intermediates and results inside NaN, so that a stray read or write shows.

The interpreter reads and writes wherever a pointer leads, without a word.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from heterolora.kernels import Branch, Site
from heterolora.verify.checks import check_parity
from heterolora.verify.operations import OPERATIONS

__all__ = ["Guarded", "check_guarded"]

# More elements than the largest tile of the tests reaches past the end, and a multiple of 16 bytes.
MARGIN = 1 << 14
_NEW = {
    torch.ops.aten.clone,
    torch.ops.aten.empty,
    torch.ops.aten.empty_like,
    torch.ops.aten.empty_strided,
    torch.ops.aten.new_empty,
    torch.ops.aten.new_zeros,
    torch.ops.aten.zeros,
    torch.ops.aten.zeros_like,
}


class Guarded(TorchDispatchMode):
    """While active, puts every new float tensor inside NaN, those made by our ops included."""

    def __init__(self):
        super().__init__()
        self.buffers = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "heterolora":
            # The op's own body, with this mode on; a plain call would turn it off.
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        found = func(*args, **kwargs)
        if func.overloadpacket in _NEW and found.is_floating_point() and found.numel():
            return self.inside(found)
        return found

    def inside(self, tensor, padding=0):
        """A copy of a tensor [..., k] inside NaN, its rows `padding` elements apart."""
        *leading, k = tensor.shape or (1,)
        strides, step = [1], k + padding
        for size in reversed(leading):
            strides.insert(0, step)
            step *= size
        buffer = torch.full((step + 2 * MARGIN,), float("nan"), dtype=tensor.dtype)
        strides = strides if tensor.dim() else []
        view = torch.as_strided(buffer, tensor.shape, strides, MARGIN)
        view.copy_(tensor.detach())
        self.buffers.append((buffer, view))
        return view

    def group(self, group, padding=0):
        """A copy of a group, every tensor inside NaN."""
        known = {}

        def copy(tensor, padding=padding):
            if tensor is None:
                return None
            if tensor not in known:
                inside = self.inside(tensor, padding)
                known[tensor] = inside.detach().requires_grad_(tensor.requires_grad)
            return known[tensor]

        x, sites, branches = group
        return (
            copy(x),
            [Site(copy(site.weight), copy(site.bias, 0)) for site in sites],
            [
                Branch(
                    b.site, copy(b.a), copy(b.b), b.scale, copy(b.source), copy(b.mask), b.dropout
                )
                for b in branches
            ],
        )

    def broken(self):
        """How many buffers have something other than NaN around their tensor."""
        count = 0
        for buffer, view in self.buffers:
            around = torch.ones(buffer.shape, dtype=torch.bool)
            torch.as_strided(around, view.shape, view.stride(), view.storage_offset()).fill_(False)
            count += not buffer[around].isnan().all()
        return count


def check_guarded(build, dtype, padding=0, operation="group_linear"):
    """`check_parity` of the Triton kernels, with everything they touch inside NaN."""

    def run(plain):
        with Guarded() as guarded:
            group = guarded.group(plain, padding)
            operands = len(guarded.buffers)
            found = OPERATIONS[operation].run(group, "triton", None)
        assert guarded.broken() == 0
        # What the op allocated: outputs and S at least.
        assert len(guarded.buffers) > operands or not plain[0].numel()
        return found

    return check_parity(build, dtype, "triton", operation=operation, run=run)
