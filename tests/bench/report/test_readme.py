"""The README's numbers come from the files, and cannot differ from them."""

import re
from pathlib import Path

import pytest
from bench_runs import environment, full_run, red, result, trained

from heterolora.bench.harness.record import BenchRun
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.measures import read_folder
from heterolora.bench.report.readme import BLOCKS, update

ROOT = Path(__file__).resolve().parents[3]
SAMPLES = {
    "peft": [0.010, 0.010, 0.012],
    "fused": [0.008, 0.006, 0.0084],
    "base-only": [0.005, 0.005, 0.006],
}


def block(name, *runs):
    text = update(f"<!-- bench:{name} --><!-- /bench:{name} -->", runs)
    return text.removeprefix(f"<!-- bench:{name} -->\n").removesuffix(f"\n<!-- /bench:{name} -->")


def run_of(*results, **changed):
    return BenchRun({**environment(), **changed}, list(results))


def cells(text, start):
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_documents_are_what_the_results_say():
    """If this fails: `heterolora bench report --readme README.md --readme docs/bench.md`."""
    runs = read_folder(ROOT / "bench" / "results")
    blocks = []
    for file in (ROOT / "README.md", ROOT / "docs" / "bench.md"):
        text = file.read_text(encoding="utf-8")
        blocks += re.findall(r"<!-- bench:(\S+) -->", text)
        assert text == update(text, runs), file.name
    assert sorted(blocks) == sorted(BLOCKS)


def test_blocks_are_replaced_and_the_rest_is_kept():
    text = "a\n<!-- bench:memory -->\nold 1\n<!-- /bench:memory -->\nb\n<!-- other -->\n" * 2
    new = update(text, [full_run()])
    assert "old 1" not in new and new.count("| minilm-16x64 |") == 2
    assert re.sub(r"(?s)(<!-- bench:memory -->).*?(<!-- /)", r"\1\nold 1\n\2", new) == text
    assert update(new, [full_run()]) == new
    assert update("no block\n", []) == "no block\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:speed --><!-- /bench:speed -->", "bench:speed -->: unknown block; use one of"),
        ("<!-- bench:ops -->", "bench:ops -->: not followed by <!-- /bench:ops -->"),
        ("<!-- bench:ops --><!-- bench:memory -->", "not followed by <!-- /bench:ops -->"),
        ("<!-- bench:ops --><!-- /bench:memory -->", "not followed by <!-- /bench:ops -->"),
        ("<!-- /bench:ops -->", "no <!-- bench:ops --> before it"),
    ],
)
def test_broken_markers(text, message):
    with pytest.raises(BenchError, match=re.escape(message)):
        update(text, [full_run()])


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_without_results_is_an_error_or_waits(name):
    if name == "train":
        assert block(name) == block(name, run_of(red())) == "Not measured yet."
        return
    for runs in ([], [run_of(red())]):
        with pytest.raises(BenchError, match=f"block '{name}': no result"):
            update(f"<!-- bench:{name} --><!-- /bench:{name} -->", runs)


def test_headline_has_the_ranges():
    slow = {**SAMPLES, "fused": [0.009, 0.009, 0.0108]}
    cases = [
        result("a-fp32-uniform", "model", SAMPLES),
        result("b-fp32-uniform", "model", slow),
        result("a-bf16-uniform", "model", SAMPLES, dtype="bf16"),
        result("linears-4x4-fp32-uniform", "model", slow),
        result("op-8x8-m64-r8-fp32", "op", SAMPLES),
        red(),
    ]
    assert " ".join(block("summary", run_of(*cases)).split()) == (
        "A fused training step of a whole model takes 0.70 to 0.90 of PEFT's time in float32 and "
        "0.70 in bfloat16, and 1.40 to 1.80 of the frozen model's in float32 and 1.40 in bfloat16. "
        "On the linears of a model alone it takes 0.90 of PEFT's time in float32, and 1.80 of the "
        "frozen linears' in float32. Only with a faster base matmul than torch's own can LoRA take "
        "less than the frozen model. Peak memory is 1.00 of PEFT's in float32 and 1.00 in "
        "bfloat16. (Made-up CPU, 1 thread, 3 rounds, 4 cases.) Cases without a number because "
        "their parity check failed: 1."
    )
    assert max(map(len, block("summary", run_of(*cases)).splitlines())) <= 100


def test_models_have_a_column_for_what_was_compiled():
    what = "MiniLM shapes, 16x64 tokens, training step, fp32, r=8"
    case = result("minilm-16x64-fp32-uniform", "model", SAMPLES, description=what)
    text = block("models", run_of(case))
    row = ["MiniLM shapes, 16x64 tokens, fp32, r=8", "**0.70** [0.65, 0.75]", "1.40", "0.50"]
    assert cells(text, "MiniLM") == [*row, "1.00"]
    assert "compiled" not in text and "noise" not in text
    more = {**SAMPLES, "peft-lowp": [0.0103] * 3, "compile-peft": [0.009, 0.009, 0.0108]}
    both = result("b-fp32-uniform", "model", more, description="other")
    text = block("models", run_of(case, both))
    assert cells(text, "other")[3:] == ["0.50", "1.03", "0.90", "1.00"]
    assert cells(text, "MiniLM")[3:] == ["0.50", "", "", "1.00"]
    assert "shows the noise: 1.03 to 1.03 over 1 case." in " ".join(text.split())


def test_operations_have_a_row_a_shape_and_a_column_a_batch():
    text = block("ops", full_run())
    head = cells(text, "in to out")
    assert head[1:3] == ["256 tokens, fp32", "256 tokens, bf16"] and len(head) == 7
    row = cells(text, "1024 to 1024, r128 ")
    assert [bool(cell) for cell in row] == [True, False, False, True, True, False, False]
    one = result(
        "op-8x8-m64-r8-fp32", "op", SAMPLES, description="8 to 8, 64 tokens, r8, fp32", repeats=2
    )
    assert cells(block("ops", run_of(one)), "8 to 8") == ["8 to 8, r8", "0.70 (1.40)"]


def test_scoring_is_relative_to_a_frozen_pass():
    launches = {"peft": 1500, "fused": 300, "base-only": 200}
    case = result("scoring-toy-fp32", "scoring", SAMPLES, launches=launches)
    row = cells(block("scoring", run_of(case)), "a toy")
    assert row[1:] == ["**1.40** [1.30, 1.50]", "2.00", "0.70", "300", "1,500", "200"]


def test_memory_is_per_token_and_layer():
    row = cells(block("memory", run_of(result("toy-fp32-uniform", "model", SAMPLES))), "toy")
    assert row == ["toy", "1,000", "750", "500"]


def test_training_runs_are_compared_seed_by_seed():
    losses = {
        # Last halves: 0.6 and 0.8, 0.5 and 0.6: differences -0.1 and -0.2.
        "peft": [[1.0, 1.0, 0.7, 0.5], [1.0, 1.0, 0.9, 0.7]],
        "fused": [[1.0, 1.0, 0.6, 0.4], [1.0, 1.0, 0.7, 0.5]],
        "peft-searched": [[1.0, 1.0, 0.6, 0.4], [1.0, 1.0, 0.8, 0.6]],
        "fused-uniform": [[1.0, 1.0, 0.7, 0.5], [1.0, 1.0, 0.9, 0.7]],
    }
    case = trained("train-toy-fp32", losses, tokens=100)
    text = block("train", run_of(case, result("op-8x8-m64-r8-fp32", "op", SAMPLES)))
    assert "1 thread, 2 rounds. Each round trains every arm" in " ".join(text.split())
    label, arm, *peft = cells(text, "train-toy-fp32")
    assert (label, arm) == ("train-toy-fp32, made-up weights", "PEFT, uniform")
    assert peft == [
        "**1.00** [1.00, 1.00]", "10,000", "4.0", "1,234", "8", "0", "0.7000", "",
    ]  # fmt: skip
    (fused,) = (line for line in text.splitlines() if "| fused, searched |" in line)
    assert [cell.strip() for cell in fused.strip("|").split("|")] == [
        "", "fused, searched", "**1.10** [1.10, 1.10]", "9,091", "4.0", "1,234",
        "0 to 24, 2 of 3 at 0", "3", "0.5500", "-0.1500 ± 0.0500",
    ]  # fmt: skip
    one = trained("train-toy-fp32", {name: runs[:1] for name, runs in losses.items()})
    assert "±" not in block("train", run_of(one))


def test_each_device_has_its_part():
    gpu = full_run(device="H100", device_type="cuda")
    text = block("scoring", gpu, full_run())
    assert text.index("Made-up CPU, 1 thread, 5 rounds") < text.index("H100, 5 rounds")
