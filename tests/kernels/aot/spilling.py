"""Compiles expand with tiles that no thread's registers hold; prints what `aot` says of it."""

import sys

import torch
from triton.runtime import driver

from heterolora.kernels.aot import cases as aot_cases
from heterolora.kernels.aot import compile as aot
from heterolora.kernels.aot import read as aot_read
from heterolora.kernels.gpu.launch import KERNELS, Launch, Tile

arch = aot_read.ARCHS[sys.argv[1]]
driver.set_active(aot._Target(arch))


def start(kernel, grid, *args, **options):
    if kernel.__name__ == "expand_kernel":
        compiled = kernel.warmup(*args, grid=grid, **options)
        usage = aot_read.usage(compiled)
        how = dict(ieee=False, wide=False, aligned=True)
        print("\n".join(aot_read.faults("expand", arch, compiled, usage, **how)))


tiles = dict.fromkeys(KERNELS, Tile(128, 256, 64, warps=4, stages=5))
case = aot_cases.Case("too large", (16,), (4096,), backward=False)
aot_cases.run(case, torch.bfloat16, Launch(tiles, programs=1, start=start))
