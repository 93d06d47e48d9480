"""One-line faults to plant in the kernels, one at a time; `run.py` says which rung catches each."""

from typing import NamedTuple

__all__ = ["FAULTS", "Fault"]


class Fault(NamedTuple):
    """A line to replace.

    Attributes:
        name: what goes wrong.
        file: in kernels/lora.
        old: occurs exactly once in the file.
        new: what replaces it.
        rungs: where to look first; the others follow if it survives there.
    """

    name: str
    file: str
    old: str
    new: str
    rungs: tuple[int, ...] = (3,)


FAULTS = [
    Fault(
        "pack: the next row's elements in B's padding",
        "gpu/pack.py",
        "inside = (row < rows) & (column < rank)",
        "inside = row < rows",
    ),
    Fault(
        "pack: B is not scaled",
        "gpu/pack.py",
        "scaled *= pick(scales, j)",
        "scaled *= 1.0",
    ),
    Fault(
        "pack: one column of padding counts as a rank",
        "gpu/pack.py",
        "(index < rank).to(",
        "(index <= rank).to(",
    ),
    Fault(
        "pack: B written at the site's width instead of its own offset",
        "gpu/pack.py",
        "flat = packed + pick(starts_b, j) + row * pick(strides_b, j) + column",
        "flat = packed + pick(starts_b, j) + row * rank_columns + column",
    ),
    Fault(
        "shrink: no mask at the end of k for the source",
        "gpu/shrink.py",
        "inside_u = first + column[None, :] < k",
        "inside_u = row[:, None] < m",
    ),
    Fault(
        "shrink: a missing K tail",
        "gpu/shrink.py",
        "min((split + 1) * per_split, k), BLOCK_K)",
        "min((split + 1) * per_split, k // BLOCK_K * BLOCK_K), BLOCK_K)",
    ),
    Fault(
        "shrink: every split writes the first part",
        "gpu/shrink.py",
        "target = s + (split * m + row[:, None]) * columns",
        "target = s + row[:, None] * columns",
    ),
    Fault(
        "shrink: padding written as computed",
        "gpu/shrink.py",
        "acc = tl.where(flags.to(tl.float32)[None, :] > 0, acc, 0.0)",
        "acc = acc + 0.0 * flags.to(tl.float32)[None, :]",
    ),
    Fault(
        "shrink: kept elements are not scaled up",
        "gpu/shrink.py",
        "acc *= 65536.0 / (65536.0 - threshold.to(ACC))",
        "acc *= 1.0",
    ),
    Fault(
        "dropout: columns decided in blocks of four",
        "gpu/device.py",
        "block = first // 8 + tl.arange",
        "block = first // 4 + tl.arange",
    ),
    Fault(
        "dropout: high half first",
        "gpu/device.py",
        "halves = tl.join(words & 0xFFFF, words >> 16)",
        "halves = tl.join(words >> 16, words & 0xFFFF)",
    ),
    Fault(
        "dropout: six rounds",
        "gpu/device.py",
        "n_rounds=7",
        "n_rounds=6",
    ),
    Fault(
        "offsets: int64 asked for, int32 given",
        "gpu/device.py",
        "return index.to(tl.int64) if INDEX64 else index",
        "return index",
    ),
    Fault(
        "find: a problem's first tile goes to the one before",
        "gpu/device.py",
        "problem = tl.where(tile >= passed, i, problem)",
        "problem = tl.where(tile > passed, i, problem)",
    ),
    Fault(
        "swizzle: the last strip as high as the others",
        "gpu/device.py",
        "rows = min(tiles_m - strip * GROUP_M, GROUP_M)",
        "rows = GROUP_M",
    ),
    Fault(
        "pick: the last entry of a table is never chosen",
        "gpu/device.py",
        "for i in tl.static_range(1, len(items)):",
        "for i in tl.static_range(1, len(items) - 1):",
    ),
    Fault(
        "expand: the last part of a split S left out",
        "gpu/expand.py",
        "for part in range(splits):",
        "for part in range(splits - 1):",
    ),
    Fault(
        "expand: a split S kept by tiles that are not the site's first",
        "gpu/expand.py",
        "mask=in_rows & (block_n == 0))",
        "mask=in_rows & (block_n == 1))",
    ),
    Fault(
        "expand: only the first block of ranks",
        "gpu/expand.py",
        "for first in range(0, width, BLOCK_R):",
        "for first in range(0, min(width, BLOCK_R), BLOCK_R):",
    ),
    Fault(
        "expand: rows of S at the site's width apart",
        "gpu/expand.py",
        "s_place = row_in[:, None] * columns + pick(starts, site)",
        "s_place = row_in[:, None] * width + pick(starts, site)",
    ),
    Fault(
        "expand: a bias for sites without",
        "gpu/expand.py",
        "in_bias = column < pick(bias_sizes, site)",
        "in_bias = column < n",
    ),
    Fault(
        "expand: what the base layer wrote is lost",
        "gpu/expand.py",
        "acc = tl.load(out, mask=in_rows & in_columns, other=0.0).to(ACC)",
        "acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)",
    ),
    Fault(
        "expand: no mask at the end of k for x",
        "gpu/expand.py",
        "mask=first + inner[None, :] < k, other=0.0)",
        "mask=in_rows, other=0.0)",
    ),
    Fault(
        "expand: a transposed weight read as if it were not",
        "gpu/expand.py",
        "TRANSPOSED=transposed and bool(weights),",
        "TRANSPOSED=False,",
    ),
    Fault(
        "expand_tma: the wrong columns of S",
        "gpu/expand_tma.py",
        "s_tile = s.load([row, starts[i] + first])",
        "s_tile = s.load([row, first])",
    ),
    Fault(
        "expand_tma: tiles dealt twice or never",
        "gpu/expand_tma.py",
        "turn = (tl.program_id(0) + programs - passed % programs) % programs",
        "turn = (tl.program_id(0) + passed) % programs + 1",
    ),
    Fault(
        "dy: every split writes dB's first part",
        "gpu/dy.py",
        "(split * n + column[:, None]) * width",
        "column[:, None] * width",
    ),
    Fault(
        "dy: dS of another block of columns",
        "gpu/dy.py",
        "(block.to(tl.int64) * m + row[:, None]) * width",
        "row[:, None] * width",
    ),
    Fault(
        "dy: no mask on the last columns of dY",
        "gpu/dy.py",
        "in_tile = in_rows & in_columns[None, :]",
        "in_tile = in_rows & (column[None, :] >= 0)",
    ),
    Fault(
        "da: dropout of the wrong columns",
        "gpu/da.py",
        "keep = keep_tile(key, branch, threshold, row, block * BLOCK_K, BLOCK_M, BLOCK_K)",
        "keep = keep_tile(key, branch, threshold, row, 0, BLOCK_M, BLOCK_K)",
    ),
    Fault(
        "da: kept elements are not scaled up",
        "gpu/da.py",
        "acc *= 65536.0 / (65536.0 - threshold.to(ACC))",
        "acc *= 1.0",
    ),
    Fault(
        "dx: the last site is left out",
        "gpu/dx.py",
        "tl.where(problem == 0, SITES, 0)",
        "tl.where(problem == 0, SITES - 1, 0)",
    ),
    Fault(
        "dx: every source gets every segment's gradient",
        "gpu/dx.py",
        "pick(segment_sources, segment) == source",
        "pick(segment_sources, segment) >= 0",
    ),
    Fault(
        "dx: the mask of another branch",
        "gpu/dx.py",
        "pick(branches, segment)",
        "pick(branches, 0)",
    ),
    Fault(
        "dx: no mask at the end of n for W",
        "gpu/dx.py",
        "in_w = in_columns & (first + inner[:, None] < n)",
        "in_w = in_columns & (inner[:, None] < n)",
    ),
    Fault(
        "reduce: the last part is left out",
        "gpu/reduce.py",
        "for _ in range(pick(splits, problem) // 16):",
        "for _ in range(pick(splits, problem) // 16 - 1):",
    ),
    Fault(
        "reduce: sums are not scaled",
        "gpu/reduce.py",
        "(acc * pick(scales, problem)).to(",
        "acc.to(",
    ),
    Fault(
        "score: earlier gradients are left out",
        "gpu/score.py",
        "acc += tl.load(pick(previous, problem) + at, mask=inside, other=0.0)",
        "acc += 0.0",
    ),
    Fault(
        "score: gradients are not scaled",
        "gpu/score.py",
        "acc *= pick(scales, problem)",
        "acc *= 1.0",
    ),
    Fault(
        "score: signed sums",
        "gpu/score.py",
        "tl.sum(tl.abs(factor * acc))",
        "tl.sum(factor * acc)",
    ),
    Fault(
        "passes: dB of the branch's padding instead of its ranks",
        "gpu/passes.py",
        "low, high = max(part.start, first), min(part.stop, first + rank)",
        "low, high = max(part.start, first), min(part.stop, first + rank - 1)",
    ),
    Fault(
        "passes: int32 addresses where int64 are needed",
        "gpu/passes.py",
        "if (rows + 1024) * down >= 2**31 or (columns + 1024) * along >= 2**31:",
        "if (rows + 1024) * down >= 2**50 or (columns + 1024) * along >= 2**50:",
    ),
    Fault(
        "tables: a block of ranks that does not divide the widths",
        "gpu/tables.py",
        "if all(width % size == 0 for width in widths)",
        "if any(width % size == 0 for width in widths)",
    ),
    Fault(
        "buckets: a rank of 17 in 16 columns",
        "group.py",
        "if rest <= size",
        "if rest <= size + 1",
    ),
    Fault(
        "spec: the dropout mask is not applied to du",
        "spec.py",
        "du = (ds @ branch.a) * mask",
        "du = ds @ branch.a",
        (1,),
    ),
    Fault(
        "aten: dB without its scale",
        "aten/linear.py",
        "d_b_t.addmm_(_columns(s, columns).t(), grad, beta=0, alpha=call.scales[j])",
        "d_b_t.addmm_(_columns(s, columns).t(), grad, beta=0)",
        (2,),
    ),
    Fault(
        "onednn: only the first sibling's part of dX",
        "aten/onednn.py",
        'return torch.ops.mkldnn._linear_pointwise.binary(x, total, weight.t(), None, "add")',
        "return total",
        (2,),
    ),
    Fault(
        "aten: S is not scaled on its way to Y",
        "aten/linear.py",
        "torch.addmm(bias, left, right, alpha=scale, out=y)",
        "torch.addmm(bias, left, right, out=y)",
        (2,),
    ),
    Fault(
        "expand: float32 products rounded to tf32 whatever was asked for",
        "gpu/expand.py",
        "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION, out_dtype=ACC)",
        "acc = tl.dot(x_tile, w_tile, acc, out_dtype=ACC)",
        (4,),
    ),
    Fault(
        "tables: a compiled kernel for every mixture of ranks",
        "gpu/tables.py",
        "return tuple(16 * number for number in numbers)",
        "return tuple(16 * number + number % 2 for number in numbers)",
        (4,),
    ),
    Fault(
        "expand: a break in the loop, which only the interpreter takes",
        "gpu/expand.py",
        "w_tiles = w_columns + (first * step if TRANSPOSED else first)",
        "w_tiles = w_columns + (first * step if TRANSPOSED else first)\n"
        "                if first > k:\n"
        "                    break",
        (4,),
    ),
]
