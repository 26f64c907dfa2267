"""What the study asks for and how its rows are pooled; its training is that of tasks/distill."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.sparsity import __main__ as study
from benchmarks.sparsity import compare
from benchmarks.sparsity import queue as queues
from benchmarks.sparsity.arms import BASELINES, EQUAL_STEPS, FRONTIER, MAO, OURS, key
from benchmarks.sparsity.lab import Bootstrap
from tasks.core.artifacts import write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.quality import Gaussian
from tasks.fid.measure import Judge


def test_every_arm_is_asked_for_once_and_the_finalists_with_three_seeds():
    tasks = list(queues.everything())
    asked = [(task.teacher, task.variant, task.seed) for task in tasks]
    assert len(set(asked)) == len(asked)
    for teacher in queues.TEACHERS:
        mine = [task for task in tasks if task.teacher == teacher]
        assert {task.arm.name for task in mine if task.part == "baselines"} >= {arm.name for arm in BASELINES}
        for name in ("ours", "dense", "unit_uniform", *(["unit_exact"] if teacher == "mnist_unet" else [])):
            assert sorted(task.seed for task in mine if task.variant == f"long.{name}") == [0, 1, 2]
    assert {task.arm.name for task in tasks if task.part == "mao"} == {arm.name for arm in (*MAO, *FRONTIER)}


def test_what_two_cores_do_has_one_training_seed():
    asked = [(task.teacher, task.variant) for task in queues.queue()]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("teacher", queues.TEACHERS)
def test_all_baselines_of_a_teacher_take_as_many_steps_and_the_plateau_test_half(teacher):
    steps = {task.arm.name: task.arm.steps for task in queues.everything()
             if (task.teacher, task.part) == (teacher, "baselines") and task.arm.method}
    half = steps.pop("ours_half")
    assert set(steps.values()) == {2 * half} == {EQUAL_STEPS[teacher]}


def test_an_arm_is_compared_with_dense_trained_as_long():
    tasks = {(task.teacher, task.variant, task.seed): task for task in queues.everything()}

    def bases(*name) -> list[str]:
        return [base.variant for base in study.bases(tasks[name], list(tasks.values()))]

    assert bases("mnist_dit", "baselines.sr_ste", 0) == ["baselines.dense"]
    assert bases("mnist_dit", "long.ours", 0) == bases("mnist_dit", "long.ours", 2) == ["long.dense"]
    assert bases("mnist_unet", "baselines.sr_ste", 0) == ["long.dense"]  # of 2,000 steps, too: the same as baselines.dense
    assert bases("mnist_unet", "baselines.dense", 0) == bases("mnist_unet", "long.dense", 0) == []
    assert bases("mnist_dit", "baselines.ours_half", 0) == ["baselines.ours"]  # mao.dense has as many steps and fewer samples
    assert bases("mnist_unet", "blocks.chosen", 1) == ["blocks.one_density"]
    assert bases("mnist_unet", "baselines.ours_half", 0) == ["baselines.ours"]
    assert bases("mnist_dit", "baselines.ours_data_free", 0) == ["baselines.dense", "baselines.ours"]
    assert bases("mnist_unet", "layers.ours_as_uniform", 4) == ["layers.ours"]


def test_processes_share_the_work_arm_by_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "WORK", tmp_path)
    first, second = itertools.islice(queues.queue(), 2)
    with study.own_work(first) as mine, study.own_work(first) as again, study.own_work(second) as other:
        assert (mine, again, other) == (True, False, True)
    with study.own_work(first) as once_more:
        assert once_more


def test_what_another_process_has_in_work_is_left_to_it(tmp_path, monkeypatch, capsys):
    tasks, finished = list(itertools.islice(queues.queue(), 3)), []
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "done", lambda task: task in finished)
    monkeypatch.setattr(study, "opened", lambda *args: None)
    monkeypatch.setattr(study, "finish", lambda task, lab: finished.append(task))
    with study.own_work(tasks[1]):
        study.run(tasks, {}, "cpu")
    assert finished == [tasks[0], tasks[2]] and "1 of 3 arms are in work elsewhere" in capsys.readouterr().out
    study.run(tasks, {}, "cpu")
    assert finished[2:] == [tasks[1]]


def test_an_arm_whose_settings_change_has_files_of_its_own():
    assert key(OURS, 0) == key(replace(OURS), 0) != key(replace(OURS, settings={"lr": 0.5}), 0)
    assert key(OURS, 0) != key(OURS, 1)


def test_no_two_arms_in_training_share_a_checkpoint(tmp_path):
    mine = {str((task.arm, task.seed)): task for task in queues.everything() if task.teacher == "mnist_unet"}
    assert len({Checkpoint(tmp_path, key(task.arm, task.seed)).path for task in mine.values()}) == len(mine)


def test_what_training_seeds_differ_by_widens_the_bound():
    alike, apart = (compare.over_seeds(losses, [loss + 0.05 for loss in losses], shared=True)
                    for losses in ((0.2, 0.2, 0.2), (0.1, 0.2, 0.3)))
    assert alike.estimate == pytest.approx(0.2) == apart.estimate
    assert alike.upper95 == pytest.approx(0.25) and apart.upper95 > 0.3


def test_noise_of_their_own_averages_out_and_shared_noise_does_not():
    losses, bounds = (0.1, 0.12, 0.11), (0.2, 0.22, 0.21)
    own, shared = (compare.over_seeds(losses, bounds, shared=shared) for shared in (False, True))
    assert own.within == pytest.approx(shared.within / 3) and own.between == shared.between
    assert own.upper95 < shared.upper95


def test_seeds_are_pooled_by_their_rows_where_all_of_them_are_there():
    def rows_of(metric, seeds, value):
        return [{"teacher": "mnist_dit", "variant": "long.ours", "seed": str(seed), "metric": name, "value": str(value + more),
                 "protocol": protocol} for seed in seeds for name, more in ((metric, 0.0), (f"{metric}_upper95", 0.03))]

    protocol = next(task.protocol for task in queues.queue() if (task.teacher, task.variant) == ("mnist_dit", "long.ours"))
    rows = [*rows_of("loss_to_dense", (0, 1, 2), 0.1), *rows_of("straying_over_dense", (0, 1), 0.2)]
    found = study.pooled(rows)
    assert not study.pooled([row | {"protocol": row["protocol"].replace("2000 steps", "1000 steps")} for row in rows])
    assert {row["metric"]: float(row["value"]) for row in found} == pytest.approx(
        {"loss_to_dense": 0.1, "loss_to_dense_upper95": 0.13})
    assert {row["seed"] for row in found} == {"all"} and found[0]["protocol"] == f"{protocol}; over seeds 0, 1, 2"


def test_rows_of_arms_whose_samples_are_elsewhere_stay(tmp_path, monkeypatch):
    task = next(task for task in queues.everything() if task.variant == "long.ours")
    row = study.rows(task, {"loss_to_dense": 0.5})[0]
    monkeypatch.setattr(study, "WORK", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
    study.results.write(study.RESULTS, [row])
    study.compare_all([task], {})
    assert [(kept["metric"], kept["value"]) for kept in study.results.read(study.RESULTS)] == [("loss_to_dense", "0.5")]


def test_an_arm_is_done_under_its_own_settings_alone(monkeypatch):
    task = next(queues.queue())
    row = {"teacher": task.teacher, "variant": task.variant, "seed": "0", "metric": "seconds", "protocol": task.protocol}
    for change in ({}, {"protocol": "of before"}, {"metric": "fid_10k"}, {"seed": "1"}):
        monkeypatch.setattr(study.results, "read", lambda path, change=change: [row | change])
        assert study.done(task) == (not change)
    elsewhere = row | {"metric": "host_seconds", "protocol": f"{task.protocol}; on another machine"}
    monkeypatch.setattr(study.results, "read", lambda path: [elsewhere])
    assert study.done(task)


def test_few_samples_stand_in_the_metrics_name():
    rng = np.random.default_rng(0)
    lab = SimpleNamespace(bootstrap=Bootstrap(judge_of(rng.standard_normal((300, 2))), lambda n: None))
    base = rng.standard_normal((queues.SAMPLES, 2))
    assert compare.against(base, "dense", lab, base.copy()) == {"loss_to_dense": 0.0, "loss_to_dense_upper95": 0.0}
    with pytest.raises(ValueError, match="dense: 10 samples to compare 2000 with"):
        compare.against(base[:10], "dense", lab, base[:2000])
    few = compare.against(base, "dense", lab, base[:2000] + 1)
    assert few.keys() == {"loss_to_dense_2k", "loss_to_dense_2k_upper95"} and few["loss_to_dense_2k"] > 1


def test_straying_is_the_change_of_the_mean_distance_to_dense_and_its_bound_covers_it():
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((4000, 8))
    base = dense + rng.standard_normal((4000, 8))
    same = compare.straying(base, dense, base.copy())
    assert (same.estimate, same.error) == (0, 0)
    farther = [compare.straying(base, dense, dense + 1.1 * rng.standard_normal((4000, 8))) for _ in range(40)]
    assert np.mean([one.estimate for one in farther]) == pytest.approx(0.1, abs=0.01)
    assert sum(one.upper95 < 0.1 for one in farther) <= 7


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_the_bound_over_three_seeds_covers_as_often_as_it_says(spread):
    """spread: of the seeds, beside noise of 1 in each."""
    rng = np.random.default_rng(0)
    found = rng.standard_normal((4000, 3)) + spread * rng.standard_normal((4000, 3))
    missed = np.mean([compare.OverSeeds.of(list(one), within=1 / 3).upper95 < 0 for one in found])
    assert missed <= 0.055


def judge_of(holdout: np.ndarray) -> Judge:
    return Judge(net=None, features=holdout, labels=None, reference=Gaussian.of(holdout))


def test_an_arm_of_two_parts_is_done_once_and_has_rows_in_both(tmp_path, monkeypatch):
    task = next(task for task in queues.queue() if (task.teacher, task.variant) == ("mnist_unet", "baselines.ours"))
    assert [twin.variant for twin in study.twins(task)] == ["baselines.ours", "long.ours"]
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(study.study, "measure", lambda *of: {"fid_10k": 0.5})
    study.results.write(study.RESULTS, [])
    lab = SimpleNamespace(teacher=SimpleNamespace(model=torch.nn.Linear(1, 1)), folder=tmp_path)
    study.finish(task, lab)
    found = [(row["variant"], row["metric"]) for row in study.results.read(study.RESULTS)]
    assert found == [(twin, metric) for twin in ("baselines.ours", "long.ours") for metric in ("fid_10k", "seconds")]
    monkeypatch.setattr(study.study, "measure", lambda *of: {"fid_10k": 0.7})
    study.finish(task, lab)
    found = {row["variant"]: row["value"] for row in study.results.read(study.RESULTS) if row["metric"] == "fid_10k"}
    assert found == {"baselines.ours": "0.7", "long.ours": "0.5"}  # what its twin has by now stays


def test_time_of_an_arm_is_whole_or_named_otherwise(tmp_path, monkeypatch):
    """What chose its masks before counts; an arm of which part was trained before has no such time."""
    task = next(task for task in queues.queue() if task.variant == "baselines.ours_as_uniform")
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(study.study, "measure", lambda *of: {})
    lab = SimpleNamespace(teacher=SimpleNamespace(model=torch.nn.Linear(1, 1)), folder=tmp_path)
    masks = study.study.masks_folder(task.arm, lab)
    masks.mkdir(parents=True)
    write_json(masks / study.study.SECONDS, 100.0)
    study.results.write(study.RESULTS, [])
    study.finish(task, lab)
    [row] = study.results.read(study.RESULTS)
    assert row["metric"] == "seconds" and float(row["value"]) == pytest.approx(100, abs=1)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / f"{key(task.arm, task.seed)}.pt").touch()
    study.results.write(study.RESULTS, [])
    study.finish(task, lab)
    assert [row["metric"] for row in study.results.read(study.RESULTS)] == ["resumed_seconds"] and study.done(task)


def test_a_part_that_only_further_asks_for_is_named_and_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(study, "compare_all", lambda *of: pytest.fail("compared"))
    with pytest.raises(SystemExit, match="--only layers: nothing of it is asked for without --further"):
        study.main(["--only", "layers"])
