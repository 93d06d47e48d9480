"""What compute-sanitizer watches: one small case that launches every kernel.

    compute-sanitizer --tool memcheck python tests/gpu/sanitized.py

Prints the name of each kernel that ran.
"""

import torch
import triton

from heterolora.verify.groups import LARGE, SEEDED, Draw
from heterolora.verify.operations import OPERATIONS

CASES = {
    "group_linear": ("ranks_17_to_32", "shortcuts", "split_k", "dropout_split_k"),
    "low_rank_add": ("ranks_17_to_32",),
    "group_score": ("ranks_17_to_32",),
}


def main():
    ran = set()
    run = triton.runtime.JITFunction.run

    def noted(self, *args, **options):
        ran.add(self.fn.__name__)
        return run(self, *args, **options)

    triton.runtime.JITFunction.run = noted
    for operation, names in CASES.items():
        for name in names:
            group = {**LARGE, **SEEDED}[name](Draw(torch.bfloat16, device="cuda"))
            OPERATIONS[operation].run(group, "triton", None)
    torch.cuda.synchronize()
    print("ran:", *sorted(ran))


if __name__ == "__main__":
    main()
