"""The shipped tiles: complete, well formed, and chosen by block, circumstance and GPU."""

import dataclasses

import pytest
import torch

from heterolora.kernels.gpu import launch as configs
from heterolora.kernels.gpu.launch import KERNELS, Launch, Tile, launch_for, odd
from heterolora.kernels.gpu.waves import best_tile
from heterolora.kernels.tiles import alternatives, flops_per_byte, shipped
from heterolora.kernels.tuned.measured import MeasuredTile

GPUS = [
    (8, 0),
    (8, 6),
    (8, 7),
    (8, 9),
    (9, 0),
    (10, 0),
    (10, 3),
    (11, 0),
    (12, 0),
    (12, 1),
    (13, 0),
]


def power_of_two(number):
    return number & (number - 1) == 0


@pytest.mark.parametrize("hip", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", GPUS)
def test_every_gpu_gets_a_tile_for_every_kernel(capability, itemsize, hip):
    tiles = shipped(capability, itemsize, hip=hip)
    assert set(KERNELS) <= set(tiles)
    for name, tile in tiles.items():
        assert name.split()[0] in KERNELS
        assert all(size >= 16 and power_of_two(size) for size in (tile.m, tile.n, tile.k)), name
        assert tile.warps in (4, 8) and 1 <= tile.stages <= 5, name


def test_an_unknown_gpu_gets_what_fits_the_smallest():
    assert shipped((13, 0), 2) == shipped((8, 6), 2)
    assert shipped((10, 3), 2) == shipped((9, 0), 2)


def test_the_most_specific_tile_is_taken():
    names = ("dy", "dy 64", "dy dropout", "dy odd")
    tiles = {name: Tile(16 << i, 16, 16) for i, name in enumerate(names)}
    launch = Launch(tiles, programs=1)
    assert launch.tile("dy", 32) == tiles["dy"]
    assert launch.tile("dy", 64) == tiles["dy 64"]
    assert launch.tile("dy", 64, dropout=True) == tiles["dy dropout"]
    assert launch.tile("dy", 64, dropout=True, odd=True) == tiles["dy odd"]


def test_an_unknown_kernel_has_no_tile():
    with pytest.raises(KeyError, match="dz"):
        Launch({}, programs=1).tile("dz", 16)


def test_odd_is_what_the_compiler_cannot_see_to_be_aligned():
    whole = torch.empty(48, 64)
    assert not odd(whole)
    assert not odd(whole, whole.t(), torch.empty(5, 32), whole[:, :32])
    assert odd(torch.empty(48, 65))
    assert odd(whole, torch.empty(48, 40))
    assert odd(whole[:, :40])
    assert odd(whole[:, 1:33])
    assert odd(torch.empty(48, 65).t())


def test_the_interpreter_gets_small_tiles():
    launch = launch_for(torch.empty(4, 4))
    assert launch.tile("expand", 64, odd=True) == launch.tile("dy", 16)
    assert not launch.tma


@pytest.mark.parametrize("capability", GPUS)
def test_alternatives_begin_with_the_shipped_tile(capability):
    tiles = shipped(capability, 2)
    found = alternatives(capability, 2)
    assert set(found) == {"expand", "expand_tma", "dx"}
    for kernel, choices in found.items():
        assert choices[0] == tiles[kernel]
        assert len(set(choices)) == len(choices) >= 3
        assert all(tile.m * tile.n <= choices[0].m * choices[0].n for tile in choices)
    assert alternatives(capability, 4) == alternatives(capability, 2, hip=True) == {}


H100 = Launch(
    shipped((9, 0), 2),
    programs=132,
    alternatives=alternatives((9, 0), 2),
    flops_per_byte=flops_per_byte((9, 0)),
)
SMALL = {"m": 200, "ns": (1024, 1024), "k": 1024}


def measured(kernel="expand", block_r=16, m=256, n=2048, k=1024, tile=None, seconds=1.0):
    return MeasuredTile(kernel, 2, block_r, m, n, k, tile or Tile(32, 64, 64), seconds)


def test_shapes_choose_among_the_alternatives():
    first, *less = H100.alternatives["expand"]
    assert H100.tile("expand", 16) == first == H100.tile("expand", 16, m=8192, ns=(4096,), k=4096)
    assert H100.tile("expand", 16, **SMALL) in less
    assert H100.tile("dx", 64, **SMALL) in H100.alternatives["dx"][1:]
    # What is bound by registers, has no base matmul or no alternatives gets the shipped tile.
    assert H100.tile("dx", 16, dropout=True, **SMALL) == H100.tiles["dx dropout"]
    assert H100.tile("expand", 16, odd=True, **SMALL) == H100.tiles["expand odd"]
    for off in ({"k": 0}, {"m": 0}, {"ns": ()}, {"ns": (0,)}):
        assert H100.tile("expand", 16, **{**SMALL, **off}) == first
    assert H100.tile("shrink", 16, **SMALL) == H100.tiles["shrink"]
    for field in ({"alternatives": {}}, {"flops_per_byte": None}):
        assert dataclasses.replace(H100, **field).tile("expand", 16, **SMALL) == first


def test_a_choice_is_made_once_for_all_batches_of_a_size(monkeypatch):
    asked = []

    def best(kernel, tiles, m, *rest):
        asked.append(m)
        return tiles[m == 256]

    monkeypatch.setattr(configs, "best_tile", best)
    launch = dataclasses.replace(H100)
    tiles = [launch.tile("expand", 16, **{**SMALL, "m": m}) for m in (129, 200, 256, 257, 512)]
    assert tiles == [launch.alternatives["expand"][1]] * 3 + [launch.alternatives["expand"][0]] * 2
    assert asked == [256, 512]


@pytest.mark.parametrize("kernel", ["expand", "dx"])
def test_waves_by_hand(kernel):
    """132 multiprocessors, so fast at loading that only FLOPs and the start of a sum count."""
    wide, narrow = Tile(128, 256, 64), Tile(64, 64, 64)

    def best(m, n):
        ns, k = ([n], 4096) if kernel == "expand" else ([4096], n)
        return best_tile(kernel, [wide, narrow], m, ns, k, 132, 1e-9)

    # 4 wide tiles leave 128 multiprocessors idle, 64 narrow ones take an eighth of their time.
    assert best(256, 512) == narrow
    # 132 wide tiles are one wave; 1,056 narrow ones are eight, of an eighth and eight more starts.
    assert best(128 * 12, 256 * 11) == wide
    # A tenth less is not clearly better than the first: 136 wide tiles are two waves, half empty.
    assert best(128 * 17, 256 * 8) == narrow


def test_loads_speak_for_large_tiles():
    tiles = [Tile(128, 256, 64), Tile(64, 64, 64)]
    assert best_tile("expand", tiles, 128 * 17, [256 * 8], 4096, 132, 1e-9) == tiles[1]
    assert best_tile("expand", tiles, 128 * 17, [256 * 8], 4096, 132, 1e6) == tiles[0]


def test_a_measured_tile_goes_first():
    far, near = Tile(16, 64, 64), Tile(32, 64, 64)
    entries = (
        measured(m=512, tile=far),
        measured(m=256, n=2048, tile=near),
        measured(kernel="dx", tile=far),
        measured(block_r=64, tile=far),
    )
    launch = dataclasses.replace(H100, measured=entries)
    assert launch.tile("expand", 16, **SMALL) == near
    assert launch.tile("expand", 16, **{**SMALL, "m": 1024}) == far
    # One size beyond a factor of two is another shape.
    for off in ({"m": 1025}, {"k": 2064}, {"k": 496}, {"ns": (2048, 2064)}):
        found = launch.tile("expand", 16, **{**SMALL, **off})
        assert found in H100.alternatives["expand"], off
    assert launch.tile("expand", 32, **SMALL) in H100.alternatives["expand"]
    assert launch.tile("expand", 16, odd=True, **SMALL) == H100.tiles["expand odd"]


def test_a_forced_tile_is_taken():
    """As the tuner forces one, on a launch that has chosen already."""
    H100.tile("expand", 16, **SMALL)
    tile = Tile(16, 16, 16)
    forced = dataclasses.replace(H100, tiles={"expand": tile}, alternatives={}, measured=())
    assert forced.tile("expand", 16, **SMALL) == tile
    assert forced != H100 == dataclasses.replace(H100)
