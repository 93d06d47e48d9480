"""Plots of the bench: what is drawn is what was measured, and without data nothing is."""

import subprocess
import sys
from pathlib import Path

import pytest
from bench_runs import BANDWIDTH, FLOPS, environment, full_run, red, result, trained

from heterolora.bench.harness.record import BenchRun
from heterolora.bench.harness.work import Work
from heterolora.bench.report.drawing import svg
from heterolora.bench.report.measures import only, ratios
from heterolora.bench.report.plots import PLOTS, write_pngs


def run_of(*results, **changed):
    return BenchRun({**environment(), **changed}, list(results))


def linear(k, n, m, rank, dtype="fp32", *, fused=1.1, peft=1.5, shortcut=0, **fields):
    """A linear whose floor takes 10 ms in every round."""
    samples = {"peft": peft, "fused": fused, "base-only": 1.0}
    ranks = {f"copies.{i}": r for i, r in enumerate(rank)}
    return result(
        f"op-{k}x{n}-m{m}-x-{dtype}",
        "op",
        {name: [0.01 * over] * 3 for name, over in samples.items()},
        work=Work(10**9, 10**7, 9 * 10**8, 9 * 10**6),
        dtype=dtype,
        shapes={"m": m, "k": k, "n": n, "sites": 1, "shortcut": shortcut},
        ranks=ranks,
        tokens=m,
        **fields,
    )


def points(axes):
    return [
        list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if line.get_marker() not in ("", "None", None)
    ]


@pytest.mark.parametrize("name", PLOTS)
def test_nothing_is_drawn_of_nothing(name):
    assert PLOTS[name].missing
    assert PLOTS[name].draw([]) is None
    assert PLOTS[name].draw([run_of(red())]) is None


def test_roofline_has_a_pair_of_points_a_case_and_the_ceilings():
    figure = PLOTS["roofline"].draw([run_of(linear(64, 64, 32, [16]))])
    (axes,) = figure.axes
    fused, peft = (list(map(list, points.get_offsets())) for points in axes.collections)
    # 1e9 FLOPs and 1e7 bytes in 11 ms and in 15 ms.
    assert fused == [pytest.approx([100, 1e9 / 0.011 / 1e9])]
    assert peft == [pytest.approx([100, 1e9 / 0.015 / 1e9])]
    ridge = FLOPS["fp32"] / BANDWIDTH
    line = list(zip(axes.lines[0].get_xdata(), axes.lines[0].get_ydata(), strict=True))
    assert line[1] == pytest.approx((ridge, 100))
    assert line[0][1] / line[0][0] == pytest.approx(BANDWIDTH / 1e9)


def test_roofline_needs_ceilings_and_linears_alone():
    draw = PLOTS["roofline"].draw
    assert draw([run_of(linear(64, 64, 32, [16]), ceilings=None)]) is None
    assert draw([run_of(linear(64, 64, 32, [16], shortcut=1))]) is None


def test_overhead_has_a_panel_a_dtype_and_number_of_tokens():
    kept = [linear(d, d, m, [16], dtype) for d in (64, 1024) for m in (32, 256) for dtype in FLOPS]
    dropped = [
        linear(64, 32, 32, [16]),
        linear(64, 64, 32, [8], fused=9),
        linear(64, 64, 32, [16], fused=9, dropout=0.1),
        linear(64, 64, 32, [16], fused=9, shortcut=1),
    ]
    figure = PLOTS["overhead"].draw([run_of(*kept, *dropped)])
    assert [axes.get_title() for axes in figure.axes] == ["32 tokens", "256 tokens", "", ""]
    for axes in figure.axes:
        fused, peft = points(axes)
        assert fused == [(0, pytest.approx(10)), (1, pytest.approx(10))]
        assert peft == [(0, pytest.approx(50)), (1, pytest.approx(50))]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["64", "1k"]
    assert PLOTS["overhead"].draw([run_of(*dropped)]) is None


def test_rank_mix_has_uniform_ranks_as_a_line_and_mixed_lists_beside():
    mixed, sparse = [0, 64, 4, 16, 8, 4], [0, 0, 64, 0, 0, 32]
    cases = [linear(64, 64, 32, ranks) for ranks in ([128], [16], [8], mixed, sparse)]
    figure = PLOTS["rank-mix"].draw([run_of(*cases)])
    (axes,) = figure.axes
    fused, fused_mixed, fused_sparse, *peft = points(axes)
    assert [x for x, _ in fused] == [8, 16, 128]
    assert fused_mixed == [(pytest.approx(16 * 1.09), pytest.approx(1.1))]
    assert fused_sparse[0][0] > fused_mixed[0][0]
    assert [y for line in peft for _, y in line] == pytest.approx([1.5] * 5)
    assert PLOTS["rank-mix"].draw([run_of(*cases[:2], cases[3])]) is None


def test_models_have_a_bar_a_variant_with_its_quartiles():
    run = full_run()
    figure = PLOTS["models"].draw([run])
    cases = [case for part in ("model", "linears") for _, case in only([run], part)]
    timed = [case for case in cases if case.timing is not None]
    for axes, dtype in zip(figure.axes, FLOPS, strict=True):
        names = ("base-only", "fused", "compile-fused", "compile-peft")
        want = [r for c in timed if c.dtype == dtype for n in names for r in ratios([c], n, "peft")]
        assert [bar.get_width() for bar in axes.patches] == want
        first = next(case.timing for case in timed if case.dtype == dtype).summary("base-only")
        (whisker,) = axes.collections[0].get_segments()
        assert [x for x, _ in whisker] == pytest.approx([first.ratio_low, first.ratio_high])
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["minilm-16x64-uniform", "minilm-16x64-mixed"]
    bars = sorted(bar.get_y() for bar in figure.axes[0].patches)
    assert all(b - a > 0.9 for a, b in zip(bars, bars[1:], strict=False)), "bars overlap"


def test_scoring_is_relative_to_the_frozen_pass():
    samples = {"peft": [0.03] * 3, "fused": [0.022] * 3, "base-only": [0.02] * 3}
    figure = PLOTS["scoring"].draw([run_of(result("scoring-toy-fp32", "scoring", samples))])
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1.1, 1.5])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "score op",
        "plain route",
    ]


def test_saved_has_one_row_a_model_or_group():
    samples = {"peft": [0.03] * 3, "fused": [0.022] * 3, "base-only": [0.02] * 3}
    cases = [
        result("toy-fp32-uniform", "model", samples),
        result("toy-fp32-mixed", "model", samples, ranks={"a": 8, "b": 0}),
        result("qkv-64-m32-r16-fp32", "group", samples),
        result("qkv-64-m256-r16-fp32", "group", samples),
    ]
    (axes,) = PLOTS["saved"].draw([run_of(*cases)]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["toy", "qkv-64"]
    # 128 000, 96 000 and 64 000 bytes of 64 tokens and 2 layers.
    assert points(axes)[:3] == [[(1.0, 0)], [(0.75, 0)], [(0.5, 0)]]


def test_losses_are_the_mean_of_the_seeds_over_their_range():
    losses = {"peft": [[3.0, 2.0], [5.0, 1.0]], "fused": [[3.0, 1.5], [4.0, 0.5]]}
    cases = [trained(f"train-toy-{dtype}", losses, dtype=dtype) for dtype in (*FLOPS, "fp16")]
    figure = PLOTS["train"].draw([run_of(*cases)])
    assert [axes.get_title() for axes in figure.axes] == ["toy-fp32", "toy-bf16", "toy-fp16"]
    for axes in figure.axes:
        assert [list(line.get_xydata().ravel()) for line in axes.lines] == [
            [1, 4.0, 2, 1.5],
            [1, 3.5, 2, 1.0],
        ]
        (peft, _) = (band.get_paths()[0].get_extents() for band in axes.collections)
        assert (peft.ymin, peft.ymax) == (1.0, 5.0)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["PEFT, uniform", "fused, searched"]


def test_pngs_of_every_device(tmp_path):
    gpu = full_run(device="Made-up GPU", device_type="cuda")
    written = write_pngs([full_run(), gpu], tmp_path / "plots")
    names = {f"{device}-{name}.png" for device in ("made-up-cpu", "made-up-gpu") for name in PLOTS}
    assert {path.name for path in written} == names
    for path in written:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG") and int.from_bytes(head[16:20], "big") == 1680
    assert write_pngs([run_of(red())], tmp_path) == []


def test_svg_is_inline_and_repeats():
    first, second = (svg(PLOTS["models"].draw([full_run()]), 'a "b" <c>') for _ in range(2))
    assert first == second
    assert first.startswith('<svg role="img" aria-label="a &quot;b&quot; &lt;c&gt;"')
    assert "http" not in first and "<metadata" not in first


@pytest.mark.slow
def test_pyplot_is_not_touched_and_matplotlib_only_when_drawing():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from bench_runs import full_run\n"
        "from heterolora.bench.report import page, plots, readme\n"
        "assert 'matplotlib' not in sys.modules\n"
        "drawn = [plot.draw([full_run()]) for plot in plots.PLOTS.values()]\n"
        "assert all(drawn) and 'matplotlib.pyplot' not in sys.modules\n"
    )
    here = str(Path(__file__).resolve().parents[2] / "support")
    done = subprocess.run([sys.executable, "-c", code, here], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
