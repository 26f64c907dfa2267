"""The stage on a whole tree of artifacts: one page that asks nobody, one text for the terminal, one table for machines."""

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tasks.core.artifacts import read_json, write_json
from tasks.core.params import STAGES
from tasks.evolve.table import read_evaluations
from tasks.report import stage
from tasks.report.sections import cache, plans_text, said_of_choice, scales_of, searched
from tests.unit.report.example import PARAMS, search_report, write_tree

VOID = {"meta", "br", "img", "link", "input", "path", "use", "rect"}


class Balanced(HTMLParser):
    """Collects visible text; fails on a tag that closes nothing."""

    def __init__(self):
        super().__init__()
        self.open, self.words, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


def report(tree, folder, **changes):
    out = folder / "out"
    out.mkdir()
    return stage.run(replace(PARAMS, **changes), tree, out), out


def parsed(out):
    page = Balanced()
    page.feed((out / "report.html").read_text())
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The stage's folder, from the example as it is."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return report(write_tree(folder), folder)[1]


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The stage's inputs below the working directory, for a test to change; plots are not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "all_plots", lambda *_: [])
    return write_tree(tmp_path)


def test_it_reads_every_stage_before_it():
    assert (*stage.INPUTS, "report") == STAGES


def test_the_page_is_whole_small_and_asks_nobody(out):
    assert {p.name for p in out.iterdir()} == {"picture.png", "report.html", "results.csv", "summary.txt"}
    text = (out / "report.html").read_text()
    assert len(text) < 3e6
    assert all(link.startswith(("data:image/png", "#")) for link in parsed(out).links)
    assert "git checkout 89abcdef" in text, "of the stage that ran last"
    assert "<script" not in text and "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_the_page_has_its_parts_in_order(out):
    text = (out / "report.html").read_text()
    parts = ("Goal met", "Results", "The same seeds", "Quality against speed", "The search", "What the front is made of",
             "Layer cache", "Density and bits", "Training", "Where the time went", "Protocol and machine", "How to reproduce")
    found = [text.index(f"<h2>{part}" if i else part) for i, part in enumerate(parts)]
    assert found == sorted(found)


def test_the_first_line_says_when_dull_best_is_not_beaten(tree, tmp_path):
    fid = read_json("reports/fid.json")
    fid["compressed"]["loss_to_dull_best_upper95"] = 0.2
    write_json("reports/fid.json", fid)
    found, out = report(tree, tmp_path)
    assert found.numbers["beats_dull_best"] is False and found.numbers["met"] is True
    assert (out / "summary.txt").read_text().startswith("compressed is not shown to beat dull_best: 1.38×")
    html = (out / "report.html").read_text()
    assert html.index("Not shown to beat few steps") < html.index("goal met")


def test_a_teacher_that_is_not_worth_compressing_is_said_before_all_else(tree, tmp_path):
    teacher = read_json("reports/pretrain_load.json")
    write_json("reports/pretrain_load.json", teacher | {"fid_1k": 53.0, "fid_1k_real": 0.33})
    found, out = report(tree, tmp_path)
    assert found.numbers["worth_compressing"] is False and found.numbers["met"] is True
    first = "The teacher is not worth compressing: its fid_1k is 53, where as many real images score 0.33"
    assert (out / "summary.txt").read_text().startswith(first)
    html = (out / "report.html").read_text()
    assert "<h1>The teacher is not worth compressing; goal met" in html
    assert html.index(first) < html.index("Goal met by compressed")


def test_a_teacher_without_a_doubt_is_not_mentioned(out):
    assert "worth compressing" not in (out / "report.html").read_text() + (out / "summary.txt").read_text()


def test_what_comes_from_files_is_escaped(tree, tmp_path):
    timings = read_json("reports/benchmark.timings.json")
    timings["machine"]["cpu"] = "<script>alert(1)</script>"
    write_json("reports/benchmark.timings.json", timings)
    _, out = report(tree, tmp_path)
    assert "<script" not in (out / "report.html").read_text()
    assert any("<script>" in word for word in parsed(out).words)


def test_the_summary_fits_a_terminal_and_names_the_page(out):
    text = (out / "summary.txt").read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "artifacts/report/report.html" in text and "compressed" in text


def test_results_are_one_number_a_line_with_its_protocol(out):
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["variant"], row["metric"]): row for row in rows}
    assert len(found) == len(rows)
    assert float(found["compressed", "fid_1k"]["value"]) == 5.5
    assert "seed: 1" in found["compressed", "fid_1k"]["protocol"]
    assert found["compressed", "openvino.b32.images_per_s"]["protocol"] == "Example CPU, 2 threads"


def test_artifacts_from_a_cache_have_no_times(tree, tmp_path):
    for path in tmp_path.glob("runs/*.json"):
        path.unlink()
    _, out = report(tree, tmp_path)
    text = (out / "report.html").read_text()
    assert "No stage has run here" in text and "git checkout" not in text


def test_without_a_cache_in_compressed_the_plan_of_the_variant_is_shown(tree):
    path = tree["package"] / "compressed" / "recipe.json"
    write_json(path, read_json(path) | {"cache": None})
    assert "The search chose no cache for compressed" in cache(tree["package"]).text


def test_the_search_is_shown_with_what_its_front_is_made_of(tree):
    fronts, axes = searched(tree["evolve"], "latency")
    assert "time, share of dense's" in fronts.svg and "hypervolume" in fronts.svg
    assert [key["name"] for key in axes.keys] == ["compressed", "front", "the others"]
    assert all(name in axes.svg for name in ("steps", "int8 layers", "cache removed", "distance"))
    assert axes.svg.count("var(--orange)") == 1, "the one that ships"


def test_the_page_says_what_was_chosen_and_whether_the_dull_front_has_it(tree):
    report = search_report()
    ours, dull = ("15 steps of ddim, weights student_unit, cost 0.300, distance 1.50",
                  "14 steps of dpm2m, weights teacher, cost 0.300, distance 1.25")
    held = "a distance of 0.550 for certain (proxy: paired, 95 % bound)"
    assert said_of_choice(report) == (
        f"No candidate within the bound on cost holds {held}, so compressed is the nearest: {ours}. By the proxy a point of "
        f"the dull front is as near at no more cost: {dull}.")
    best = report["best"]
    report["choice"] |= {"rule": "cheapest", "cheapest": best, "nearest": best | {"distance": 0.25}}
    report["dull"]["ahead"] = True
    assert said_of_choice(report) == (
        f"Of those that hold {held} compressed is the cheapest: {ours}. The nearest: {ours.replace('1.50', '0.250')}. By the "
        "proxy nothing on the dull front is as near at no more cost.")
    assert "so compressed is the nearest" in searched(tree["evolve"], "latency")[0].text


def test_precision_is_bits_where_bits_are_searched(tree):
    table = read_evaluations(tree["evolve"] / "evaluations.jsonl")
    assert [scale.name for scale in scales_of(table, "bitops")] == [
        "steps", "mean W bits", "mean A bits", "cache removed", "BitOPs, share of dense's", "distance"]


def test_a_search_that_left_no_log_has_no_section(tree):
    (tree["evolve"] / "evaluations.jsonl").unlink()
    assert searched(tree["evolve"], "latency") == []


def test_the_plans_of_the_mask_search_stand_beside_each_other():
    choice = {"budget": {"counted": "MACs"}, "plans": {
        "unit": {"cost": 0.7, "error": {"measured": 0.05}}, "unit_uniform": {"cost": 0.69, "error": {"measured": 0.25}}}}
    assert plans_text(choice) == (
        "One-shot error of plans that save the same (MACs): units block by block 0.050 at 0.70 of the cost; "
        "one density of units for all blocks 0.250 at 0.69 of the cost.")


def test_a_batch_that_was_not_timed_is_named(tree, tmp_path):
    with pytest.raises(ValueError, match="report.batch: openvino 8 was not timed; benchmark timed openvino 1, openvino 32"):
        report(tree, tmp_path, batch=8)
