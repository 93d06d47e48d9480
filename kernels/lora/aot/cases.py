"""What `aot` compiles: groups on tensors without memory, run through the launchers themselves, so
that every kernel gets the options and the specialised arguments it gets on a GPU."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..gpu import passes
from ..gpu.launch import Launch
from ..group import Call

__all__ = ["ALTERNATIVES", "BUCKETED", "FEATURES", "QUICK", "Case", "run"]


@dataclass(frozen=True)
class Case:
    """A group.

    Attributes:
        name: unique.
        ranks: of each branch; branch j adds to site j modulo the number of sites.
        ns: n of each site.
        m, k: of x. The source of a shortcut has 2 k columns.
        shortcuts: how many branches, counted from the last, read a second source.
        dropout: of every branch.
        scale: of every branch.
        transposed: weights are [k, n], as `Conv1D` keeps them.
        bias: of every site.
        base: False adds to the output of the base layers instead.
        narrow_factors: A and B in the dtype of x, not float32.
        index64: force int64 offsets.
        tma: tensor descriptors where the GPU has them.
        backward, score: run these as well.
        needs: which gradients: any of "x", "bias", "a" and "b".
        alternative: of the tiles that shapes choose from, the one at this place; 0 is the shipped
            one. The kernels that have no choice are left out of any other.
    """

    name: str
    ranks: tuple[int, ...]
    ns: tuple[int, ...] = (4096, 1024, 1024)
    m: int = 8192
    k: int = 4096
    shortcuts: int = 0
    dropout: float = 0.0
    scale: float = 2.0
    transposed: bool = False
    bias: bool = False
    base: bool = True
    narrow_factors: bool = False
    index64: bool = False
    tma: bool = False
    backward: bool = True
    score: bool = False
    needs: tuple[str, ...] = ("x", "a", "b")
    alternative: int = 0

    @property
    def few(self) -> bool:
        """Whether there are so few rows that sums over k are split."""
        return self.m <= 64

    @property
    def aligned(self) -> bool:
        """Whether every row begins at a multiple of 16 elements, as the compiler needs to know."""
        return all(size % 16 == 0 for size in (self.k, *self.ns))

    @property
    def pipelined(self) -> bool:
        """Whether rows are aligned, and there is a loop to pipeline: adding up the parts of S is a
        loop inside the only other one."""
        return self.aligned and (self.base or not self.few)


_ONE = (4096,)
# Every kernel at every block of S's columns: with one site all kernels see the same block, except
# that expand and dx take no more than 64 at a time.
BUCKETED = (
    *(Case(f"r{rank}", (rank,), _ONE, score=True) for rank in (16, 32, 64, 128)),
    *(Case(f"few r{rank}", (rank,), _ONE, m=64, backward=False) for rank in (16, 64)),
    *(Case(f"tma r{rank}", (rank,), _ONE, tma=True, backward=False) for rank in (16, 32, 64)),
)
# What changes the code otherwise.
FEATURES = (
    Case("mixed", (4, 24, 160), bias=True),
    Case("three r16", (16, 16, 16), narrow_factors=True, tma=True),
    Case("shortcuts", (16, 64, 16, 16), shortcuts=2),
    Case("dropout r16", (16, 16, 16), dropout=0.1, score=True),
    Case("dropout r128", (128,), _ONE, dropout=0.1),
    Case("transposed", (16, 16), (4096, 1024), transposed=True),
    Case("tma transposed", (16,), _ONE, transposed=True, tma=True, backward=False),
    Case("added", (16, 16, 16), base=False),
    Case("few mixed", (4, 24, 160), m=64, bias=True, backward=False),
    Case("few added", (16, 16, 16), m=64, base=False, backward=False),
    Case("few odd", (16,), (4097,), m=63, k=4095, backward=False),
    Case("only dB", (16,), _ONE, needs=("b",)),
    Case("index64", (16,), _ONE, index64=True),
    Case("odd r16", (16, 16, 16), (4097, 1023, 1023), m=8191, k=4095),
    Case("odd r128", (128,), (4097,), m=8191, k=4095),
)
# The tiles for matmuls of few rows: their code, and the most that their registers must hold.
ALTERNATIVES = tuple(
    Case(f"{name}tile {place}", ranks, ns, tma=tma, backward=not tma, bias=bias, alternative=place)
    for place in (1, 2, 3)
    for tma in (False, True)
    for name, ranks, ns, bias in (
        ("tma " if tma else "", (16,), _ONE, False),
        ("tma mixed " if tma else "mixed ", (64, 0, 128), (4096, 1024, 1024), True),
    )
)
QUICK = (BUCKETED[0], BUCKETED[4], BUCKETED[6], FEATURES[3])


def run(case: Case, dtype: torch.dtype, launch: Launch) -> None:
    """Run forward, backward and score of a group on tensors of the device "meta"."""
    call = _call(case, dtype)
    if case.base:
        outs, s = passes.group_linear(call, launch)
    else:
        outs = [_empty(case.m, n, dtype=dtype) for n in case.ns]
        s = passes.low_rank_add(call, outs, launch)
    count = len(case.ranks)
    others = ["x" in case.needs] * len(call.sources) + ["bias" in case.needs] * len(call.weights)
    if case.backward:
        needs = [*others, *["a" in case.needs] * count, *["b" in case.needs] * count]
        passes.group_linear_backward(call, outs, s, needs, launch)
    if case.score:
        passes.group_score(call, outs, s, others, [], [], launch)


def _call(case: Case, dtype: torch.dtype) -> Call:
    count = len(case.ranks)
    sources = [_empty(case.m, case.k, dtype=dtype)]
    if case.shortcuts:
        sources.append(_empty(case.m, 2 * case.k, dtype=dtype))
    branch_site = [j % len(case.ns) for j in range(count)]
    branch_source = [int(j >= count - case.shortcuts) for j in range(count)]
    wide = dtype if case.narrow_factors else torch.float32
    ks = [sources[i].shape[1] for i in branch_source]
    ns = [case.ns[i] for i in branch_site]
    return Call(
        sources=sources,
        weights=[_weight(case, n, dtype) for n in case.ns] if case.base else [],
        biases=[_empty(n, dtype=dtype) if case.bias else None for n in case.ns if case.base],
        a=[_empty(rank, k, dtype=wide) for rank, k in zip(case.ranks, ks, strict=True)],
        b=[_empty(n, rank, dtype=wide) for rank, n in zip(case.ranks, ns, strict=True)],
        seed=_empty(dtype=torch.int64) if case.dropout else None,
        scales=[case.scale] * count,
        branch_site=branch_site,
        branch_source=branch_source,
        dropout=[case.dropout] * count,
        implementation="triton",
    )


def _weight(case: Case, n: int, dtype: torch.dtype) -> Tensor:
    if case.transposed:
        return _empty(case.k, n, dtype=dtype).t()
    return _empty(n, case.k, dtype=dtype)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
