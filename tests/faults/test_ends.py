"""However a run ends, and whoever is killed: nothing of ours goes on, nothing half made stays, and the next run goes on.

Real processes: the flow with Prefect's temporary server, DVC, a stage in the real shell; only what the stage does is a toy.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import yaml

from tasks.core.params import SHARED, STAGES
from tests.faults.raylets import ROOT, until
from tests.faults.test_cluster_faults import SERIAL

PIPELINE = """
stages:
  fid:
    cmd: python -m toy.fid
    deps: [toy]
    outs: [artifacts/fid]
    metrics: [{reports/fid.json: {cache: false}}]
"""
MAIN = "from tasks.core.shell import main\nfrom toy.fid import stage\n\nmain(stage)\n"
STAGE = """
import os, time
from dataclasses import dataclass
from pathlib import Path
from tasks.core.artifacts import Report

INPUTS = ()

@dataclass(frozen=True, kw_only=True)
class Params:
    pass

def make():
    return abs

def run(params, inputs, out):
    (out / "half").write_text("half made")
    Path("runs/room").write_text(os.environ["TMPDIR"])
    if inputs.cluster.params.workers > 1:
        assert list(inputs.cluster.map(make, [-1, -2], "toy")) == [1, 2]
    saved = inputs.checkpoint("toy").load() or {"step": 0}
    inputs.checkpoint("toy").save({"step": 5})
    Path("runs/at_work").write_text(str(os.getpid()))
    print("at work", flush=True)
    while Path("hang").exists():
        time.sleep(0.1)
    return Report({"resumed_at": saved["step"]})
"""
FLOW = """
import sys
from flows import compress, freshness
from tasks.core.params import read_params
compress.validate_all = read_params
freshness.check_paths = lambda params: None
sys.exit(compress.main([]))
"""
LINE = "stopped; the next run goes on from the last checkpoint"


@pytest.fixture
def toy(tmp_path):
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    write_params(tmp_path, workers=1)
    for path, text in {"dvc.yaml": PIPELINE, ".dvc/config": "[core]\n    analytics = false\n", ".dvcignore": "__pycache__\n",
                       "toy/fid/stage.py": STAGE, "toy/fid/__main__.py": MAIN, "toy/fid/__init__.py": "",
                       "toy/__init__.py": "", "hang": "", "flow.py": FLOW}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    yield tmp_path
    for process in ours(tmp_path):
        process.kill()


def write_params(room: Path, workers: int) -> None:
    blocks = dict.fromkeys((*SHARED, *STAGES), {}) | {
        "scale": "quick", "threads": None, "cluster": asdict(replace(SERIAL, workers=workers))}
    (room / "params.yaml").write_text(yaml.safe_dump(blocks))


def environment(room: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name not in ("PREFECT_API_URL", "TMPDIR")}
    return own | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(room / "prefect"), "PATH":
                  os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}


def start(room: Path, *command: str) -> subprocess.Popen:
    """As from a terminal: in the background SIGINT is ignored, under nohup SIGHUP, by whatever is started there, too."""
    return subprocess.Popen([sys.executable, *command], cwd=room, env=environment(room), text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)])


def start_to_work(room: Path, *command: str) -> subprocess.Popen:
    run = start(room, *command)
    until(lambda: (room / "runs/at_work").exists() or run.poll() is not None, "the stage at work", 300)
    assert run.poll() is None, run.communicate()
    return run


def ours(room: Path) -> list[psutil.Process]:
    """Every process that works in this folder, or was started by one that did: the run's server has its home there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("PREFECT_HOME") == str(room / "prefect"):
                found.append(process)
        except psutil.Error:
            continue
    return found


def named(room: Path, word: str) -> psutil.Process:
    return next(process for process in ours(room) if word in process.cmdline())


def all_gone(room: Path, within_s: float = 20.0) -> None:
    until(lambda: not ours(room), f"the end of {[process.cmdline() for process in ours(room)]}", within_s)


def goes_on(room: Path, *command: str) -> None:
    """The next run takes up the checkpoint, and leaves only what belongs there."""
    (room / "hang").unlink()
    printed, said = (run := start(room, *command)).communicate(timeout=300)
    assert run.returncode == 0, printed + said
    assert json.loads((room / "reports/fid.json").read_text()) == {"resumed_at": 5}
    assert [path.name for path in (room / "artifacts").iterdir()] in (["fid"], ["fid", ".gitignore"], [".gitignore", "fid"])
    assert not list(room.glob("runs/**/*.partial")) and not Path((room / "runs/room").read_text()).exists()
    all_gone(room)


def test_a_stage_ends_with_dvc_and_the_next_one_goes_on(toy):
    """`dvc repro` alone, SIGKILLed: nobody is left to end the stage, so it ends by itself."""
    dvc = start_to_work(toy, "-m", "dvc", "repro", "-q")
    dvc.kill()
    dvc.wait()
    all_gone(toy)
    assert (toy / "runs/room").exists() and not Path((toy / "runs/room").read_text()).exists()
    goes_on(toy, "-m", "dvc", "repro", "-q")


def test_a_second_stage_in_one_folder_waits(toy):
    first = start_to_work(toy, "-m", "toy.fid")
    second = start(toy, "-m", "toy.fid")
    assert second.stdout.readline() == "another stage is at work in this folder; waiting for it to end\n"
    (toy / "hang").unlink()
    assert first.wait(60) == 0 and second.wait(60) == 0
    assert len(list((toy / "artifacts").iterdir())) == 1


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_stage_that_is_told_to_stop_leaves_nothing_half_made(toy, number, status):
    stage = start_to_work(toy, "-m", "toy.fid")
    stage.send_signal(number)
    assert stage.wait(20) == status
    assert stage.communicate()[1] == "" and not list((toy / "artifacts").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("whom", [os.kill, os.killpg], ids=["process", "group"])
def test_a_run_that_is_told_to_stop_does_so_in_one_line(toy, number, whom):
    run = start_to_work(toy, "flow.py")
    told = time.monotonic()
    whom(run.pid, number)
    printed, said = run.communicate(timeout=60)
    assert time.monotonic() - told < 20  # of which ending.LIMIT_S are ours, and some a busy machine's
    assert (run.returncode, said.strip()) == (128 + number, LINE)
    assert "Traceback" not in printed
    all_gone(toy)
    goes_on(toy, "flow.py")


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["one process", "Ray workers"])
@pytest.mark.parametrize("victim", ["flow.py", "flows.repro", "toy.fid"])
def test_whoever_is_killed_takes_the_others_along(toy, victim, wide):
    """SIGKILL, which unwinds nothing: of the run itself, of DVC, of the stage (which the run then tries again)."""
    write_params(toy, workers=2 if wide else 1)
    run = start_to_work(toy, "flow.py")
    (toy / "runs/at_work").unlink()
    named(toy, victim).kill()
    if victim == "flow.py":
        run.wait()
        all_gone(toy)
    else:
        until((toy / "runs/at_work").exists, "the second try", 120)
        run.kill()
        run.wait()
        all_gone(toy)
    goes_on(toy, "flow.py")


@pytest.mark.slow
def test_the_server_of_a_killed_run_ends(tmp_path):
    """Prefect's temporary server holds 200 MB, and nobody would know what it was of."""
    run = start(tmp_path, "-c", "from flows.server import *; start_server(); print('up', flush=True); signal.pause()")
    assert run.stdout.readline() == "up\n", run.stderr.read()
    assert named(tmp_path, "flows.server")
    run.kill()
    run.wait()
    all_gone(tmp_path, 5)
