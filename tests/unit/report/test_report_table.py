"""One definition of the table, several renderings; every derived number redone by hand."""

from pathlib import Path

import pytest

from tasks.core.artifacts import write_json
from tasks.report.results import fid_key, read_rows, settings, speeds
from tasks.report.table import (
    BEGIN,
    BLOCK,
    END,
    all_columns,
    caption,
    cells,
    compact_columns,
    decimals,
    long_form,
    main,
    markdown,
    readme_block,
    significant,
    terminal,
    with_tables,
)
from tests.unit.report.example import benchmark_reports, fid_report

REPOSITORY = Path(__file__).parents[3]
SETTING = ("openvino", 32)


@pytest.fixture
def rows():
    return read_rows(fid_report(), *benchmark_reports())


def by_metric(rows, metric):
    return next(column for column in all_columns(rows, SETTING) if column.metric == metric)


@pytest.mark.parametrize("value, text", [(0.00123, "0.00123"), (12.34, "12.3"), (1234.5, "1234"), (0, "0.00"), (0.5, "0.500"),
                                         (-8.126, "-8.13")])
def test_three_digits_without_exponent(value, text):
    assert significant(value) == text


def test_a_column_has_the_decimals_of_its_median():
    assert decimals([0.01, 5.4, 123.0]) == 2
    assert decimals([]) == 2


def test_speedups_name_their_baseline(rows):
    eager, same = (by_metric(rows, f"openvino.b32.speedup_over_{base}") for base in ("eager", "openvino"))
    assert eager.value(rows["compressed"]) == 840 / (60 / 3)
    assert same.value(rows["compressed"]) == 840 / 60
    assert same.value(rows["dense"]) == 1


def test_settings_begin_with_the_shipping_backend(rows):
    assert settings(rows) == [("openvino", 1), ("openvino", 32), ("eager", 1), ("eager", 32)]


def test_memory_beside_the_batches_is_no_speed():
    assert speeds({"eager": {"b8": {"images_per_s": 2.0}, "peak_memory_bytes": 5}}) == {("eager", 8): {"images_per_s": 2.0}}


def test_the_fid_keeps_the_name_of_its_sample_count(rows):
    assert fid_key(rows) == "fid_1k"
    assert "fid_1k" in cells(rows, all_columns(rows, SETTING))[0]


def test_dense_is_needed():
    with pytest.raises(ValueError, match="no variant 'dense'"):
        read_rows({"compressed": {"fid_1k": 1.0}}, {}, {})


def test_a_number_that_nobody_took_is_a_dash_and_no_line_in_the_csv(rows):
    bound = by_metric(rows, "loss_upper95")
    assert cells({"dense": rows["dense"]}, [bound])[1] == ["dense", "–"]
    assert [variant for variant, _, _ in long_form(rows, [bound])] == [name for name in rows if name != "dense"]


def test_the_goals_own_setting_is_the_first_speed(rows):
    groups = list(dict.fromkeys(column.group for column in all_columns(rows, SETTING)))
    assert groups[:3] == ["quality", "openvino, batch 32", "openvino, batch 1"] and groups[-1] == "more on quality"


def test_a_column_without_any_number_is_left_out(rows):
    assert "class_accuracy" in {column.metric for column in all_columns(rows, SETTING)}
    for row in rows.values():
        del row.quality["class_accuracy"]
    assert "class_accuracy" not in {column.metric for column in all_columns(rows, SETTING)}


def test_markdown_and_terminal_show_the_same_cells(rows):
    columns = compact_columns(rows, SETTING)
    lines, shown_lines = markdown(rows, columns).splitlines()[2:], terminal(rows, columns).splitlines()[-len(rows):]
    for line, shown in zip(lines, shown_lines, strict=True):
        assert line.replace("|", " ").replace("`", "").split() == shown.split()


def test_the_terminal_table_is_aligned_and_fits_100_columns(rows):
    lines = terminal(rows, compact_columns(rows, SETTING)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len({len(line) for line in lines[-len(rows) - 1:]}) == 1


def test_the_caption_names_machine_and_protocol(rows):
    said = caption(rows, SETTING, benchmark_reports()[1], {"sampling": "DDIM (eta 0), spacing leading, x0 not clipped"})
    assert "Example CPU" in said and "2 threads" in said and "openvino, batch 32" in said and "other work" not in said
    assert said.endswith("change. dense is DDIM (eta 0), spacing leading, x0 not clipped.")


@pytest.mark.parametrize("cpus, words", [(0.1, "rounds. “"), (0.84, "rounds, while other work kept 0.8 of 2 CPUs busy. “")])
def test_the_caption_says_when_the_machine_had_other_work(rows, cpus, words):
    timings = benchmark_reports()[1] | {"load": {"foreign_cpus": cpus, "cpus": 2}}
    assert words in caption(rows, SETTING, timings, {})


@pytest.fixture
def reports(tmp_path):
    """-> a folder that holds `some/reports` and `other`, timed on different backends."""
    costs, timings = benchmark_reports()
    for folder, backend in (("some/reports", "eager"), ("other", "openvino")):
        (tmp_path / folder).mkdir(parents=True)
        for name, report in {"fid": fid_report(), "benchmark": costs, "benchmark.timings": timings,
                             "report": {"backend": backend, "batch": 1, "met": True}, "pretrain_load": {}}.items():
            write_json(tmp_path / folder / f"{name}.json", report)
    return tmp_path


def test_each_table_is_of_the_reports_that_its_marker_names_and_nothing_else_changes(reports):
    first, second = (BEGIN.format(name) for name in ("some/reports", "other"))
    text = with_tables(f"a\n{first}\nold\n{END}\nb\n{second}\n{END}\nc\n", reports)
    assert text == (f"a\n{first}\n{readme_block(reports / 'some/reports')}{END}\nb\n"
                    f"{second}\n{readme_block(reports / 'other')}{END}\nc\n")
    assert text.index("eager, batch 1") < text.index("openvino, batch 1")
    with pytest.raises(ValueError, match="README.md: no line"):
        with_tables(f"{first}\n", reports)


def test_the_command_writes_into_the_readme(reports, monkeypatch):
    monkeypatch.chdir(reports)
    (reports / "README.md").write_text(f"# x\n{BEGIN.format('other')}\n{END}\n")
    main()
    assert "| `compressed` |" in (reports / "README.md").read_text()


def test_the_readme_holds_what_was_published():
    """Of reports/quick and reports/full, which no run writes to."""
    text = (REPOSITORY / "README.md").read_text()
    assert sorted(found["reports"] for found in BLOCK.finditer(text)) == ["reports/full", "reports/quick"]
    assert with_tables(text, REPOSITORY) == text, "run: python -m tasks.report.table"
