"""Tables of the bench: every number is what the samples give, and what has none is named."""

import dataclasses

import pytest
from bench_runs import environment, full_run, red, result

from heterolora.bench.harness.record import BenchRun, read_run, write_run
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.harness.work import Work
from heterolora.bench.report.measures import (
    ceilings,
    devices,
    noise,
    only,
    read_folder,
    step_seconds,
)
from heterolora.bench.report.tables import (
    HEADER,
    absences,
    case_rows,
    digits,
    headline_table,
    markdown_table,
    memory_table,
    parity_table,
    time_table,
    work_table,
)

# Ratios of fused: 0.8, 0.6, 0.7 to PEFT and 1.6, 1.2, 1.4 to the floor.
SAMPLES = {
    "peft": [0.010, 0.010, 0.012],
    "fused": [0.008, 0.006, 0.0084],
    "base-only": [0.005, 0.005, 0.006],
}
SAVED = {"peft": 256_000, "fused": 128_000, "base-only": 64_000}


def toy(case="toy-fp32-uniform", kind="model", samples=None, **fields):
    return result(case, kind, samples or SAMPLES, **{"saved": SAVED, **fields})


def run_of(*results, **changed):
    return BenchRun({**environment(), **changed}, list(results))


def row_of(table, variant, case=None):
    rows = [row for row in table.rows if row[1] == variant and case in (None, row[0])]
    assert len(rows) == 1
    return dict(zip(table.head, rows[0], strict=True))


def test_the_made_up_results_are_results(tmp_path):
    run = full_run()
    write_run(run, tmp_path / "run.json")
    assert read_run(tmp_path / "run.json") == run


def test_terminal_rows():
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in case_rows(toy())}
    assert list(rows) == ["peft", "fused", "base-only"]
    assert list(rows["fused"].values()) == [
        "fused", "8.00", "0.700", "0.65-0.75", "0.60", "1.40", "120", "4.0", "1,000",
    ]  # fmt: skip
    assert case_rows(red()) == []


def test_a_step_of_copies_is_shown_as_one():
    rows = {row[0]: dict(zip(HEADER, row, strict=True)) for row in case_rows(toy(repeats=4))}
    assert (rows["fused"]["ms"], rows["fused"]["launches"]) == ("2.00", "30")
    table = time_table([run_of(toy("op-8x8-m64-r8-fp32", "op", repeats=4))], "op")
    assert (row_of(table, "fused")["ms"], row_of(table, "fused")["launches"]) == ("2.00", "30")
    assert "one copy of the group" in table.note


def test_times_against_each_peer_that_ran():
    compiled = {**SAMPLES, "compile-peft": [0.004, 0.003, 0.0042], "compile-fused": [0.002] * 3}
    table = time_table([run_of(toy(samples=compiled))], "model")
    fused = row_of(table, "fused")
    assert fused["/ PEFT"] == "0.700" and fused["quartiles"] == "0.65 to 0.75"
    assert fused["/ floor"] == "1.40" and fused["over floor"] == "+40 %"
    assert fused["/ compile-peft"] == "2.00"
    assert row_of(table, "compile-peft")["/ compile-peft"] == ""
    assert row_of(table, "base-only")["over floor"] == ""
    assert "/ compile-fused" not in table.head
    assert "/ compile-peft" not in time_table([run_of(toy())], "model").head


def test_scoring_names_its_routes():
    table = time_table([run_of(toy("scoring-toy-fp32", "scoring"))], "scoring")
    assert [row[1] for row in table.rows] == ["plain route", "score op", "frozen pass"]
    assert {"/ plain route", "/ frozen pass"} <= set(table.head)
    table = memory_table([run_of(toy("scoring-toy-fp32", "scoring"))], "scoring")
    assert row_of(table, "score op")["saved / plain route"] == "0.50"


WORK = Work(flops=400_000_000, bytes=4_000_000, base_flops=100_000_000, base_bytes=2_000_000)


def test_achieved_rates_against_the_minimum():
    """1e11 FLOP/s and 1e10 B/s: 4 ms and 0.4 ms of an 8 ms step."""
    table = work_table([run_of(toy("op-8x8-m64-r8-fp32", "op", work=WORK))], "op")
    assert row_of(table, "fused") == dict(
        zip(
            table.head,
            ("op-8x8-m64-r8-fp32", "fused", "100", "50.0", "50 %", "0.500", "5 %", "50 %"),
            strict=True,
        )
    )
    # The frozen layer's own work: 1 ms of 5.
    assert row_of(table, "base-only")["of roofline"] == "20 %"


def test_rates_only_where_the_step_is_its_linears():
    alone = toy("linears-16x64-fp32-uniform", work=WORK)
    cases = [toy(), alone, toy("op-8x8-m64-r16-fp32-shortcut", "op", shapes={"shortcut": 1})]
    run = run_of(*cases)
    assert not work_table([run], "model").rows and not work_table([run], "op").rows
    assert len(work_table([run], "linears").rows) == 3


def test_without_ceilings_there_are_rates_and_no_shares():
    table = work_table([run_of(toy("op-8x8-m64-r8-fp32", "op", work=WORK), ceilings=None)], "op")
    assert row_of(table, "fused")["GFLOP/s"] == "50.0"
    assert row_of(table, "fused")["of roofline"] == ""


@pytest.mark.parametrize(
    "found", ["fast", {"bandwidth": 1.0}, {"bandwidth": "x", "flops": {}}, {"flops": {"fp32": 1.0}}]
)
def test_malformed_ceilings(found):
    with pytest.raises(BenchError, match=r"environment\.ceilings: expected bandwidth and flops"):
        ceilings(run_of(ceilings=found), "fp32")


def test_ceilings_are_positive():
    with pytest.raises(BenchError, match="must be positive"):
        ceilings(run_of(ceilings={"bandwidth": 0, "flops": {"fp32": 1}}), "fp32")


def test_rates_of_several_threads_are_by_wall_time():
    case = toy()
    slower = {name: [2 * t for t in times] for name, times in SAMPLES.items()}
    case = dataclasses.replace(case, timing=dataclasses.replace(case.timing, wall_seconds=slower))
    assert step_seconds(run_of(case), case, "fused") == pytest.approx(0.008)
    assert step_seconds(run_of(case, threads=4), case, "fused") == pytest.approx(0.016)
    on_gpu = dataclasses.replace(
        case, timing=dataclasses.replace(case.timing, clock="CUDA event time")
    )
    assert step_seconds(run_of(on_gpu, threads=4), on_gpu, "fused") == pytest.approx(0.008)
    assert step_seconds(run_of(red()), red(), "fused") is None


def test_memory_per_token_and_layer():
    table = memory_table([run_of(toy())], "model")
    # 64 tokens, 2 layers.
    want = ("toy-fp32-uniform", "fused", "1,000", "0.50", "+500", "3.0", "1.0", "4.0", "1.00")
    assert row_of(table, "fused") == dict(zip(table.head, want, strict=True))
    assert row_of(table, "base-only")["over floor"] == ""


def test_headline_has_the_range_of_every_section():
    cases = [toy(), toy("other-fp32-uniform"), toy("linears-4x4-fp32-mixed")]
    slow = {**SAMPLES, "fused": [0.009, 0.009, 0.0108]}
    table = headline_table([run_of(*cases, toy("third-fp32-uniform", samples=slow), red())])
    assert table.rows == [
        ("Whole models", "fp32", "3", "0.70", "0.70", "0.90", "1.40", "1.40", "1.80"),
        ("The linears of a model alone", "fp32", "1", *["0.70"] * 3, *["1.40"] * 3),
    ]


def test_noise_is_peft_against_itself_in_float32():
    lowp = {**SAMPLES, "peft-lowp": [0.0104, 0.0104, 0.0121]}
    half = toy("toy-bf16-uniform", samples=lowp, dtype="bf16")
    assert noise([run_of(toy(samples=lowp), half)]) == pytest.approx([1.04])


def test_parity_of_every_case():
    rows = parity_table([run_of(toy(), red())]).rows
    assert [row[:4] for row in rows] == [
        ("toy-fp32-uniform", "green", "0.0e+00", "1.0e-07"),
        ("toy-bf16-uniform", "RED: not fused: 2 of 2", "", ""),
    ]


def test_what_has_no_number_is_named_once():
    why = {"triton": "needs a GPU"}
    cases = [toy(skipped=why, failed={"unsloth": "no"}), toy("b-fp32-uniform", skipped=why)]
    assert absences([run_of(*cases)]) == [
        "unsloth failed: no (toy-fp32-uniform)",
        "triton skipped: needs a GPU (all cases)",
    ]
    assert (
        absences([run_of(*cases, red())])[0]
        == "toy-bf16-uniform: red, not timed. not fused: 2 of 2"
    )


def test_markdown_has_every_section_and_no_number_for_the_red_case():
    text = markdown_table([full_run()])
    for title in ("Whole models: time", "One linear: work", "Scoring pass of the search: memory"):
        assert f"### {title}" in text
    assert "### Whole models: work" not in text
    (line,) = (line for line in text.splitlines() if "llama-1b-8x1024" in line)
    assert line == "- llama-1b-8x1024-bf16-mixed: red, not timed. not fused: 2 of 2"
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| minilm")}
    assert len(widths) == 2  # time and memory


def test_markdown_escapes_pipes():
    assert "| a\\|b-fp32 |" in markdown_table([run_of(toy("a|b-fp32"))])


def test_cases_are_in_the_order_of_the_registry():
    names = [
        "minilm-16x64-bf16-mixed",
        "unknown",
        "minilm-16x64-fp32-uniform",
        "tiny-4x16-fp32-mixed",
    ]
    runs = [run_of(*map(toy, names[:2])), run_of(*map(toy, names[2:]))]
    assert [case.case for _, case in only(runs)] == [names[3], names[2], names[0], names[1]]


def test_devices_have_the_cpu_first():
    gpu, cpu = full_run(device="H100", device_type="cuda"), full_run()
    assert list(devices([gpu, cpu])) == ["Made-up CPU", "H100"]
    assert devices([gpu, cpu, gpu])["H100"] == [gpu, gpu]
    del cpu.environment["device_type"]
    with pytest.raises(BenchError, match=r"environment\.device_type: missing"):
        devices([cpu])


def test_folder_joins_files_of_one_environment(tmp_path):
    measured = run_of(toy("a"), toy("b"))
    for one in measured.results:
        write_run(BenchRun(measured.environment, [one]), tmp_path / "cpu" / f"{one.case}.json")
    write_run(run_of(toy("c"), device="another"), tmp_path / "z.json")
    runs = read_folder(tmp_path)
    assert [[one.case for one in run.results] for run in runs] == [["a", "b"], ["c"]]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(BenchError, match="no such folder"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(BenchError, match="no result files"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234")]
)
def test_three_digits(value, text):
    assert digits(value) == text
