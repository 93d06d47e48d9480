"""The report page: what it says, that it fetches nothing, and that hostile text stays text."""

import copy
import re
from html.parser import HTMLParser

import pytest

from heterolora.errors import HeteroLoraError
from heterolora.report import page
from heterolora.report.figures import curves_figure, rank_map_figure, scores_figure
from heterolora.report.page import check_installed, write_html

_KINDS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def names(layers: int = 6) -> list[str]:
    return [f"bert.encoder.layer.{n}.{kind}" for n in range(layers) for kind in _KINDS]


def run(seed: int, accuracy: float) -> dict:
    history: list[dict] = [
        {"step": s, "loss": accuracy - 0.1 - s / 1000 + (s % 7) / 50} for s in range(0, 300, 5)
    ]
    history += [
        {"step": s, "eval_accuracy": accuracy - 0.2 + s / 2000, "eval_loss": 0.6 - s / 2000}
        for s in (100, 200, 300)
    ]
    return {
        "seed": seed,
        "test_accuracy": accuracy,
        "test_loss": 0.41 + seed / 100,
        "seconds_per_step": 0.25,
        "history": history,
    }


def results() -> dict:
    cycle = (0, 32, 2, 8, 4, 2, 16)
    searched = {name: cycle[index % 7] for index, name in enumerate(names())}
    return {
        "title": "Searched against uniform LoRA",
        "summary": [
            "At the same budget the searched adapter is right 0.6 points more often; inside noise.",
            "A training step takes 0.76 of PEFT's time.",
        ],
        "command": "heterolora demo --budget 8",
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "model": "minilm",
        "dataset": {
            "name": "film reviews",
            "train": 2400,
            "validation": 300,
            "test": 1300,
            "source": "a package",
            "licence": "MIT",
        },
        "arms": [
            {
                "name": "uniform",
                "parameters": 331_776,
                "ranks": dict.fromkeys(names(), 8),
                "runs": [run(0, 0.8123), run(1, 0.8077)],
            },
            {
                "name": "searched",
                "parameters": 331_700,
                "ranks": searched,
                "runs": [run(0, 0.8200), run(1, 0.8120)],
            },
        ],
        "scores": {name: 10.0 / (1 + index) for index, name in enumerate(names())},
        "proxy": "grad-norm",
        "search_seconds": 2.5,
        "step_seconds": 0.25,
        "comparison": {
            "accuracy_difference": 0.6,
            "standard_error": 1.1,
            "inside_noise": True,
            "sentence": "The difference is smaller than its standard error.",
        },
        "speed": {
            "rows": [
                {
                    "variant": "PEFT",
                    "milliseconds": 597.0,
                    "ratio": 1.0,
                    "ratio_low": 1.0,
                    "ratio_high": 1.0,
                    "peak_megabytes": 214.0,
                },
                {
                    "variant": "fused",
                    "milliseconds": 453.7,
                    "ratio": 0.76,
                    "ratio_low": 0.74,
                    "ratio_high": 0.79,
                    "peak_megabytes": 207.7,
                },
            ],
            "note": "CPU time of one thread.",
        },
    }


class Page(HTMLParser):
    """Tags, attributes and text by tag; complains when tags do not nest."""

    VOID = frozenset({"meta", "br", "hr", "img", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if data.strip() and "style" not in self.open:
            self.words.append(data.strip())


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_html(results(), path)
    return path.read_text(encoding="utf-8")


def test_tables_say_what_was_measured(written):
    rows = Page(written).rows
    assert ["uniform", "331,776", "81.00 %", "81.23 (0), 80.77 (1)", "0.4150", "250"] in rows
    assert ["searched", "331,700", "81.60 %", "82.00 (0), 81.20 (1)", "0.4150", "250"] in rows
    assert ["fused", "453.7", "0.76", "0.74 to 0.79", "207.7"] in rows


def test_summary_comes_first_and_the_rest_is_there(written):
    words = Page(written).words
    first = words.index("Searched against uniform LoRA", 1)
    assert words[first + 1 : first + 3] == results()["summary"]
    text = " ".join(words)
    for part in (
        "heterolora demo --budget 8",
        "film reviews (2,400 train, 300 validation, 1,300 test)",
        "MIT",
        "2.13.0",
        "the time of 10.0 training steps",
        "The 24 highest of 36.",
    ):
        assert part in text, part


def test_only_mixed_arms_get_a_rank_map(written):
    attributes = Page(written).attributes
    labels = [value for key, value in attributes if key == "aria-label"]
    assert labels == [
        "Rank of each module, searched",
        "Score of each module",
        "Loss and accuracy by step",
    ]


def test_nothing_is_fetched(written):
    page = Page(written)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "://" not in written and "@import" not in written
    for key, value in page.attributes:
        if key in ("href", "xlink:href", "src"):
            assert value.startswith("#"), (key, value)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", written))


def test_ids_are_unique_across_pictures(written):
    ids = [value for key, value in Page(written).attributes if key == "id"]
    targets = {t for t in re.findall(r'(?:url\(|href=")#([^)"]+)', written)}
    clashing = {name for name in ids if ids.count(name) > 1}
    assert not clashing & targets
    assert targets <= set(ids)


def test_the_same_results_give_the_same_page(written, tmp_path):
    write_html(results(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written


def test_hostile_text_is_escaped_everywhere(tmp_path):
    bad = '<script>alert("x")</script>&'

    def poison(value):
        if isinstance(value, str):
            return value + bad
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            keep = ("ranks", "scores", "versions")
            return {k: poison(v) if k not in keep else _keys(v) for k, v in value.items()}
        return value

    def _keys(mapping):
        return {key + bad: poison(value) for key, value in mapping.items()}

    write_html(poison(copy.deepcopy(results())), tmp_path / "bad.html")
    text = (tmp_path / "bad.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "script" not in Page(text).tags
    assert text.count("&lt;script&gt;") > 20


def test_an_empty_speed_table_and_no_scores_are_said_plainly(tmp_path):
    plain = results()
    plain["speed"] = {"rows": [], "note": "Skipped."}
    plain["scores"] = {}
    plain["arms"] = plain["arms"][:1]
    write_html(plain, tmp_path / "plain.html")
    text = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "Not measured." in text
    assert "Every adapted module has the same rank in every arm." in text


def test_missing_section_is_named(tmp_path):
    incomplete = results()
    del incomplete["comparison"]
    with pytest.raises(KeyError, match="comparison"):
        write_html(incomplete, tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_before_any_work(package, monkeypatch):
    check_installed()
    real = page.find_spec
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(HeteroLoraError, match=f"with {package}, .*: pip install {package}"):
        check_installed()


def cells(figure) -> dict[tuple[str, str], str]:
    (axes,) = figure.axes
    columns = [label.get_text() for label in axes.get_xticklabels()]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    return {
        (rows[round(text.get_position()[1])], columns[round(text.get_position()[0])]): (
            text.get_text()
        )
        for text in axes.texts
    }


def test_rank_map_places_each_rank_by_kind_and_layer():
    shown = cells(
        rank_map_figure(
            {
                "model.layers.10.self_attn.q_proj": 32,
                "model.layers.2.self_attn.q_proj": 0,
                "model.layers.2.mlp.up_proj": 4,
                "pooler.dense": 8,
            }
        )
    )
    assert shown == {
        ("self_attn.q_proj", "10"): "32",
        ("self_attn.q_proj", "2"): "0",
        ("mlp.up_proj", "2"): "4",
        ("pooler.dense", "none"): "8",
    }
    (axes,) = rank_map_figure({"a.10.q": 1, "a.9.q": 2}).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["9", "10"]


def test_rank_map_keeps_two_stacks_apart():
    ranks = {"encoder.block.0.q": 1, "decoder.block.0.q": 2}
    assert cells(rank_map_figure(ranks)) == {
        ("encoder.block.q", "0"): "1",
        ("decoder.block.q", "0"): "2",
    }


def test_rank_map_of_no_ranks_at_all_and_of_numbers_only():
    assert rank_map_figure({"0": 4, "1": 0}).axes
    assert len(cells(rank_map_figure({"lin": 0}))) == 1


def test_scores_are_the_highest_in_order():
    (axes,) = scores_figure({f"m{n}": float(n) for n in range(40)}).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == [float(n) for n in range(39, 15, -1)]
    (axes,) = scores_figure({"h.0.fc": 1.0, "h.1.fc": 2.0, "pooler": 3.0}).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["pooler", "layer 1 fc", "layer 0 fc"]


def test_curves_have_one_line_a_run_and_one_legend_entry_an_arm():
    figure = curves_figure(results()["arms"])
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 4]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "uniform",
        "searched",
    ]
    line = figure.axes[2].lines[0]
    assert line.get_xdata().tolist() == [100, 200, 300]
    assert line.get_ydata().tolist() == pytest.approx([0.6623, 0.7123, 0.7623])


def test_pyplot_is_not_touched(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_report as t, pathlib\n"
        "assert 'matplotlib' not in sys.modules\n"
        "t.write_html(t.results(), pathlib.Path(sys.argv[2]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    here = str(__import__("pathlib").Path(__file__).parent)
    target = str(tmp_path / "r.html")
    done = subprocess.run(
        [sys.executable, "-c", code, here, target], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
