"""The Triton kernels one by one, on operands of one shape, as the tuner runs them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from heterolora.bench.cases.groups import copies
from heterolora.kernels.gpu.da import da
from heterolora.kernels.gpu.dx import dx
from heterolora.kernels.gpu.dy import dy
from heterolora.kernels.gpu.expand import expand
from heterolora.kernels.gpu.expand_tma import describable, expand_tma
from heterolora.kernels.gpu.launch import Launch, launch_for
from heterolora.kernels.gpu.pack import pack
from heterolora.kernels.gpu.reduce import Part, Sum, reduce_splits
from heterolora.kernels.gpu.shrink import shrink
from heterolora.kernels.gpu.tables import Pass
from heterolora.kernels.group import BUCKETS, Call, bucket_layout

__all__ = ["KERNELS", "Operands", "Subject", "operands", "run_all"]


@dataclass(frozen=True)
class Operands:
    """One frozen layer and one branch.

    Attributes:
        group: of x [m, k], W [n, k], A [rank, k] and B [n, rank], packed.
        grad: dY [m, n].
        s, ds: [m, rank], random.
    """

    group: Pass
    grad: Tensor
    s: Tensor
    ds: Tensor

    @property
    def x(self) -> Tensor:
        return self.group.sources[0]

    @property
    def w(self) -> Tensor:
        return self.group.call.weights[0]

    @property
    def m(self) -> int:
        return self.x.shape[0]

    @property
    def k(self) -> int:
        return self.x.shape[1]

    @property
    def n(self) -> int:
        return self.w.shape[0]

    @property
    def rank(self) -> int:
        return self.group.layout.columns

    def launched(self, launch: Launch) -> Pass:
        """The group with other tiles and options."""
        return self.group._replace(launch=launch)


def operands(
    m: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    launch: Launch | None = None,
    count: int | None = None,
) -> list[Operands]:
    """Random operands, as many sets as exceed the caches.

    Args:
        rank: one of `group.BUCKETS`, so that S has no padding.
        launch: default that of the device.
        count: of sets, instead.
    """
    if rank not in BUCKETS:
        raise ValueError(f"rank {rank}: a tile is tuned for one of {BUCKETS}")
    layout = bucket_layout([rank], [0], [0], [False], sites=1)
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, device=device, dtype=dtype, generator=generator)
        return values * scale

    sets = []
    for _ in range(copies(m, k, n, dtype.itemsize) if count is None else count):
        x, w = draw(m, k), draw(n, k, k**-0.5)
        a, b = draw(rank, k, k**-0.5), draw(n, rank, rank**-0.5)
        call = Call([x], [w], [None], [a], [b], None, [1.0], [0], [0], [0.0], "triton")
        options = launch or launch_for(x)
        packed = pack(call, layout, options)
        group = Pass(call, [x], layout, packed, options, index64=False)
        sets.append(Operands(group, draw(m, n), draw(m, rank), draw(m, rank)))
    return sets


@dataclass(frozen=True)
class Subject:
    """One kernel with what belongs to it.

    Attributes:
        kernel: its name in `tiles.KERNELS`.
        run: launches it; returns what it computed. Shares that a tile's size decides the number of
            are added up first, in the time too.
        small: whether it takes at most 64 columns of S at a time, not 128.
        reads: "x" for a kernel whose time does not depend on n, "dY" for one where not on k; "" for
            a matmul. The missing size is recorded as the other one.
        applies: whether it can run on these operands.
    """

    kernel: str
    run: Callable[[Operands, Launch], list[Tensor]]
    small: bool = False
    reads: str = ""
    applies: Callable[[Operands, Launch], bool] = lambda one, launch: True

    def block_r(self, one: Operands) -> int:
        """The columns of S that it takes at a time."""
        return min(one.rank, 64 if self.small else 128)

    def sizes(self, one: Operands) -> tuple[int, int, int]:
        """m, n and k, as a measured tile names them."""
        n, k = {"x": (one.k, one.k), "dY": (one.n, one.n)}.get(self.reads, (one.n, one.k))
        return one.m, n, k


def run_all(subject: Subject, sets: Sequence[Operands], launch: Launch) -> None:
    """One pass over all sets, each of which begins with cold caches."""
    for one in sets:
        subject.run(one, launch)


def _shrink(one: Operands, launch: Launch) -> list[Tensor]:
    s, parts = shrink(one.launched(launch))
    return [s if parts is None else parts.sum(0).to(s.dtype)]


def _expand(one: Operands, launch: Launch) -> list[Tensor]:
    out = one.x.new_empty(one.m, one.n)
    expand(one.launched(launch), one.s, None, [out])
    return [out]


def _expand_tma(one: Operands, launch: Launch) -> list[Tensor]:
    out = one.x.new_empty(one.m, one.n)
    expand_tma(one.launched(launch), one.s, [out])
    return [out]


def _describable(one: Operands, launch: Launch) -> bool:
    return launch.tma and describable(one.x, one.s, one.w)


def _dy(one: Operands, launch: Launch) -> list[Tensor]:
    ds, parts = dy(one.launched(launch), [one.grad], one.s, need_ds=True, need_db=True)
    return [ds, _added(parts, one.x.new_empty(one.n, one.rank), launch, dim=1)]


def _dx(one: Operands, launch: Launch) -> list[Tensor]:
    out = torch.empty_like(one.x)
    dx(one.launched(launch), [one.grad], one.ds, [out], [0])
    return [out]


def _da(one: Operands, launch: Launch) -> list[Tensor]:
    parts = da(one.launched(launch), one.ds)
    return [_added(parts, one.x.new_empty(one.rank, one.k), launch, dim=0)]


def _added(parts: Sequence[Part], out: Tensor, launch: Launch, *, dim: int) -> Tensor:
    """The sum of a gradient's parts, columns of S along `dim`."""
    sums = [
        Sum(out.narrow(dim, part.start, part.stop - part.start), part.parts, *part[3:], 1.0)
        for part in parts
    ]
    reduce_splits(sums, launch)
    return out


KERNELS = {
    subject.kernel: subject
    for subject in (
        Subject("expand_tma", _expand_tma, small=True, applies=_describable),
        Subject("expand", _expand, small=True),
        Subject("dx", _dx, small=True),
        Subject("dy", _dy, reads="dY"),
        Subject("shrink", _shrink, reads="x"),
        Subject("da", _da, reads="x"),
    )
}
