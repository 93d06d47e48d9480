"""The steps of each implementation, with the bytes, FLOPs and launches of each: plain arithmetic.

They mirror the code they describe: PEFT's eager LoRA layer, :mod:`.aten`, :mod:`.fused`, and a
frozen layer alone. :mod:`.cost` turns them into times.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from .group import BUCKETS, BucketLayout, bucket_layout

__all__ = [
    "MASK_BYTES",
    "MASK_LAUNCHES",
    "LowRank",
    "Matmul",
    "Problem",
    "Step",
    "aten_steps",
    "base_steps",
    "peft_steps",
    "triton_steps",
]

# `spec.dropout_mask`, which `aten` calls for each branch with dropout: its Philox rounds are
# separate int64 operations on [m, k / 8]. Counted from the operations it runs; a test counts again.
MASK_BYTES = 480
MASK_LAUNCHES = 235

# Blocks by which the Triton launchers split their sums, and how many programs they aim to keep
# busy: near enough to the shipped tiles and to a large GPU, and of little weight.
_ROWS, _STEP, _COLUMNS, _PROGRAMS = 64, 64, 128, 132
_PARTIAL = 4


class LowRank(NamedTuple):
    """One branch: its rank, the site it adds to, the source it reads, and whether it drops out."""

    rank: int
    site: int = 0
    source: int = 0
    dropout: bool = False


@dataclass(frozen=True)
class Problem:
    """The shapes of a group.

    Attributes:
        m: rows of x.
        sources: columns of each distinct input; the first is x.
        sites: n of each site.
        branches: in any order; rank 0 is allowed.
        itemsize: bytes of an element of x.
        factor_itemsize: bytes of an element of A and B.
        bias: whether the sites have one; it is frozen.
        input_grad: whether the gradients of the sources are asked for.
    """

    m: int
    sources: tuple[int, ...]
    sites: tuple[int, ...]
    branches: tuple[LowRank, ...] = ()
    itemsize: int = 2
    factor_itemsize: int = 2
    bias: bool = False
    input_grad: bool = True

    def __post_init__(self) -> None:
        sizes = (self.m, *self.sources, *self.sites, *(b.rank for b in self.branches))
        if min(sizes) < 0 or not self.sources or not self.sites:
            raise ValueError("a problem needs a source, a site, and sizes of at least 0")
        for j, b in enumerate(self.branches):
            if not (0 <= b.site < len(self.sites) and 0 <= b.source < len(self.sources)):
                raise ValueError(f"branch {j}: no site {b.site} or no source {b.source}")

    @property
    def live(self) -> tuple[LowRank, ...]:
        """The branches of a rank above 0."""
        return tuple(b for b in self.branches if b.rank)

    def at(self, site: int) -> list[LowRank]:
        return [b for b in self.live if b.site == site]


class Matmul(NamedTuple):
    """One launch of base matmuls, as `schedule.efficiency` takes it.

    Attributes:
        kernel: "expand" or "dx".
        m, k: of x.
        ns: n of each site.
        widths: columns of S of each.
    """

    kernel: str
    m: int
    ns: tuple[int, ...]
    k: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One or more launches of one kind.

    Attributes:
        name: what it computes.
        read, written: bytes.
        flops: of matmuls; elementwise arithmetic is not counted.
        launches: kernels started.
        itemsize: bytes of a matmul operand: which of the device's FLOP/s it is held against.
        own_matmul: a base matmul by Triton rather than by the vendor's library.
        matmul: the shapes of a base matmul, whose tiles have to fill the device; None for others.
    """

    name: str
    read: int
    written: int
    flops: int = 0
    launches: int = 1
    itemsize: int = 2
    own_matmul: bool = False
    matmul: "Matmul | None" = None

    @property
    def bytes(self) -> int:
        return self.read + self.written


_Passes = tuple[list[Step], list[Step]]


def _mm(
    name: str, m: int, k: int, n: int, size: int, *, beta: bool = False, bias: bool = False
) -> Step:
    """[m, k] x [k, n], added to what is there if `beta`."""
    read = m * k + k * n + (m * n if beta else 0) + (n if bias else 0)
    return Step(name, read * size, m * n * size, 2 * m * k * n, itemsize=size)


def _map(name: str, elements: int, read: int, written: int, launches: int = 1) -> Step:
    """Elementwise: bytes read and written for each element, over all launches."""
    return Step(name, elements * read, elements * written, launches=launches)


def _base(name: str, m: int, k: int, n: int, size: int, **options: bool) -> Step:
    """A matmul of a frozen layer by the library: "base" x W^T, "dX" dY W."""
    kernel, sides = ("dx", (n, k)) if name == "dX" else ("expand", (k, n))
    step = _mm(name, m, *sides, size, **options)
    return replace(step, matmul=Matmul(kernel, m, (n,), k, (0,)))


def base_steps(p: Problem) -> _Passes:
    """The frozen sites alone, with autograd's sum of their gradients of x: the floor."""
    m, k, e = p.m, p.sources[0], p.itemsize
    forward = [_base("base", m, k, n, e, bias=p.bias) for n in p.sites]
    backward = []
    if p.input_grad:
        backward = [_base("dX", m, k, n, e) for n in p.sites]
        backward += [_map("sum of dX", m * k, 2 * e, e)] * (len(p.sites) - 1)
    return forward, backward


def peft_steps(p: Problem) -> _Passes:
    """PEFT's eager layers, adapters in their own dtype, one after the other."""
    m, e, f = p.m, p.itemsize, p.factor_itemsize
    forward, backward = base_steps(p)
    for b in p.live:
        k, n, r = p.sources[b.source], p.sites[b.site], b.rank
        if e != f:
            forward.append(_map("cast x", m * k, e, f))
            backward.append(_map("casts of dY", m * n, e + f, f + e, launches=2))
        if b.dropout:
            forward.append(_map("dropout", m * k, f, f + 1))
        forward += [
            _mm("A", m, k, r, f),
            _mm("B", m, r, n, f),
            _map("scale", m * n, f, f),
            _map("add", m * n, e + f, max(e, f)),
        ]
        backward += [
            _map("scale dY", m * n, f, f),
            _mm("dB", n, m, r, f),
            _mm("dS", m, n, r, f),
            _mm("dA", r, m, k, f),
        ]
        if e != f:
            forward.append(_map("cast y", m * n, f, e))
        if p.input_grad:
            backward.append(_mm("dS A", m, r, k, f))
            if b.dropout:
                backward.append(_map("dropout of dX", m * k, f + 1, f))
            if e != f:
                backward.append(_map("cast dX", m * k, f, e))
            if b.source == 0:
                backward.append(_map("sum of dX", m * k, 2 * e, e))
    return forward, backward


def aten_steps(p: Problem) -> _Passes:
    """`aten.group_linear` and its backward, without what pads ranks on a CPU: small copies."""
    m, e, f = p.m, p.itemsize, p.factor_itemsize
    sources, inputs = _inputs(p)
    forward: list[Step] = []
    backward: list[Step] = []
    for k, dropped in zip(sources[len(p.sources) :], inputs[len(p.sources) :], strict=True):
        forward.append(_map("dropout mask", m * k, MASK_BYTES, 0, launches=MASK_LAUNCHES))
        forward.append(_map("cast and apply mask", m * k, 8 + 2 * e, 2 * e, launches=2))
        if p.input_grad and dropped[0].source == 0:
            backward.append(_map("mask and sum of dX", m * k, 4 * e, 2 * e, launches=2))
        elif p.input_grad:
            backward.append(_map("mask dU", m * k, 2 * e, e))
    for k, branches in zip(sources, inputs, strict=True):
        if branches:
            forward += [*_stack(branches, k, e, f), _mm("S", m, k, sum(_ranks(branches)), e)]
    for i, n in enumerate(p.sites):
        site = p.at(i)
        for first, b in enumerate(site):
            if e != f:
                forward.append(_map("cast B", n * b.rank, f, e))
            forward.append(_mm("S B", m, b.rank, n, e, beta=first > 0, bias=p.bias and not first))
            backward.append(_map("scale and cast B", n * b.rank, f, e))
            backward += [_mm("dS", m, n, b.rank, e), _mm("dB", b.rank, m, n, e)]
            backward.append(_map("scale and cast dB", n * b.rank, e, f))
        forward.append(_base("base", m, p.sources[0], n, e, beta=bool(site), bias=p.bias))
    for i, (k, branches) in enumerate(zip(sources, inputs, strict=True)):
        ranks = sum(_ranks(branches))
        if branches:
            backward.append(_mm("dA", ranks, m, k, e))
            if e != f or len(branches) > 1:
                backward.append(_map("copy dA", ranks * k, e, f, launches=len(branches)))
        if not p.input_grad:
            continue
        if branches:
            backward += [*_stack(branches, k, e, f), _mm("dS A", m, ranks, k, e)]
        for j, n in enumerate(p.sites if i == 0 else ()):
            backward.append(_base("dX", m, k, n, e, beta=bool(branches) or j > 0))
    return forward, backward


def triton_steps(p: Problem) -> _Passes:
    """`fused.group_linear` and its backward: pack, shrink, expand; pack, dY, dX, sources, sums."""
    m, e, f = p.m, p.itemsize, p.factor_itemsize
    layout = bucket_layout(
        [b.rank for b in p.branches],
        [b.site for b in p.branches],
        [b.source for b in p.branches],
        [b.dropout for b in p.branches],
        sites=len(p.sites),
    )
    pack = [_pack(p, layout)] if p.live else []
    shrink, parts = _shrink(p, layout)
    forward = [*pack, *shrink]
    # The sites share one launch, not their reads: their tiles need not meet in a cache.
    expand = [
        _join("", _mm("", m, p.sources[0], n, e, bias=p.bias), _mm("", m, site.width, n, e), m * n)
        for n, site in zip(p.sites, layout.site, strict=True)
    ]
    sites = tuple(columns.width for columns in layout.site)
    shapes = Matmul("expand", m, p.sites, p.sources[0], sites)
    forward.append(_own_matmul("expand", expand, shapes, parts=parts))
    backward = list(pack)
    if p.live:
        dy_steps, db_parts = _dy_pass(p, layout)
        da_step, da_parts = _da_pass(p, layout)
        backward += dy_steps
    if p.input_grad:
        widths = [0] * len(p.sources)
        for segment in layout.segments:
            widths[segment.source] += segment.width
        inner = [width + (sum(p.sites) if i == 0 else 0) for i, width in enumerate(widths)]
        products = [_mm("", m, c, k, e) for c, k in zip(inner, p.sources, strict=True) if c]
        backward.append(_own_matmul("dX", products, shapes._replace(kernel="dx")))
    if p.live:
        gradients = sum(b.rank * (p.sources[b.source] + p.sites[b.site]) for b in p.live) * f
        backward += [da_step, Step("sum of dA, dB", db_parts + da_parts, gradients)]
    return forward, backward


def _dy_pass(p: Problem, layout: BucketLayout) -> tuple[list[Step], int]:
    """dS and the parts of dB from one read of each dY for every 128 columns; bytes of the latter.

    The parts of dS are one for each block of n, those of dB one for each division of m, as many as
    fill the device.
    """
    m, e = p.m, p.itemsize
    problems = [
        (n, min(columns.stop - start, BUCKETS[-1]))
        for n, columns in zip(p.sites, layout.site, strict=True)
        for start in range(columns.start, columns.stop, BUCKETS[-1])
    ]
    widest = max((width for _, width in problems), default=0)
    columns_of_n = 2 * _COLUMNS if widest <= 32 else _COLUMNS
    blocks = [-(-n // columns_of_n) for n, _ in problems]
    splits = max(1, min(_PROGRAMS * 2 // max(1, sum(blocks)), -(-m // _ROWS)))
    ds_parts = sum(c * m * width for c, (_, width) in zip(blocks, problems, strict=True)) * _PARTIAL
    db_parts = sum(splits * n * width for n, width in problems) * _PARTIAL
    read = sum(m * n + m * width + n * width for n, width in problems) * e
    flops = sum(4 * m * n * width for n, width in problems)
    dy = Step("dY pass", read, ds_parts + db_parts, flops, itemsize=e)
    return [dy, Step("sum of dS", ds_parts, m * layout.columns * e)], db_parts


def _da_pass(p: Problem, layout: BucketLayout) -> tuple[Step, int]:
    """The parts of dA from one read of a source for every 128 columns; bytes of the parts."""
    m, e = p.m, p.itemsize
    chunks = _chunks(p, layout)
    blocks = max(1, sum(-(-k // _COLUMNS) for k, _ in chunks))
    splits = max(1, min(_PROGRAMS * 2 // blocks, -(-m // _ROWS)))
    parts = sum(splits * k * width for k, width in chunks) * _PARTIAL
    read = sum(m * k + m * width for k, width in chunks) * e
    flops = sum(2 * m * k * width for k, width in chunks)
    return Step("dA pass", read, parts, flops, itemsize=e), parts


def _chunks(p: Problem, layout: BucketLayout) -> list[tuple[int, int]]:
    """Columns of the source and of S for every piece of at most 128 columns with one source."""
    return [
        (p.sources[segment.source], min(segment.stop - start, BUCKETS[-1]))
        for segment in layout.segments
        for start in range(segment.start, segment.stop, BUCKETS[-1])
    ]


def _inputs(p: Problem) -> tuple[list[int], list[list[LowRank]]]:
    """Columns and branches of each input `aten` sees: a dropped-out source is one of its own."""
    sources = list(p.sources)
    inputs = [[b for b in p.live if b.source == i and not b.dropout] for i in range(len(sources))]
    for b in p.live:
        if b.dropout:
            sources.append(p.sources[b.source])
            inputs.append([b])
    return sources, inputs


def _ranks(branches: Sequence[LowRank]) -> list[int]:
    return [b.rank for b in branches]


def _stack(branches: Sequence[LowRank], k: int, e: int, f: int) -> list[Step]:
    elements = sum(_ranks(branches)) * k
    steps = [_map("stack A", elements, f, f)] if len(branches) > 1 else []
    return steps + ([_map("cast A", elements, f, e)] if e != f else [])


def _pack(p: Problem, layout: BucketLayout) -> Step:
    read = written = 0
    for b, columns in zip(p.branches, layout.branch, strict=True):
        size = p.sources[b.source] + p.sites[b.site]
        read += b.rank * size * p.factor_itemsize
        written += (columns.stop - columns.start) * size * p.itemsize
    return Step("pack A, B", read, written)


def _shrink(p: Problem, layout: BucketLayout) -> tuple[list[Step], int]:
    """One read of a source for every 128 columns; and the bytes of the parts of S, which `expand`
    adds up, if few rows would leave programs idle."""
    if not p.live:
        return [], 0
    m, e = p.m, p.itemsize
    chunks = _chunks(p, layout)
    steps = min(-(-k // _STEP) for k in p.sources)
    splits = max(1, min(2 * _PROGRAMS // max(1, -(-m // _ROWS) * len(chunks)), steps // 4))
    read = sum(m * k + k * width for k, width in chunks) * e
    flops = sum(2 * m * k * width for k, width in chunks)
    size = m * layout.columns
    if splits == 1:
        return [Step("shrink", read, size * e, flops, itemsize=e)], 0
    parts = splits * size * _PARTIAL
    return [Step("shrink", read, parts, flops, itemsize=e)], parts


def _join(name: str, base: Step, low_rank: Step, output: int) -> Step:
    """Two products into one output of `output` elements, written once."""
    written = output * base.itemsize
    flops = base.flops + low_rank.flops
    return Step(name, base.read + low_rank.read, written, flops, itemsize=base.itemsize)


def _own_matmul(name: str, steps: Sequence[Step], shapes: Matmul, *, parts: int = 0) -> Step:
    """Several products in one launch of Triton."""
    read, written = sum(s.read for s in steps) + parts, sum(s.written for s in steps)
    flops, size = sum(s.flops for s in steps), steps[0].itemsize
    return Step(name, read, written, flops, itemsize=size, own_matmul=True, matmul=shapes)
