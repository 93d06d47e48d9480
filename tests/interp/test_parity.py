"""Outputs and gradients against the specification in float64.

fp32, fp64 and fp16 over the same groups are part of `heterolora verify` itself; here is what needs
the repaired interpreter, and what needs more than one group of each kind.
"""

import pytest
import torch

from heterolora.kernels.gpu import passes
from heterolora.kernels.gpu.launch import KERNELS, Launch, Tile
from heterolora.verify.checks import check_parity, compare
from heterolora.verify.groups import GROUPS, LARGE, RANKS, SEEDED, Draw, Sizes, build
from heterolora.verify.operations import outputs_and_gradients

ALL = {**GROUPS, **SEEDED, **LARGE}
QUICK = {"mixed_siblings", "two_sources", "seeded_shortcut", "ranks_48_64", "shortcuts"}


def _some_quick(names):
    return [pytest.param(n, marks=pytest.mark.quick if n in QUICK else ()) for n in names]


def test_every_rank_is_among_the_groups():
    groups = [make(Draw(torch.float32)) for make in LARGE.values()]
    assert {branch.a.shape[0] for group in groups for branch in group[2]} >= {0, *RANKS}


@pytest.mark.parametrize("name", _some_quick(ALL))
def test_bfloat16(name, launches):
    assert check_parity(ALL[name], torch.bfloat16, "triton") is None
    assert launches or name == "no_rows"


@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("operation", ["low_rank_add", "group_score"])
@pytest.mark.parametrize("name", ["two_sources", "ranks_48_64", "rank_160_beside_17", "shortcuts"])
def test_other_ops_in_bfloat16(name, operation, factors):
    assert (
        check_parity(ALL[name], torch.bfloat16, "triton", operation=operation, factors=factors)
        is None
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["two_sources", "ranks_17_to_32", "shortcuts", "dropout_large"])
def test_float32_factors(name, dtype):
    """Gradients of A and B come in float32; check_parity looks."""
    assert check_parity(ALL[name], dtype, "triton", factors=torch.float32) is None


@pytest.mark.quick
def test_factors_of_several_dtypes(launches):
    """One branch in float32 beside one in the dtype of x, as after a partial cast of a model."""
    x, sites, branches = GROUPS["two_branches_one_source"](Draw(torch.bfloat16))
    wide = GROUPS["two_branches_one_source"](Draw(torch.bfloat16, torch.float32))[2]
    group = (x, sites, [branches[0], wide[1]])
    values, grads = outputs_and_gradients(group, "triton")
    assert compare(group, values, grads, "triton") is None
    assert [v.dtype for v in values[3:]] == [torch.bfloat16] * 2 + [torch.float32] * 2


@pytest.mark.parametrize("rank", RANKS)
def test_every_rank_in_sizes_of_one_tile_and_one(rank):
    """m, k and n of 33: a whole tile and an edge of one, whatever the rank."""
    shape = Sizes(33, 33, (33,), ((0, rank),))
    assert check_parity(lambda draw: build(draw, shape), torch.bfloat16, "triton") is None


@pytest.mark.parametrize("m", [1, 31, 32, 33])
@pytest.mark.parametrize(("k", "n"), [(1, 31), (31, 1), (32, 33), (64, 63), (65, 64)])
def test_around_the_edge_of_a_tile(m, k, n):
    shape = Sizes(m, k, (n, 3), ((0, 5), (1, 16)))
    assert check_parity(lambda draw: build(draw, shape), torch.float32, "triton") is None


TILES = {
    "smallest": (Tile(16, 16, 16), 1),
    "wide": (Tile(32, 128, 32), 2),
    "tall": (Tile(128, 32, 64), 5),
    "all in one": (Tile(128, 128, 128), 1),
    "many programs": (Tile(16, 32, 16), 64),
}


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("name", ["ranks_48_64", "shortcuts", "dropout_large", "split_k"])
def test_other_tiles(name, tiles, monkeypatch):
    """The result does not depend on how the work is cut."""
    tile, programs = TILES[tiles]
    launch = Launch(dict.fromkeys(KERNELS, tile), programs=programs)
    monkeypatch.setattr(passes, "launch_for", lambda x: launch)
    assert check_parity(ALL[name], torch.float32, "triton") is None


def test_a_lost_site_would_be_seen(monkeypatch):
    """The check itself: a group computed without one branch does not pass."""
    group = GROUPS["mixed_siblings"](Draw(torch.float32))
    x, sites, branches = group
    values, grads = outputs_and_gradients(group, "triton")
    values[0] = values[0] - 0.5 * (x @ branches[0].a.T @ branches[0].b.T).detach()
    assert "output 0 is off by" in compare(group, values, grads, "triton")
