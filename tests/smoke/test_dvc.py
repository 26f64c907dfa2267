"""Our shell under DVC itself, with one small stage: parameters that change meanwhile, experiments, a second clone."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tasks.core.params import STAGES
from tests.contract.reading import ROOT

STAGE = """
import time
from dataclasses import dataclass
from pathlib import Path
from tasks.core.artifacts import Report
INPUTS = ()
@dataclass(frozen=True, kw_only=True)
class Params:
    seed: int
    grains: tuple[str, ...]
def run(params, inputs, out):
    checkpoint = inputs.checkpoint("evolve", every_s=0)
    known = checkpoint.load()
    checkpoint.save({"seed": params.seed})
    print("at work, resumed" if known else "at work, afresh", flush=True)
    while Path("runs/wait").exists():
        time.sleep(0.05)
    (out / "seed.txt").write_text(str(params.seed))
    return Report({"seed": params.seed}, {"wall_s": 0.5})
"""
MAIN = "from tasks.core.shell import main\nfrom tasks.evolve import stage\n\nmain(stage)\n"
PIPELINE = """
stages:
  evolve:
    cmd: python -m tasks.evolve
    deps: ["${data.path}", tasks/evolve, tasks/core]
    params: [evolve, scale]
    outs: [artifacts/evolve]
    metrics: [reports/evolve.json, reports/evolve.timings.json]
"""
PARAMS = """
goal: {target: latency, max_quality_loss: 0.05, min_speedup: 5.0, max_bitops: null, max_size: null}
scale: quick
cluster: {address: null, workers: 1, cpus_per_worker: 1, gpus_per_worker: 0, max_attempts: 3, max_object_mb: 64,
          storage_uri: null, connect_timeout_s: 20, start_timeout_s: 60}
resources: {}
threads: null
data: {path: tasks/evolve}
evolve:
  seed: 5  # of all
  grains: {quick: [2of4], full: [2of4, 1of4]}
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Committed, with a remote beside it."""
    top = tmp_path / "first"
    for folder in (".dvc", "tasks/evolve"):
        (top / folder).mkdir(parents=True)
    monkeypatch.chdir(top)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    shutil.copytree(ROOT / "tasks/core", "tasks/core", ignore=shutil.ignore_patterns("__pycache__"))
    config = f"[core]\n    analytics = false\n    remote = there\n['remote \"there\"']\n    url = {tmp_path / 'remote'}\n"
    others = "".join(f"{stage}: {{}}\n" for stage in STAGES if stage not in ("data", "evolve"))
    for name, text in {".dvc/config": config, "dvc.yaml": PIPELINE,
                       "params.yaml": PARAMS + others, "tasks/__init__.py": "", "tasks/evolve/__init__.py": "",
                       "tasks/evolve/stage.py": STAGE, "tasks/evolve/__main__.py": MAIN}.items():
        Path(name).write_text(text)
    for name in (".dvcignore", ".gitignore", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, name)
    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "first")
    return top


def git(*command: str) -> str:
    return subprocess.check_output(["git", *command], text=True)


def dvc(*command: str) -> str:
    done = subprocess.run([sys.executable, "-m", "dvc", *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def repro(meanwhile) -> tuple[int, str]:
    """`dvc repro`, with something done while the stage works. -> exit status, all that it printed."""
    Path("runs").mkdir(exist_ok=True)
    Path("runs/wait").touch()
    command = [sys.executable, "-m", "dvc", "repro"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        said = ""
        for line in run.stdout:
            said += line
            if line.startswith("at work"):
                meanwhile()
                Path("runs/wait").unlink()
    return run.returncode, said


def edit(old: str, new: str):
    def write():
        assert old in Path("params.yaml").read_text()
        Path("params.yaml").write_text(Path("params.yaml").read_text().replace(old, new))
    return write


def test_a_result_never_stands_under_a_parameter_that_it_was_not_made_with(repository):
    """The issue's own case, through `dvc repro`: seed 5 at work, params.yaml edited to 6."""
    status, said = repro(edit("seed: 5", "seed: 6"))
    assert status and "error: params.yaml: evolve.seed changed from 5 to 6 while evolve ran" in said
    assert not any(Path(name).exists() for name in ("dvc.lock", "artifacts/evolve", "reports/evolve.json", ".dvc/cache/runs"))
    edit("seed: 6", "seed: 5")()
    status, said = repro(edit("distill: {}", "distill: {seed: 1}  # of another stage"))
    assert status == 0 and "at work, resumed" in said, "the work is not lost once the value is put back"
    locked = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["evolve"]["params"]["params.yaml"]
    assert locked["evolve"]["seed"] == 5 and Path("artifacts/evolve/seed.txt").read_text() == "5"


def test_an_experiment_elsewhere_and_a_pulled_clone_have_all_that_they_need(repository, tmp_path, monkeypatch):
    """`--temp` and a second clone have what git and DVC hold, and nothing that git ignores."""
    dvc("exp", "run", "--temp", "-S", "evolve.seed=7", "-n", "seven")
    assert not Path("artifacts").exists() and "seed: 5" in Path("params.yaml").read_text()
    dvc("exp", "apply", "seven")
    assert Path("artifacts/evolve/seed.txt").read_text() == "7" and "seed: 7  # of all" in Path("params.yaml").read_text()
    git("add", "-A")
    git("commit", "-q", "-m", "seven")
    dvc("push")
    git("clone", "-q", str(repository), str(tmp_path / "second"))
    monkeypatch.chdir(tmp_path / "second")
    dvc("pull")
    assert "Data and pipelines are up to date." in dvc("repro") and not git("status", "--short")
    assert Path("reports/evolve.timings.json").exists()


@pytest.mark.slow
def test_queued_experiments_and_one_in_the_workspace(repository):
    dvc("exp", "run", "-S", "evolve.seed=8", "-S", "evolve.grains.quick=[1of4,2of4]", "-n", "eight")
    assert Path("artifacts/evolve/seed.txt").read_text() == "8"
    assert "grains: {quick: [1of4, 2of4]" in Path("params.yaml").read_text()
    assert git("status", "--short").split() == ["M", "params.yaml", "??", "dvc.lock"], "reports are DVC's"
    shown = json.loads(dvc("metrics", "show", "--json"))[""]["data"]
    assert {name: part["data"] for name, part in shown.items()} == {"reports/evolve.json": {"seed": 8},
                                                                    "reports/evolve.timings.json": {"wall_s": 0.5}}
    git("checkout", "-q", "params.yaml")
    for seed, name in (("9", "nine"), ("10", "ten")):
        dvc("exp", "run", "--queue", "-S", f"evolve.seed={seed}", "-n", name)
    dvc("queue", "start")
    deadline = time.monotonic() + 240
    while dvc("queue", "status").count("Success") < 2:
        assert time.monotonic() < deadline and "Failed" not in dvc("queue", "status"), dvc("queue", "status")
        time.sleep(1)
    shown = dvc("exp", "show", "--csv")
    assert all(name in shown for name in ("eight", "nine", "ten"))
    for name, seed in (("nine", "9"), ("ten", "10")):
        dvc("exp", "apply", name)
        assert Path("artifacts/evolve/seed.txt").read_text() == seed
    compared = json.loads(dvc("exp", "diff", "nine", "ten", "--json"))["metrics"]
    assert compared["reports/evolve.json"] == {"seed": {"old": 9, "new": 10, "diff": 1}}
