"""The page of the bench: complete by itself, well-formed, and honest about what is missing."""

import re
from html.parser import HTMLParser

import pytest
from bench_runs import full_run, red

from heterolora.bench.harness.record import BenchRun
from heterolora.bench.harness.timing import BenchError
from heterolora.bench.report.page import write_page
from heterolora.bench.report.plots import PLOTS

VOID = {"meta", "input", "br", "link", "img"}


class Reader(HTMLParser):
    """Checks that tags nest, and keeps the text and attributes that a reader meets."""

    def __init__(self, page):
        super().__init__()
        self.open, self.words, self.attributes = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_startendtag(self, tag, attributes):
        self.attributes += [(tag, *pair) for pair in attributes]

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def page_of(tmp_path, *runs):
    write_page(runs, tmp_path / "deeper" / "bench.html")
    return (tmp_path / "deeper" / "bench.html").read_text(encoding="utf-8")


def test_nothing_is_fetched(tmp_path):
    page = page_of(tmp_path, full_run())
    read = Reader(page)
    assert not {name for _, name, _ in read.attributes} & {"src", "srcset", "action"}
    links = [value for _, name, value in read.attributes if name in ("href", "xlink:href")]
    assert links and all(link.startswith("#") for link in links)
    assert "<script" not in page and "@import" not in page
    assert all(found.startswith("url(#") for found in re.findall(r"url\([^)]*", page))
    ids = [value for _, name, value in read.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "two pictures share an id"
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert {found.removeprefix("url(#") for found in re.findall(r"url\([^)]*", page)} <= set(ids)


def test_headline_notes_plots_and_numbers(tmp_path):
    page = page_of(tmp_path, full_run())
    text = Reader(page).text
    assert page.index("best") < page.index("How to read it") < page.index("All numbers")
    assert page.count("<svg ") == len(PLOTS)
    assert "5 rounds a case, process CPU time" in text
    assert "Noise: in float32 peft-lowp computes what PEFT computes" in text
    assert "64 of 65 cases green" in text
    assert "relative difference to PEFT, limit 1e-05" in text
    assert "ceilings, bf16 10.0 GB/s, 400 GFLOP/s" in text
    assert "triton skipped: Triton's kernels need a GPU (all cases)" in text


def test_a_red_case_has_its_reason_and_no_number(tmp_path):
    page = page_of(tmp_path, full_run())
    rows = re.findall(r"<tr.*?</tr>", page)
    (row,) = (row for row in rows if "llama-1b-8x1024-bf16-mixed" in row)
    cells = re.findall(r"<td>(.*?)</td>", row)
    assert cells[1:4] == ["RED: not fused: 2 of 2", "", ""]
    assert "llama-1b-8x1024-bf16-mixed: red, not timed. not fused: 2 of 2" in page


def test_everything_from_a_file_is_escaped(tmp_path):
    run = full_run(device="<b>CPU</b>")
    run.environment["command"] = "heterolora bench --case '<i>'"
    run.environment["versions"]["torch"] = "<u>2</u>"
    run.results.append(red("<s>-bf16-mixed", reason="a < b & c"))
    page = page_of(tmp_path, run)
    assert not re.search(r"<(b|i|u|s|no)>", page)
    text = Reader(page).text
    assert "unsloth failed: RuntimeError: <no> compiler & no luck" in text
    assert "<b>CPU</b>" in text and "a < b & c" in text and "torch <u>2</u>" in text


def test_a_gpu_has_its_place_before_it_is_measured(tmp_path):
    assert "GPU Not measured yet." in Reader(page_of(tmp_path, full_run())).text
    gpu = full_run(device="H100", device_type="cuda")
    page = page_of(tmp_path, gpu, full_run())
    assert "Not measured yet" not in page
    switches = re.findall(r'<input [^>]*id="(switch-\d)"( checked)?><label for="\1">(.*?)<', page)
    assert [(checked, name) for _, checked, name in switches] == [
        (" checked", "Made-up CPU"),
        ("", "H100"),
    ]
    for number in range(2):
        assert f"#switch-{number}:checked ~ #part-{number} {{ display: block; }}" in page


def test_a_missing_plot_says_so(tmp_path):
    run = full_run()
    text = Reader(page_of(tmp_path, BenchRun(run.environment, [red()]))).text
    assert "No case was timed." in text
    for plot in PLOTS.values():
        assert f"{plot.title} Not measured: {plot.missing}." in text


def test_an_incomplete_environment_is_one_error(tmp_path):
    run = full_run()
    del run.environment["versions"]
    with pytest.raises(BenchError, match=r"environment\.versions: missing"):
        page_of(tmp_path, run)
