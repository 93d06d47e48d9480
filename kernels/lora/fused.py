"""The group ops by the Triton kernels: what each launches, in which order, on which buffers.

Forward: pack, shrink (and a reduce where it split its sum), expand. Backward: pack, the pass over
every dY, a reduce of dS, dX, the pass over the sources, a reduce of dA and dB.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from .buckets import BucketLayout
from .configs import Launch, launch_for
from .expand import expand
from .pack import Packed, pack
from .shrink import shrink

__all__ = ["group_linear"]


def group_linear(
    sources: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: BucketLayout,
    dropout: Sequence[float],
    seed: Tensor | None,
    launch: Launch | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Forward of a group; arguments as `aten.group_linear`.

    Args:
        layout: the padded packing of S.
        dropout: probability of zeroing an element of its source, for each branch.
        seed: int64 scalar on the device, if any probability is above 0.
        launch: tiles and options; None takes the shipped ones.

    Returns:
        The outputs [..., n_i] in the dtype of x, and S [m, layout.columns].
    """
    x = sources[0]
    launch = launch or launch_for(x)
    rows = [_rows(source) for source in sources]
    outputs = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    index64 = _index64(launch, [*rows, *weights, *outputs])
    packed = _pack(a, b, scales, layout, x)
    s = shrink(rows, packed, layout, dropout, seed, launch, index64=index64)
    outs = [output.view(-1, output.shape[-1]) for output in outputs] if x.numel() else []
    expand(rows[0], s, packed, weights, biases, outs, layout, launch, index64=index64)
    return outputs, s


def _pack(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scales: Sequence[float],
    layout: BucketLayout,
    x: Tensor,
) -> Packed:
    return pack(_alike(a), _alike(b), scales, layout, x)


def _alike(factors: Sequence[Tensor]) -> list[Tensor]:
    """The factors in one dtype: a problem table holds pointers of one type."""
    dtypes = {factor.dtype for factor in factors}
    return list(factors) if len(dtypes) < 2 else [factor.float() for factor in factors]


def _rows(t: Tensor) -> Tensor:
    """[..., k] as [m, k] with a last stride of 1, copied only if it has none such."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _index64(launch: Launch, tensors: Sequence[Tensor]) -> bool:
    """Whether an offset into any of these [m, n] tensors can pass 2^31."""
    if launch.index64 is not None:
        return launch.index64
    # Tiles overhang the edge by less than 2^10 rows, whose masked addresses are computed too.
    return any((t.shape[0] + 1024) * max(t.stride()) >= 2**31 for t in tensors if t.dim() == 2)
