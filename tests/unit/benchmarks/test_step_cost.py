"""What the step-cost study makes of its times, by hand; the clock itself is not tested."""

import csv

from benchmarks.results import COLUMNS
from benchmarks.sparsity import step_cost
from tests.unit.distill.toy import SETTINGS, masks_of, tiny_dit

DENSE = [(1.0, 0.0), (2.0, 0.0), (4.0, 0.0)]


def test_ratios_are_of_the_same_round_and_leave_the_masks_out():
    found = step_cost.numbers([(1.5, 0.25), (3.5, 0.5), (8.0, 1.0)], DENSE)
    assert found["step_ratio"] == 1.5                            # of 1.25, 1.5 and 1.75
    assert (found["step_ratio_q25"], found["step_ratio_q75"]) == (1.25, 1.75)
    assert found["step_ratio_with_masks"] == 1.75                # of 1.5, 1.75 and 2
    assert (found["step_ms"], found["step_masks_ms"]) == (3500, 500)
    assert step_cost.numbers(DENSE, DENSE)["step_ratio"] == 1


def test_every_variant_is_timed_as_often_and_dense_has_no_teacher():
    times = step_cost.measure(tiny_dit(), SETTINGS, repeats=2, warm=1)
    assert set(times) == set(step_cost.VARIANTS) and {len(rounds) for rounds in times.values()} == {2}
    dense = step_cost.transfers(tiny_dit(), SETTINGS)["dense"]
    assert dense.given == {} and dense.settings.lam == dense.settings.features == 0


def test_masks_cover_what_the_pipeline_covers_and_more():
    teacher = tiny_dit()
    assert step_cost.two_four(teacher).keys() > masks_of(teacher, "2:4").keys()


def test_rows_of_other_metrics_and_teachers_stay(tmp_path):
    results = tmp_path / "results.csv"

    def row(teacher, metric, value):
        return dict(zip(COLUMNS, (teacher, "v", 0, metric, value, "p"), strict=True))

    step_cost.write([row("a", "fid_1k", 5), row("a", "step_ms", 1), row("b", "step_ms", 3)], results)
    step_cost.write([row("a", "step_ms", 2)], results)
    rows = list(csv.DictReader(results.read_text().splitlines()))
    assert [(row["teacher"], row["metric"], row["value"]) for row in rows] == [
        ("a", "fid_1k", "5"), ("b", "step_ms", "3"), ("a", "step_ms", "2")]


def test_it_reads_the_pipelines_own_settings():
    params = step_cost.stage_params(step_cost.stage, step_cost.read_params(scale="full"))
    settings = step_cost.stage.training_settings(params, tiny_dit())
    assert settings.batch == 64 and settings.bf16
    assert "batch 64; bf16 autocast" in step_cost.protocol(settings, 3)
