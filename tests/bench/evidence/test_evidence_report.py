"""Statistics with known answers, and the table made of them."""

import argparse
from pathlib import Path

import numpy as np
import pytest
from evidence_runs import entry

from heterolora.bench import evidence
from heterolora.bench.evidence import command
from heterolora.bench.evidence.arms.ablation import KINDS, PARTS, part_of
from heterolora.bench.evidence.arms.registry import ARMS
from heterolora.bench.evidence.command import BEGIN, END, tables, updated
from heterolora.bench.evidence.report.ablation import gains, predictions
from heterolora.bench.evidence.report.ablation import markdown as ablation_table
from heterolora.bench.evidence.report.pictures import (
    _costs,
    _differences,
    _ranks,
    write_pngs,
    write_predictions,
)
from heterolora.bench.evidence.report.statistics import (
    FEWEST,
    paired_difference,
    rank_correlation,
    spread,
)
from heterolora.bench.evidence.report.table import grouped, markdown
from heterolora.bench.evidence.store import Store
from heterolora.bench.harness.timing import BenchError


def test_spread_of_known_values():
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([4.0]) == (4.0, None)


def test_a_constant_difference_has_an_interval_of_no_width():
    # Seeds differ by far more than the arms, which only pairing can tell.
    other = {seed: 10.0 * seed for seed in range(6)}
    found = paired_difference({seed: value - 0.5 for seed, value in other.items()}, other)
    assert (found.pairs, found.mean, found.low, found.high) == (6, -0.5, -0.5, -0.5)
    assert found.beyond_noise


def test_only_common_seeds_are_compared():
    found = paired_difference({0: 1.0, 1: 2.0, 7: 100.0}, {0: 0.0, 1: 0.0, 8: -100.0})
    assert (found.pairs, found.mean) == (2, 1.5)
    assert paired_difference({0: 1.0}, {1: 1.0}) is None


def test_too_few_seeds_have_no_interval():
    arm, other = dict.fromkeys(range(FEWEST), 1.0), dict.fromkeys(range(FEWEST), 0.0)
    assert paired_difference(arm, other).low == 1.0
    del arm[0]
    found = paired_difference(arm, other)
    assert found.low is None and not found.beyond_noise


def test_differences_around_zero_are_noise():
    arm = {seed: (-1.0) ** seed for seed in range(10)}
    found = paired_difference(arm, dict.fromkeys(arm, 0.0))
    assert found.low < 0 < found.high
    assert not found.beyond_noise


def test_interval_is_that_of_the_normal_distribution_for_many_seeds():
    values = np.random.default_rng(1).normal(0.3, 2.0, 400)
    found = paired_difference(dict(enumerate(values.tolist())), dict.fromkeys(range(400), 0.0))
    half = 1.96 * values.std() / 20
    # 10,000 resamples know a 2.5 % quantile to 0.027 standard errors; four of those.
    close = 4 * 0.027 * half / 1.96
    assert found.low == pytest.approx(values.mean() - half, abs=close)
    assert found.high == pytest.approx(values.mean() + half, abs=close)


def test_interval_of_few_seeds_covers_the_mean_as_often_as_documented():
    draws = np.random.default_rng(2).normal(size=(1000, FEWEST))
    zero = dict.fromkeys(range(FEWEST), 0.0)
    covered = 0
    for seed, values in enumerate(draws.tolist()):
        covered += not paired_difference(dict(enumerate(values)), zero, seed=seed).beyond_noise
    # 92 % of normal differences, as the docstring has it, give or take three standard errors of a
    # thousand; plain percentiles cover 84 %.
    assert covered / 1000 == pytest.approx(0.92, abs=0.025)


def test_report_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(BenchError, match=r"pip install 'heterolora\[bench\]'"):
        command.run(parser.parse_args(["--report", str(tmp_path)]), None)


def rows(text):
    """{first cell: the other cells} of the lines of a table."""
    cells = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_table_marks_what_is_beyond_noise():
    noisy = (0.1, -0.1, 0.2, -0.2, 0.05)
    entries = [entry("uniform", seed, 1.0 + seed, 0.8) for seed in range(5)]
    entries += [entry("grad-norm", seed, 1.25 + seed, 0.8) for seed in range(5)]
    entries += [entry("random", seed, 1.0 + seed + noisy[seed], 0.8) for seed in range(5)]
    text = markdown(entries)
    found = rows(text)
    assert "## sick, the parameters of uniform rank 2" in text
    # In the order of the registry.
    assert [*found][-3:] == ["uniform", "random", "grad-norm"]
    assert found["uniform"][:5] == ["100", "5", "0.001", "3.0000 ± 1.5811", ""]
    assert found["grad-norm"][4] == "**+0.2500 [+0.2500, +0.2500]**"
    assert not found["random"][4].startswith("**") and "[" in found["random"][4]
    assert found["random"][6] == "+0.00 [+0.00, +0.00]"
    assert found["grad-norm"][7] == "1.00"
    assert "1 of 4 comparisons" in text


def test_training_time_is_compared_within_one_command_only():
    entries = [
        entry("uniform", 0, 1.0, training=10.0, date="12:00"),
        entry("uniform", 1, 1.0, training=40.0, date="10:00"),
        entry("uniform", 2, 1.0, training=30.0, date="10:00"),
        # In both: 35 + 5 seconds where uniform took the mean of 30 and 40, and 10.
        entry("random", 0, 1.0, training=35.0, date="10:00"),
        entry("random", 1, 1.0, training=5.0, date="12:00"),
        entry("snip", 1, 1.0, training=8.0, date="12:00"),
        entry("eva", 0, 1.0, training=8.0, date="14:00"),
    ]
    found = rows(markdown(entries))
    times = {arm: found[arm][7] for arm in ("uniform", "random", "snip", "eva")}
    assert times == {"uniform": "1.00", "random": "0.89", "snip": "0.80", "eva": ""}


def test_a_search_while_training_counts_as_search():
    entries = [
        entry("uniform", 0, 1.0, training=20.0),
        entry("dynamic-grad-norm", 0, 1.0, training=10.0, rankings=3,
              train_seconds={"wall": 99.0, "cpu": 17.5}),
        entry("spectral", 0, 1.0, training=10.0, search_seconds=4.0),
    ]  # fmt: skip
    found = rows(markdown(entries))
    assert found["dynamic-grad-norm"][7:] == ["0.50", "7.5"]
    assert found["spectral"][7:] == ["0.50", "4.0"]


def test_table_says_which_parameters_and_which_seeds():
    counts = {"enabled": 100, "ever_trained": 1300, "stored": 100}
    # One that diverged predicts something all the same.
    entries = [entry("uniform", 0, 1.0, 0.8), entry("uniform", 1, None, 0.3)]
    entries += [entry("dynamic-grad-norm", 0, 1.0, parameters=counts)]
    found = rows(markdown(entries))
    assert found["uniform"][1] == "1 of 2"
    assert found["uniform"][5] == "80.00"
    assert found["dynamic-grad-norm"][0] == "100; ever trained 1,300"
    assert found["dynamic-grad-norm"][4] == "+0.0000"


def test_what_has_enough_seeds_is_compared_with_pefts_default_modules():
    entries = [entry("uniform", seed, 1.0 + seed, 0.8) for seed in range(5)]
    entries += [entry("random", seed, 1.1 + seed, 0.8) for seed in range(5)]
    entries += [entry("spectral", seed, 0.5 + seed, 0.9) for seed in range(4)]
    assert "Against" not in markdown(entries)
    entries += [entry("peft-targets", seed, 1.5 + seed, 0.79) for seed in range(5)]
    entries += [entry("all-linear", seed, 1.1 + seed, 0.8) for seed in range(5)]
    own, _, against = markdown(entries).partition("Against PEFT's default modules:")
    assert rows(own)["peft-targets"][4] == "**+0.5000 [+0.5000, +0.5000]**"
    found = rows(against)
    # The all-linear arms train less of the head.
    assert [*found] == ["arm", "---", "uniform", "random"]
    assert found["arm"] == ["loss − peft-targets", "accuracy − peft-targets"]
    assert found["random"] == [
        "**-0.4000 [-0.4000, -0.4000]**",
        "**+1.00 [+1.00, +1.00]**",
    ]


def test_the_command_lines_candidates_are_compared_with_uniform_ranks_over_the_same():
    entries = [entry("uniform", seed, 1.0 + seed, 0.8) for seed in range(5)]
    entries += [entry("all-linear", seed, 1.2 + seed, 0.7) for seed in range(5)]
    entries += [entry("all-linear-search", seed, 1.1 + seed, 0.8) for seed in range(5)]
    entries += [entry("all-linear-pooler", seed, 1.1 + seed, 0.8) for seed in range(4)]
    assert "against the search" not in markdown(entries)
    entries += [entry("all-linear-shuffled", seed, 1.3 + seed, 0.6) for seed in range(5)]
    own, _, against = markdown(entries).partition("With the command line's own candidates:")
    against, _, controls = against.partition("The same, against the search:")
    assert rows(own)["all-linear-search"][4] == "**+0.1000 [+0.1000, +0.1000]**"
    found = rows(against)
    assert [*found] == ["arm", "---", "all-linear-search", "all-linear-shuffled"]
    assert found["arm"] == ["loss − all-linear", "accuracy − all-linear"]
    assert found["all-linear-search"] == [
        "**-0.1000 [-0.1000, -0.1000]**",
        "**+10.00 [+10.00, +10.00]**",
    ]
    found = rows(controls)
    assert [*found] == ["arm", "---", "all-linear-shuffled"]
    assert found["arm"] == ["loss − all-linear-search", "accuracy − all-linear-search"]
    assert found["all-linear-shuffled"][0] == "**+0.2000 [+0.2000, +0.2000]**"


def test_table_refuses_two_results_for_one_seed():
    with pytest.raises(BenchError, match=r"uniform on sick at rank 2 has two results for seed 0"):
        markdown([entry("uniform", 0, 1.0), entry("uniform", 0, 2.0)])
    with pytest.raises(BenchError, match="no result"):
        markdown([])


def test_a_page_keeps_its_text_around_the_table():
    page = f"# Page\n\n{BEGIN}\nold\n{END}\nend\n"
    assert updated(page, "| new |\n") == f"# Page\n\n{BEGIN}\n\n| new |\n\n{END}\nend\n"
    assert updated("", "| new |\n") == "| new |\n"


def test_pictures_of_differences_and_ranks(tmp_path):
    names = [
        f"encoder.layer.{i}.attention.self.{part}" for i in range(3) for part in ("key", "query")
    ]
    ranks = {arm: {name: k + i for i, name in enumerate(names)} for k, arm in enumerate(ARMS)}
    entries = [
        entry(arm, seed, 1.0 + 0.1 * k * (-1) ** seed, 0.8, ranks=ranks[arm])
        for seed in range(5)
        for k, arm in enumerate(["uniform", "grad-norm", "spectral"])
    ]
    found = write_pngs(entries, tmp_path / "pictures")
    names = ("rank2-differences", "rank2-ranks", "costs")
    assert [path.name for path in found] == [f"sick-{name}.png" for name in names]
    (figure,) = [_differences("sick", arms) for arms in grouped(entries).values()]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["grad-norm", "spectral"]
    # A mean of -0.02 between the ends of its interval.
    line = figure.axes[0].lines[1]
    assert list(line.get_xdata()) == pytest.approx([0.02])
    texts = [text.get_text() for text in _ranks(grouped(entries)["sick", 2]).axes[0].texts]
    assert sorted(map(float, texts)) == sorted(map(float, ranks["uniform"].values()))
    costs = _costs("sick", {2: grouped(entries)["sick", 2]})
    _, labels = costs.axes[0].get_legend_handles_labels()
    assert labels == ["uniform", "grad-norm", "spectral"]
    for panel, x in zip(costs.axes, (100.0, 1.0), strict=True):
        drawn = [line.get_xydata().tolist() for line in panel.lines if line.get_marker() == "o"]
        assert drawn == [[[x, pytest.approx(80.0)]]] * 3
    with pytest.raises(BenchError, match="cannot be written"):
        write_pngs(entries, tmp_path / "pictures" / found[0].name / "below")


def test_rank_correlation_of_known_values():
    rising = [float(k) for k in range(20)]
    assert rank_correlation(rising, [x**3 for x in rising]).value == pytest.approx(1.0)
    found = rank_correlation(rising, [-x for x in rising])
    assert (found.value, found.low, found.high, found.count) == pytest.approx((-1, -1, -1, 20))
    # With a tie: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4; the sums of squares are 4.5 and 5.
    found = rank_correlation([1, 2, 2, 9], [0, 5, 3, 7])
    assert found.value == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1, 1], [1, 2, 3]).value == 0.0
    independent = np.random.default_rng(0).random((2, 30))
    found = rank_correlation(*independent.tolist())
    assert found.low < 0 < found.high
    with pytest.raises(ValueError, match="2 pairs"):
        rank_correlation([1, 2], [1, 2])


def test_scores_are_compared_with_what_modules_are_worth(tmp_path):
    entries = []
    for k, part in enumerate(PARTS):
        for seed in (0, 1):
            # Worth more from module to module, and seeds that differ by more than modules do.
            entries.append(entry(f"alone-{part}", seed, 1.0 - 0.01 * k + seed))
            entries.append(entry(f"without-{part}", seed, 0.5 + 0.01 * k + seed))
    names = [f"bert.encoder.layer.{i}.{kind}" for i in range(6) for kind in KINDS.values()]
    assert [part_of(name) for name in names] == list(PARTS)
    good = {name: float(k) for k, name in enumerate(names)}
    entries.append(entry("spectral", 0, 1.0, scores={**good, "bert.pooler.dense": 99.0}))
    entries.append(
        entry("grad-norm", 0, 1.0, scores={name: -score for name, score in good.items()})
    )
    found = {(p.task, p.arm, p.way): p.correlation.value for p in predictions(entries)}
    assert found == pytest.approx(
        {
            ("sick", "spectral", "alone"): 1.0,
            ("sick", "spectral", "without"): 1.0,
            ("sick", "grad-norm", "alone"): -1.0,
            ("sick", "grad-norm", "without"): -1.0,
        }
    )
    # The worst alone, and the one that is missed least, are worth nothing.
    for way in ("alone", "without"):
        expected = {part: 0.01 * k for k, part in enumerate(PARTS)}
        assert gains(entries)["sick", way] == pytest.approx(expected)
    text = ablation_table(entries)
    assert "| sick | spectral | +1.00 [+1.00, +1.00] | +1.00 [+1.00, +1.00] | 36 |" in text
    assert text.count("| 1 | 60 | 70 | 80 | 90 | 100 | 110 |") == 2
    assert ablation_table(entries[-2:]) == ""
    written = write_predictions(predictions(entries), tmp_path)
    assert [path.name for path in written] == ["sick-scores-alone.png", "sick-scores-without.png"]


def test_only_seeds_that_all_parts_have_and_one_budget_say_what_modules_are_worth():
    whole = [entry(f"alone-{part}", 0, 1.0 - 0.01 * k) for k, part in enumerate(PARTS)]
    cut_off = entry(f"alone-{PARTS[0]}", 1, 9.0)
    assert gains([*whole, cut_off]) == gains(whole)
    with pytest.raises(BenchError, match="no seed has all parts of sick with it alone"):
        gains([whole[0], entry(f"alone-{PARTS[1]}", 1, 1.0)])
    other = entry(f"alone-{PARTS[0]}", 1, 1.0)
    other["run"]["rank"] = 4
    with pytest.raises(BenchError, match="ablations of sick at ranks 2 and 4"):
        gains([*whole, other])


def test_the_page_is_made_of_the_results_beside_the_code():
    root = Path(evidence.__file__).resolve().parents[2]
    page = (root / "docs" / "evidence.md").read_text(encoding="utf-8")
    results = root / "bench" / "evidence" / "results"
    # As in the page's own command: the folder of arms first.
    names = sorted((folder.name for folder in results.iterdir()), reverse=True)
    folders = [list(Store(results / name).tests()) for name in names]
    assert updated(page, tables(folders)) == page
