"""What the study asks for and how its rows are pooled; its training is that of tasks/distill."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.sparsity import __main__ as study
from benchmarks.sparsity import compare
from benchmarks.sparsity import queue as queues
from benchmarks.sparsity.arms import BASELINES, FINALISTS, MAO, OURS, UNITS, key
from tasks.core.quality import Gaussian
from tasks.fid.measure import Judge


def test_every_arm_is_asked_for_once_and_finalists_with_three_seeds():
    tasks = list(queues.queue())
    asked = [(task.teacher, task.variant, task.seed) for task in tasks]
    assert len(set(asked)) == len(asked)
    for teacher in queues.TEACHERS:
        mine = {task.arm.name for task in tasks if (task.teacher, task.part) == (teacher, "baselines")}
        assert mine >= {arm.name for arm in BASELINES}
        for name in FINALISTS:
            assert [t.seed for t in tasks if (t.teacher, t.arm.name, t.samples) == (teacher, name, queues.SAMPLES)] == [0, 1, 2]
    assert {task.arm.name for task in tasks if task.part == "units"} == {arm.name for arm in UNITS}
    assert {task.arm.name for task in tasks if task.part == "mao"} == {arm.name for arm in MAO}


def test_all_trained_arms_take_as_many_steps():
    assert len({arm.steps for arm in (*BASELINES, *UNITS) if arm.method}) == 1


def test_an_arm_whose_settings_change_has_files_of_its_own():
    assert key(OURS, 0) == key(replace(OURS), 0) != key(replace(OURS, settings={"lr": 0.5}), 0)
    assert key(OURS, 0) != key(OURS, 1)


def test_seeds_are_pooled_into_one_difference():
    """Estimates 1, 2, 3 %, each with a standard error of 1 %: their own noise stays, theirs among each other adds."""
    found = compare.over_seeds([0.01, 0.02, 0.03], [e + 1.6449 * 0.01 for e in (0.01, 0.02, 0.03)])
    assert found.estimate == pytest.approx(0.02)
    assert found.error == pytest.approx((0.01**2 + 0.01**2 / 3) ** 0.5)


def test_pooled_rows_are_of_all_three_seeds_or_not_at_all():
    rows = [{"teacher": "t", "variant": "baselines.ours", "seed": seed, "metric": metric, "value": str(value)}
            for seed in (0, 1, 2) for metric, value in (("loss_to_dense", 0.01), ("loss_to_dense_upper95", 0.02))]
    pooled = study.over_seeds([*rows, {**rows[0], "variant": "baselines.once"}])
    assert [(row["variant"], row["seed"], row["metric"]) for row in pooled] == [
        ("baselines.ours", "all", "loss_to_dense"), ("baselines.ours", "all", "loss_to_dense_upper95")]
    assert float(pooled[1]["value"]) == pytest.approx(0.02, abs=1e-4)
    assert study.over_seeds(rows[:4]) == []


def test_an_arm_is_done_under_its_own_settings_alone(monkeypatch):
    task = next(queues.queue())
    row = {"teacher": task.teacher, "variant": task.variant, "seed": "0", "metric": "seconds", "protocol": task.protocol}
    for change in ({}, {"protocol": "of before"}, {"metric": "fid_10k"}, {"seed": "1"}):
        monkeypatch.setattr(study.results, "read", lambda path, change=change: [row | change])
        assert study.done(task) == (not change)


def test_few_samples_stand_in_the_metrics_name():
    rng = np.random.default_rng(0)
    holdout = rng.standard_normal((300, 2))
    judge = Judge(net=None, features=holdout, labels=None, reference=Gaussian.of(holdout))
    lab = SimpleNamespace(judge=judge, strata=lambda n: None)
    base = rng.standard_normal((queues.SAMPLES, 2))
    found = compare.against(base, "dense", lab, {"dense": base.copy(), "few": base[:2000] + 1})
    assert found["dense"] == {"loss_to_dense": 0.0, "loss_to_dense_upper95": 0.0}  # an arm may be called as the base is
    assert found["few"].keys() == {"loss_to_dense_2k", "loss_to_dense_2k_upper95"} and found["few"]["loss_to_dense_2k"] > 1
