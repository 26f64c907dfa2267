"""A search on two real raylets while its workers, a node and the driver are killed: the front of the undisturbed one, nothing
lost, nothing paid twice but what was in flight."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tasks.evolve.lab import EvaluationLog
from tests.faults.drill import BUDGET, calls, hunt
from tests.faults.raylets import ROOT, environment, until
from tests.faults.test_cluster_faults import SERIAL

WORKERS, ENOUGH = 2, 12  # one on each node; evaluations in the log before something is killed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Without Ray, without pauses."""
    return hunt(SERIAL, tmp_path_factory.mktemp("undisturbed"), "none", pause_s=0.0)


def begin(head: str, room: Path, mishap: str = "none") -> subprocess.Popen:
    params = json.dumps(asdict(replace(SERIAL, address=head, workers=WORKERS, connect_timeout_s=300.0)))
    command = [sys.executable, "-m", "tests.faults.drill", params, str(room), mishap]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(driver: subprocess.Popen, room: Path) -> tuple[dict, str]:
    """-> what it found, and what it printed."""
    printed, _ = driver.communicate(timeout=900)
    assert driver.returncode == 0, printed
    return json.loads((room / "front.json").read_text()), printed


def begun_by(room: Path) -> list[int]:
    """The processes of the evaluations that began, the last one last."""
    path = room / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [int(line.split()[2]) for line in lines if line.startswith("begins")]


def has_begun(driver: subprocess.Popen, room: Path) -> None:
    until(lambda: len(calls(room, "ends")) >= ENOUGH or driver.poll() is not None, f"{ENOUGH} evaluations")
    assert driver.poll() is None, driver.stdout.read()


def paid_twice(room: Path) -> int:
    return sum(n - 1 for n in Counter(calls(room, "begins")).values())


def check_log(room: Path, failed: int = 0) -> None:
    """All that ended is in the log, and once."""
    lines = (room / "log.jsonl").read_text().splitlines()
    assert set(EvaluationLog(room / "log.jsonl").known) == set(calls(room, "ends"))
    assert len(lines) == BUDGET - failed


def test_a_worker_is_killed(head, node, undisturbed, tmp_path):
    driver = begin(head, tmp_path)
    has_begun(driver, tmp_path)
    os.kill(begun_by(tmp_path)[-1], signal.SIGKILL)
    found, printed = end(driver, tmp_path)
    assert "died (" in printed and found == undisturbed
    assert paid_twice(tmp_path) <= 1
    check_log(tmp_path)


def test_a_node_is_killed(head, node, undisturbed, tmp_path):
    driver = begin(head, tmp_path)
    has_begun(driver, tmp_path)
    until(lambda: begun_by(tmp_path)[-1] in {process.pid for process in node.tree()}, "the node has an evaluation")
    node.kill()
    found, printed = end(driver, tmp_path)
    assert "died (" in printed and found == undisturbed
    assert paid_twice(tmp_path) <= 1, "each node had one worker"
    check_log(tmp_path)


def test_the_driver_is_killed(head, node, undisturbed, tmp_path):
    driver = begin(head, tmp_path)
    has_begun(driver, tmp_path)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and not (tmp_path / "front.json").exists()
    found, _ = end(begin(head, tmp_path), tmp_path)
    assert found == undisturbed
    assert paid_twice(tmp_path) <= WORKERS
    check_log(tmp_path)


def test_an_evaluation_hangs(head, node, undisturbed, tmp_path):
    found, printed = end(begin(head, tmp_path, "hangs once"), tmp_path)
    assert "hung, 1 of 2 times" in printed and found == undisturbed
    assert paid_twice(tmp_path) == 1
    check_log(tmp_path)


def test_a_candidate_crashes(head, node, tmp_path):
    (tmp_path / "serial").mkdir()
    alone = hunt(SERIAL, tmp_path / "serial", "crashes", pause_s=0.0)
    (tmp_path / "wide").mkdir()
    found, printed = end(begin(head, tmp_path / "wide", "crashes"), tmp_path / "wide")
    assert found == alone
    assert found["evaluations"] == BUDGET and "RuntimeError: cannot begin at 80" in found["failures"]
    assert "a candidate failed: RuntimeError: cannot begin at 80" in printed
    failed = len(calls(tmp_path / "wide", "begins")) - len(calls(tmp_path / "wide", "ends"))
    assert failed > 0
    check_log(tmp_path / "wide", failed)
