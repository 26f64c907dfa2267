"""What only the whole params.yaml can be wrong about, through the preflight: one line, and the key is named."""

import json
import re
import shutil

import pytest

from flows import compress
from tasks.core import agreement
from tasks.core.params import read_params, validate_all
from tasks.core.schedule import Schedule
from tests.contract.reading import ROOT, committed

GOOD = committed("params.yaml")


@pytest.mark.parametrize("old, new, message", [
    ("min_speedup: 5.0", "min_speedup: 1000", r"goal\.min_speedup: 1000 is above \d+, which nothing reaches"),
    ("target: latency ", "target: bitops ", "goal.max_bitops: null, but goal.target 'bitops' needs a number"),
    ("target: latency ", "target: size ", "goal.max_size: null"),
    ("workers: 2 ", "workers: 0 ", "cluster.workers: 0 is not between 1 and 10000"),
    ("workers: 2 ", "wokers: 2 ", r"cluster: unknown key 'wokers' \(did you mean workers"),
    ("threads: null", "threads: 0", "threads: 0 is not between 1 and 1024"),
    ("threads: null", "threads: two", "threads: 'two' is not a whole number; null takes what this process may use"),
    ("threads: null", "threads: true", "threads: True is not a whole number"),
    ("resources: {}", "resources: [distill]", r"resources: \['distill'\] is not a block of keys"),
    ("resources: {}", "resources: {distil: {cpus: 8}}", "resources: 'distil' is not one of .*did you mean distill"),
    ("resources: {}", "resources: {distill: {cpu: 8}}", "resources.distill: unknown key 'cpu'"),
    ("resources: {}", "resources: {distill: {cpus: -1}}", "resources.distill.cpus: -1 is not between 0 and 1024"),
    ("batches: {quick: [8]", "batches: {quick: [4]", r"mask_search.batch: 8 is not one of profile.batches: \[4\]"),
    ("batches: {quick: [1, 8]", "batches: {quick: [1]", r"benchmark.batch: 8 is not one of benchmark.batches: \[1\]"),
    ("  batch: 8                  # images sampled together, the same", "  batch: 1 # the same",
     "report.batch: 1 is not benchmark.batch: 8, where a close verdict is timed on"),
    ("  seed: 4242 ", "  seed: 0 ", "fid.seed: 0 is pretrain_load.seed, too: samples would be judged on noise"),
    ("  seed: 4242 ", "  seed: 20_000 ", "fid.seed: 20000 is evolve.protocol.seed, too"),
    ("  seed: 4242 ", "  seed: 2121 ", "fid.seed: 2121 is fid.dull.seed too"),
    ("  seed: 31 ", "  seed: 7 ", "evolve.finals.seed: 7 is solver_learn.seed, too: samples would be judged on noise"),
    ("  seed: 31 ", "  seed: 20_000 ", "evolve.finals.seed: 20000 is evolve.protocol.seed, too"),
    ("  seed: 20_000 ", "  seed: 7 ", "evolve.protocol.seed: 7 is solver_learn.seed, too"),
    ("\n  held: {quick: 128, full: 512}        # pairs", "\n  held: 512  # pairs",
     "finish.held: 512 is not below solver_learn.noises: 512, of which it is a part"),
    ("\n    held: {quick: 128, full: 512}", "\n    held: 600",
     "distill.few_steps.held: 600 is not below solver_learn.noises: 512"),
    ("evaluations: {quick: [5, 6]", "evaluations: {quick: [4, 20]",
     "solver_learn.evaluations: 20 is not below solver_learn.teacher.steps: 20, by which it learns"),
    ("    evaluations: [3, 4]  ", "    evaluations: [20]  ",
     "distill.few_steps.evaluations: 20 is not below solver_learn.teacher.steps: 20"),
    ("    evaluations: [3, 4]  ", "    evaluations: [4, 4]  ",
     r"distill.few_steps.evaluations: \[4, 4\] names one twice"),
    ("grains: {quick: [dense], full: [dense, unit]}  # of", "grains: []  # of",
     r"distill.few_steps.grains: \[\] is empty"),
    ("solvers: {quick: [ddim, dpm2m], full: [ddim", "solvers: {quick: [ddim, ddim], full: [ddim",
     r"evolve.solvers: \['ddim', 'ddim'\] names one twice"),
    ("solvers: {quick: [ddim, dpm2m], full: [ddim", "solvers: {quick: [], full: [ddim", r"evolve.solvers: \[\] is empty"),
    ("    steps: {quick: [4, 6, 8, 10, 12, 16]", "    steps: {quick: [4, 4]", r"fid.dull.steps: \[4, 4\] names one twice"),
    ("  lr: 0.01                               #", "  lr: 0.0 #", "solver_learn.lr: 0: nothing would learn; steps: 0 keeps"),
    ("  lr: 5.0e-5              # Adam on the weights, warm-up, then a cosine to 0\n  solver_lr: 0.002 ",
     "  lr: 0.0\n  solver_lr: 0.0 ", "finish.lr: 0 and solver_lr: 0: nothing would learn"),
    ("    loss: {maps: 1.0,", "    loss: {maps: -1.0,", "distill.few_steps.loss.maps: -1.0 is not between 0 and"),
    ("scale: quick", "scale: quick\nscale: full", 'key "scale" stands twice'),
    ("  bank: 1000", "  bank: 1000\n  bank: 10", 'key "bank" stands twice'),
    ("source: folder          # folder", "source: hub # folder", "revision: None; source hub needs"),
])
def test_a_mistake_is_one_line_before_anything_starts(tmp_path, old, new, message):
    assert old in GOOD
    path = tmp_path / "params.yaml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as failure:
        validate_all(path)
    assert str(failure.value).startswith(str(path)) and "\n" not in str(failure.value)


@pytest.mark.parametrize("target, key, value", [("bitops", "max_bitops", "0.00001"), ("size", "max_size", "1000")])
def test_a_goal_below_what_three_bits_give_is_refused(tmp_path, target, key, value):
    path = tmp_path / "params.yaml"
    path.write_text(GOOD.replace("target: latency ", f"target: {target} ").replace(f"{key}: null", f"{key}: {value}"))
    with pytest.raises(ValueError, match=rf"goal\.{key}: .* is below .*, which nothing reaches"):
        validate_all(path)


@pytest.mark.parametrize("revision, repo, message", [
    ("main", "owner/name", "revision: 'main' is not a commit"), ("0123abc", "a b//c", "repo_id: 'a b//c' is not owner/name")])
def test_a_hub_model_is_named_by_its_commit(tmp_path, revision, repo, message):
    path = tmp_path / "params.yaml"
    text = re.sub("revision: null", f"revision: {revision}", re.sub("repo_id: null", f"repo_id: {repo}", GOOD))
    path.write_text(text.replace("source: folder          # folder", "source: hub # folder"))
    with pytest.raises(ValueError, match=message):
        validate_all(path)


def test_a_block_that_is_none_and_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(re.sub(r"(?ms)^fid:.*?^benchmark", "fid: [1, 2]\nbenchmark", GOOD))
    with pytest.raises(ValueError, match=r"fid: \[1, 2\] is not a block of keys"):
        validate_all(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="params.yaml: not a text file in UTF-8"):
        validate_all(path)


@pytest.mark.parametrize("total, stage, key, value, message", [
    (60, None, None, None, "package.dense_steps: 50 is above 30, half of the teacher's num_train_timesteps"),
    (99, None, None, None, "package.dense_steps: 50 is above 49, half"),
    (40, None, None, None, "evolve.dense_steps: 50 is above 40, the teacher's num_train_timesteps"),
    (1000, "package", "dense_steps", 501, "package.dense_steps: 501 is above 500, half"),
    (200, "pretrain_load", "bank_steps", 201, "pretrain_load.bank_steps: 201 is above 200"),
    (200, "mask_search", "steps", 201, "mask_search.steps: 201 is above 200"),
    (200, "cache_learn", "base_steps", 201, "cache_learn.base_steps: 201 is above 200"),
    (200, "cache_learn", "grid", 201, "cache_learn.grid: 201 is above 200"),
    (200, "evolve", "steps", [4, 201], "evolve.steps: 201 is above 200"),
    (200, "evolve", "protocol", {"calibration_steps": 201}, "evolve.protocol.calibration_steps: 201 is above 200"),
    (200, "fid", "dull", {"steps": [12, 201]}, "fid.dull.steps: 201 is above 200"),
])
def test_no_list_has_more_steps_than_the_teacher_has_timesteps(total, stage, key, value, message):
    params = read_params()
    if stage:
        params[stage][key] = value
    with pytest.raises(ValueError, match=message):
        agreement.check_steps(params, Schedule.from_config({"num_train_timesteps": total}))


def test_a_short_schedule_is_enough_where_no_list_asks_for_more():
    params = read_params()
    params["package"]["dense_steps"], params["evolve"]["dense_steps"] = 25, 25
    agreement.check_steps(params, Schedule.from_config({"num_train_timesteps": 50}))
    agreement.check_steps(read_params(), Schedule.from_config({"num_train_timesteps": 100}))


def test_an_offset_beyond_the_last_timestep_is_told_with_the_key_that_asks_for_it():
    """100 steps of 1000 // 100 from 15 on: 1005. At 50 there is room, at twice that there is not."""
    with pytest.raises(ValueError, match="package.dense_steps: 50: scheduler_config.json: steps_offset: 15 puts the first of"):
        agreement.check_steps(read_params(), Schedule.from_config({"steps_offset": 15}))


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name: 'FlowMatchEulerDiscreteScheduler' is not a scheduler"),
    ({"num_train_timesteps": 60}, "package.dense_steps: 50 is above 30"),
    ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True leaves no signal"),
])
def test_the_preflight_reads_the_teachers_scheduler(tmp_path, change, message):
    teacher = tmp_path / "teacher"
    shutil.copytree(ROOT / "tasks/pretrain_load/teachers/mnist_dit", teacher, ignore=shutil.ignore_patterns("few_steps"))
    index, own = teacher / "model_index.json", teacher / "scheduler/scheduler_config.json"
    index.write_text(json.dumps({k: v for k, v in json.loads(index.read_text()).items() if k != "scheduler"}))
    own.write_text(json.dumps(json.loads(own.read_text()) | change))
    path = tmp_path / "params.yaml"
    path.write_text(GOOD.replace("path: tasks/pretrain_load/teachers/mnist_dit", f"path: {teacher}"))
    with pytest.raises(ValueError, match=message) as failure:
        validate_all(path)
    assert "\n" not in str(failure.value)


def test_the_preflight_refuses_a_disk_without_room(monkeypatch):
    monkeypatch.setattr(compress.freshness.disk, "free_bytes", lambda path: 5 * 10**8)
    with pytest.raises(ValueError, match="500 MB free, a run needs at least 1000 MB"):
        compress.freshness.check_space()


def test_a_run_never_reads_its_data_from_what_it_writes():
    with pytest.raises(ValueError, match="data.path: '.' is, holds or lies in a folder that the run writes"):
        compress.freshness.check_paths({"data": {"path": "."}, "pretrain_load": {"path": "tasks"}})
