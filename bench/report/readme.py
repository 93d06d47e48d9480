"""The bench's blocks of a Markdown file: what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->` is written from result files.
"""

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence

from heterolora.bench.cases.peers import BASELINE, FLOOR
from heterolora.bench.harness.record import BenchRun, CaseResult
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.measures import (
    DTYPES,
    counted,
    devices,
    field_of,
    last_half,
    loss_difference,
    memory_cases,
    noise,
    only,
    ratios,
    saved_per_token,
    spread,
    tokens_per_second,
)
from heterolora.bench.report.tables import Table, digits, markdown_of, names_in
from heterolora.bench.report.targets import targets_table

__all__ = ["BLOCKS", "TARGETS_BLOCK", "update"]

_OF_PEFT = "of PEFT's"
# Of docs/gpu.md; it waits for its first measurement cell by cell.
TARGETS_BLOCK = "targets"

# A block that may wait for its first result.
_PENDING = {"train": "Not measured yet."}
_MARKER = re.compile(r"<!-- (/?)bench:(\S+) -->")


def update(text: str, runs: Sequence[BenchRun]) -> str:
    """`text` with each block written anew from `runs`; the rest stays as it is.

    Raises:
        BenchError: an unknown block, one without its end, an end without its begin, or no result
            for a block that cannot wait for its first.
    """
    written, end = [], 0
    markers = iter(_MARKER.finditer(text))
    for begin in markers:
        closing, name = begin.groups()
        if closing:
            raise BenchError(f"{begin[0]}: no <!-- bench:{name} --> before it")
        if name != TARGETS_BLOCK and name not in BLOCKS:
            known = ", ".join([*BLOCKS, TARGETS_BLOCK])
            raise BenchError(f"{begin[0]}: unknown block; use one of {known}")
        last = next(markers, None)
        if last is None or last.groups() != ("/", name):
            raise BenchError(f"{begin[0]}: not followed by <!-- /bench:{name} -->")
        written += [text[end : begin.end()], f"\n{_block(name, runs)}\n"]
        end = last.start()
    return "".join([*written, text[end:]])


def _block(name: str, runs: Sequence[BenchRun]) -> str:
    if name == TARGETS_BLOCK:
        return targets_table(runs)
    parts = [BLOCKS[name](device, measured) for device, measured in devices(runs).items()]
    if not any(parts):
        if name in _PENDING:
            return _PENDING[name]
        raise BenchError(f"block {name!r}: no result to write it from; measure, or drop the block")
    return "\n\n".join(filter(None, parts))


def _headline(device: str, runs: Sequence[BenchRun]) -> str:
    """Two of the README's three numbers: time and memory of a whole model's training step."""
    timed = [r for _, r in only(runs, "model") if ratios([r], "fused", BASELINE)]
    if not timed:
        return ""
    memory = {dtype: _peaks(r for r in timed if r.dtype == dtype) for dtype in DTYPES}
    time = _times(timed, BASELINE, _OF_PEFT)
    points = [
        f"**Time**: a fused training step of a whole model takes {time} "
        f"({_machine(device, runs)}, {counted(len(timed))}; [all of them](docs/bench.md))."
    ]
    if any(memory.values()):
        points.append(f"**Memory**: its peak is {_by_dtype(memory, _OF_PEFT)}.")
    return "\n".join(
        textwrap.fill(
            point,
            100,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for point in points
    )


def _summary(device: str, runs: Sequence[BenchRun]) -> str:
    """Ranges over whole models and over the linears of one, training runs, and peak memory."""
    sentences, chosen = [], []
    for part, start, frozen in (
        ("model", "A fused training step of a whole model takes", "model's"),
        ("linears", "On the linears of a model alone it takes", "linears'"),
    ):
        timed = [r for _, r in only(runs, part) if ratios([r], "fused", BASELINE)]
        floored = [r for r in timed if ratios([r], "fused", FLOOR)]
        if timed:
            chosen += timed
            sentence = start + " " + _times(timed, BASELINE, "of PEFT's time")
            if floored:
                sentence += f", and {_times(floored, FLOOR, f'of the frozen {frozen}')}"
            sentences.append(sentence + ".")
    if not chosen:
        return ""
    sentences.append(
        "Only with a faster base matmul than torch's own can LoRA take less than the frozen model."
    )
    trained = [r for _, r in only(runs, "train") if ratios([r], "fused", BASELINE)]
    if trained:
        whose = "of that of PEFT with uniform ranks and as many parameters"
        takes = _times(trained, BASELINE, whose)
        sentences.append(f"In whole training runs with searched ranks a step takes {takes}.")
    memory = {dtype: _peaks(r for r in chosen if r.dtype == dtype) for dtype in DTYPES}
    if any(memory.values()):
        sentences.append("Peak memory is " + _by_dtype(memory, "of PEFT's") + ".")
    sentences.append(f"({_machine(device, runs)}, {counted(len(chosen))}.)")
    red = sum(not result.green for _, result in only(runs))
    if red:
        sentences.append(f"Cases without a number because their parity check failed: {red}.")
    return textwrap.fill(" ".join(sentences), 100, break_long_words=False, break_on_hyphens=False)


def _times(results: Sequence[CaseResult], baseline: str, whose: str) -> str:
    found = {d: ratios((r for r in results if r.dtype == d), "fused", baseline) for d in DTYPES}
    return _by_dtype(found, whose)


def _models(device: str, runs: Sequence[BenchRun]) -> str:
    chosen = [r for part in ("model", "linears") for _, r in only(runs, part)]
    timed = [result for result in chosen if result.timing is not None]
    columns = {
        "floor / PEFT": FLOOR,
        "PEFT, adapters in the base's dtype / PEFT": "peft-lowp",
        "compiled PEFT / PEFT": "compile-peft",
        "compiled fused / PEFT": "compile-fused",
    }
    columns = {head: name for head, name in columns.items() if ratios(timed, name, BASELINE)}
    rows = [
        (
            _label(result),
            _with_quartiles(result, "fused", BASELINE),
            _ratio(result, "fused", FLOOR),
            *(_ratio(result, name, BASELINE) for name in columns.values()),
            "".join(f"{peak:.2f}" for peak in _peaks([result])),
        )
        for result in timed
    ]
    head = ("training step", "fused / PEFT", "fused / floor", *columns, "peak memory, fused / PEFT")
    note = (
        "Medians over interleaved rounds, quartiles in brackets. The floor is the frozen model "
        "alone as torch runs it, forward and input gradient: below it only a faster base matmul "
        "leads (in float32 fused runs it by oneDNN on AMD processors)."
    )
    same = noise(runs)
    if same:
        low, _, high = spread(same)
        note += (
            " In float32, adapters in the base's dtype are what PEFT computes anyway, so that "
            f"ratio shows the noise: {low:.2f} to {high:.2f} over {counted(len(same))}."
        )
    return _titled(device, runs, note, head, rows)


def _operations(device: str, runs: Sequence[BenchRun]) -> str:
    """A row a shape and allocation, a column for each number of tokens and dtype."""
    cells: dict[str, dict[tuple[int, str], str]] = {}
    for part in ("op", "group"):
        for _, result in only(runs, part):
            against, over = _ratio(result, "fused", BASELINE), _ratio(result, "fused", FLOOR)
            if against:
                label = _label(result, f", {result.tokens} tokens", f", {result.dtype}")
                place = (result.tokens, result.dtype)
                cells.setdefault(label, {})[place] = f"{against} ({over})" if over else against
    places = {place for row in cells.values() for place in row}
    columns = [(m, dtype) for m in sorted({m for m, _ in places}) for dtype in DTYPES]
    columns = [place for place in columns if place in places]
    rows = [(label, *(row.get(place, "") for place in columns)) for label, row in cells.items()]
    head = ("in to out features, rank", *(f"{m:,} tokens, {dtype}" for m, dtype in columns))
    note = (
        "Forward and backward of linears alone, caches cold: fused / PEFT, and fused / floor in "
        "brackets."
    )
    return _titled(device, runs, note, head, rows)


def _scoring(device: str, runs: Sequence[BenchRun]) -> str:
    rows = [
        (
            _label(result, ": one batch of the search, every linear a candidate"),
            _with_quartiles(result, "fused", FLOOR),
            _ratio(result, BASELINE, FLOOR),
            _ratio(result, "fused", BASELINE),
            *(_launches(result, name) for name in ("fused", BASELINE, FLOOR)),
        )
        for _, result in only(runs, "scoring")
        if result.timing is not None
    ]
    head = (
        "one batch, every linear a candidate",
        "score op / frozen pass",
        "plain route / frozen pass",
        "score op / plain route",
        "launches: score op",
        "plain route",
        "frozen pass",
    )
    note = (
        "A frozen pass is forward and backward of the model without adapters. The plain route is "
        "autograd, one norm at a time."
    )
    return _titled(device, runs, note, head, rows)


def _memory(device: str, runs: Sequence[BenchRun]) -> str:
    found = memory_cases(runs)
    dtypes = [dtype for dtype in DTYPES if any(dtype in some for some in found.values())]
    names = {"PEFT": BASELINE, "fused": "fused", "frozen": FLOOR}
    rows = []
    for label, some in found.items():
        cells = [label]
        for dtype in dtypes:
            for name in names.values():
                saved = saved_per_token(some[dtype], name) if dtype in some else None
                cells.append("" if saved is None else f"{saved:,.0f}")
        rows.append(tuple(cells))
    head = ("", *(f"{name}, {dtype}" for dtype in dtypes for name in names))
    note = (
        "Bytes that forward keeps for backward, per token and layer, parameters excluded; uniform "
        "ranks."
    )
    return _titled(device, runs, note, head, rows)


def _training(device: str, runs: Sequence[BenchRun]) -> str:
    rows: list[tuple[str, ...]] = []
    for run, result in only(runs, "train"):
        if result.timing is None or (training := result.training) is None:
            continue
        label = f"{result.case}, {training.weights}"
        for name, arm in names_in("train").items():
            rate, used = tokens_per_second(run, result, name), result.memory.get(name)
            difference = loss_difference(result, name)
            rows.append(
                (
                    label,
                    arm,
                    _with_quartiles(result, name, BASELINE),
                    "" if rate is None else digits(rate),
                    "" if used is None else f"{used.total / 1e6:,.1f}",
                    f"{training.parameters[name]:,}",
                    _ranks(result) if arm.endswith("searched") else str(training.rank),
                    str(training.through_op[name]),
                    f"{statistics.fmean(last_half(result, name)):.4f}",
                    ""
                    if difference is None or name == BASELINE
                    else "{:+.4f} ± {:.4f}".format(*difference),
                )
            )
            label = ""
    head = (
        "case",
        "arm",
        "step / PEFT, uniform",
        "tokens/s",
        "peak MB",
        "trained parameters",
        "ranks",
        "adapters in the op",
        "loss",
        "loss less PEFT's, uniform",
    )
    note = (
        "Each round trains every arm from the same seed. Time of a step: medians over rounds, "
        "quartiles in brackets. Loss: mean over the last half of the run and over the seeds, and "
        "the mean of the differences within a seed with its standard error."
    )
    return _titled(device, runs, note, head, rows, part="train")


def _ranks(result: CaseResult) -> str:
    values = list(result.ranks.values())
    zeros = values.count(0)
    return f"{min(values)} to {max(values)}" + (f", {zeros} of {len(values)} at 0" * (zeros > 0))


BLOCKS: dict[str, Callable[[str, Sequence[BenchRun]], str]] = {
    "headline": _headline,
    "summary": _summary,
    "models": _models,
    "ops": _operations,
    "scoring": _scoring,
    "memory": _memory,
    "train": _training,
}


def _titled(
    device: str,
    runs: Sequence[BenchRun],
    note: str,
    head: tuple[str, ...],
    rows: list[tuple[str, ...]],
    part: str | None = None,
) -> str:
    """The table under a paragraph, which counts the rounds of a section; empty without rows."""
    if not rows:
        return ""
    text = f"{_machine(device, runs, part)}. {note}"
    wrapped = textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
    return f"{wrapped}\n\n{markdown_of(Table(head, rows))}"


def _machine(device: str, runs: Sequence[BenchRun], part: str | None = None) -> str:
    """ "AMD EPYC, 1 thread, 15 rounds"; threads are a CPU's, rounds those of one section or all."""
    parts = [device]
    threads = sorted({field_of(run, "threads") for run in runs})
    if all(field_of(run, "device_type") == "cpu" for run in runs):
        parts.append("1 thread" if threads == [1] else f"{' or '.join(map(str, threads))} threads")
    rounds = {r.timing.rounds for _, r in only(runs, part) if r.timing is not None}
    if rounds:
        low, high = min(rounds), max(rounds)
        parts.append(f"{low} rounds" if low == high else f"{low} to {high} rounds")
    return ", ".join(parts)


def _by_dtype(values: dict[str, list[float]], unit: str) -> str:
    """ "0.79 to 0.81 `unit` in float32 and 0.67 in bfloat16"."""
    parts: list[str] = []
    for dtype, some in values.items():
        if some:
            low, high = f"{min(some):.2f}", f"{max(some):.2f}"
            shown = low if low == high else f"{low} to {high}"
            parts.append(f"{shown}{'' if parts else f' {unit}'} in {DTYPES[dtype]}")
    return " and ".join(parts)


def _peaks(results: Iterable[CaseResult]) -> list[float]:
    """Peak memory of fused over PEFT's, where both were measured."""
    return [
        result.memory["fused"].total / result.memory[BASELINE].total
        for result in results
        if {"fused", BASELINE} <= result.memory.keys()
    ]


def _label(result: CaseResult, *without: str) -> str:
    text = result.description
    for part in (", training step", *without):
        text = text.replace(part, "")
    return text


def _ratio(result: CaseResult, variant: str, baseline: str) -> str:
    return "".join(f"{ratio:.2f}" for ratio in ratios([result], variant, baseline))


def _launches(result: CaseResult, variant: str) -> str:
    return f"{result.launches[variant]:,}" if variant in result.launches else ""


def _with_quartiles(result: CaseResult, variant: str, baseline: str) -> str:
    if result.timing is None or not ratios([result], variant, baseline):
        return ""
    found = result.timing.summary(variant, baseline=baseline)
    return f"**{found.ratio:.2f}** [{found.ratio_low:.2f}, {found.ratio_high:.2f}]"
