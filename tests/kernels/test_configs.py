"""The shipped tiles: complete, well formed, and chosen by block, circumstance and GPU."""

import pytest
import torch

from heterolora.kernels.configs import KERNELS, Launch, Tile, launch_for, odd, shipped

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
