"""What a stage depends on changed while it ran: told by name, for everything that dvc.yaml names and for nothing else."""

import os
import shutil
from pathlib import Path

import pytest
import yaml

from tasks.core import steady
from tasks.core.params import STAGES, read_params
from tests.contract.reading import ROOT

GOAL = {"target": "latency", "max_quality_loss": 0.05, "min_speedup": 5.0, "max_bitops": None, "max_size": None}
CLUSTER = {"address": None, "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "max_attempts": 3, "max_object_mb": 64,
           "storage_uri": None, "connect_timeout_s": 20, "start_timeout_s": 60}
FILES = ("tasks/evolve/stage.py", "tasks/core/cost.py", "tasks/runtime/graph.py", "tasks/__init__.py", "tasks/distill/stage.py",
         "tasks/data/stage.py", "tasks/data/features.py", "tasks/cache_learn/plan.py", "constraints.txt", "images/0/a.png",
         *(f"artifacts/{stage}/manifest.json" for stage in STAGES))


def write_params(**changes):
    blocks = {"goal": GOAL, "scale": "quick", "threads": None, "cluster": CLUSTER, "resources": None,
              **{stage: {"seed": 5} for stage in STAGES}}
    blocks["data"] = {"source": "folder", "path": "images", "seed": 5}
    blocks["evolve"] = {"seed": 5, "steps": {"quick": [4, 16], "full": [4, 24]}}
    Path("params.yaml").write_text(yaml.safe_dump(blocks | changes))


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """The pipeline's own dvc.yaml over small files."""
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("1")
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, name)
    write_params()


def appended(name):
    return lambda: Path(name).write_text("12")


@pytest.mark.parametrize("stage, change, said", [
    ("evolve", lambda: write_params(evolve={"seed": 6, "steps": {"quick": [4, 16], "full": [4, 24]}}),
     "params.yaml: evolve.seed changed from 5 to 6"),
    ("evolve", lambda: write_params(goal=GOAL | {"min_speedup": 2}), "params.yaml: goal.min_speedup changed from 5.0 to 2"),
    ("evolve", lambda: write_params(scale="full"),
     "params.yaml: evolve.steps changed from [4, 16] to [4, 24], params.yaml: scale changed from 'quick' to 'full'"),
    ("evolve", appended("tasks/evolve/stage.py"), "tasks/evolve/stage.py changed"),
    ("evolve", appended("tasks/core/cost.py"), "tasks/core/cost.py changed"),
    ("evolve", appended("tasks/data/features.py"), "tasks/data/features.py changed"),
    ("evolve", appended("artifacts/distill/manifest.json"), "artifacts/distill/manifest.json changed"),
    ("evolve", appended("constraints.txt"), "constraints.txt changed"),
    ("evolve", lambda: Path("tasks/core/new.py").write_text(""), "tasks/core/new.py appeared"),
    ("evolve", lambda: Path("tasks/core/cost.py").unlink(), "tasks/core/cost.py went"),
    ("data", appended("images/0/a.png"), "images/0/a.png changed"),
    ("data", lambda: Path("images/0/b.png").write_text("1"), "images/0/b.png appeared"),
    ("data", lambda: write_params(data={"path": "tasks", "seed": 5}), "params.yaml: data.path changed from 'images'")])
def test_what_the_stage_depends_on_is_told_by_name(tree, stage, change, said):
    before = steady.noted(stage, read_params())
    steady.check(stage, before, read_params)
    change()
    with pytest.raises(ValueError) as failure:
        steady.check(stage, before, read_params)
    assert str(failure.value).startswith(said) and "\n" not in str(failure.value)
    assert f"while {stage} ran, whose result is not kept" in str(failure.value)


@pytest.mark.parametrize("change", [
    lambda: write_params(distill={"seed": 6}), lambda: write_params(cluster=CLUSTER | {"workers": 9}),
    lambda: write_params(evolve={"seed": 5, "steps": {"quick": [4, 16], "full": [4, 99]}}),  # not of this scale
    lambda: Path("params.yaml").write_text("# a comment\n" + Path("params.yaml").read_text()),
    lambda: os.utime("tasks/core/cost.py"), appended("tasks/distill/stage.py"), appended("images/0/a.png"),
    appended("artifacts/benchmark/manifest.json"),
    lambda: (Path("tasks/core/__pycache__").mkdir(), Path("tasks/core/__pycache__/cost.pyc").write_text("")),
    lambda: Path("tasks/core/.cost.py.swp").write_text("")])
def test_what_it_does_not_depend_on_is_no_matter(tree, change):
    before = steady.noted("evolve", read_params())
    change()
    steady.check("evolve", before, read_params)


def test_a_file_that_became_unreadable_is_told_too(tree):
    before = steady.noted("evolve", read_params())
    Path("params.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="params.yaml: not YAML: .*it was whole when evolve started"):
        steady.check("evolve", before, read_params)


def test_an_experiment_elsewhere_without_all_of_the_users_images_is_refused(tree, tmp_path, monkeypatch):
    """Two of three are git-ignored: DVC's copy of the clone has the third, and would run on it alone."""
    there = tmp_path / ".dvc/tmp/exps/standalone/tmp1"
    for name in ("images/0/a.png", "params.yaml", ".dvcignore"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(name, there / name)
    (there / ".dvc").mkdir()
    steady.check_nothing_was_left_behind(read_params())
    monkeypatch.chdir(there)
    steady.check_nothing_was_left_behind(read_params())
    for name in ("0/b.png", "1/c.png", "0/.DS_Store"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_text("1")
    with pytest.raises(ValueError, match="data.path: images: 2 of its files are not in this copy .*images/0/b.png among them"):
        steady.check_nothing_was_left_behind(read_params())
