"""The shell around a toy stage: what it leaves behind when the stage works, fails, or is given nonsense."""

import json
import types
from dataclasses import dataclass

import pytest

from tasks.core import shell
from tasks.core.artifacts import Inputs, Report, validate

CLUSTER = {"address": None, "workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "max_attempts": 3, "max_object_mb": 64,
           "storage_uri": None, "connect_timeout_s": 20, "start_timeout_s": 60}


@dataclass(frozen=True, kw_only=True)
class Params:
    seed: int

    def __post_init__(self):
        if self.seed < 0:
            raise ValueError(f"seed: {self.seed} is below 0")


def run(params, inputs: Inputs, out):
    (out / "numbers.txt").write_text(str(params.seed))
    checkpoint = inputs.checkpoint("toy", every_s=0)
    checkpoint.save({"seed": params.seed})
    if params.seed == 13:
        raise ValueError("toy: 13 brings bad luck")
    return Report({"seed": params.seed}, {"wall_s": 0.1} if params.seed else {})


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "tasks" / "toy"
    room.mkdir(parents=True)
    stage = types.ModuleType("tasks.toy.stage")
    stage.__file__, stage.INPUTS, stage.Params, stage.run = str(room / "stage.py"), (), Params, run

    def start(seed):
        monkeypatch.setattr(shell, "read_params", lambda: {"toy": {"seed": seed}, "cluster": CLUSTER, "resources": None})
        shell.main(stage)
    return start


def test_a_stage_that_works_leaves_artifact_reports_and_a_run_record(toy, tmp_path):
    toy(7)
    assert (validate(tmp_path / "artifacts" / "toy") / "numbers.txt").read_text() == "7"
    assert json.loads((tmp_path / "reports" / "toy.json").read_text()) == {"seed": 7}
    assert json.loads((tmp_path / "reports" / "toy.timings.json").read_text()) == {"wall_s": 0.1}
    assert json.loads((tmp_path / "runs" / "toy.json").read_text())["wall_s"] >= 0
    assert not list((tmp_path / "runs" / "checkpoints").rglob("*.pt")), "the checkpoint of finished work is cleared"


@pytest.mark.parametrize("seed, message", [
    (13, "13 brings bad luck"), (-1, "params.yaml: seed: -1 is below 0"), ("x", "'x' is not of type int")])
def test_a_stage_that_fails_loses_nothing(toy, tmp_path, seed, message):
    toy(7)
    with pytest.raises(SystemExit) as failure:
        toy(seed)
    assert message in str(failure.value.code) and "\n" not in str(failure.value.code)
    assert (validate(tmp_path / "artifacts" / "toy") / "numbers.txt").read_text() == "7"
    assert bool(list((tmp_path / "runs" / "checkpoints").rglob("*.pt"))) == (seed == 13), "unfinished work keeps its checkpoint"


def test_a_second_run_writes_the_same_bytes(toy, tmp_path):
    toy(0)
    first = {p: p.read_bytes() for p in (tmp_path / "artifacts").rglob("*") if p.is_file()}
    toy(0)
    assert first == {p: p.read_bytes() for p in (tmp_path / "artifacts").rglob("*") if p.is_file()}
