"""The folder as a Ray job of a real cluster: what travels, what does not, whose token counts."""

import subprocess
import sys

import pytest

from tests.faults.raylets import Raylet, environment, free_port

SUBMIT = """
import sys
from pathlib import Path
from tasks.core.ray_job import follow, submit
from flows.search import LEFT_OUT
try:
    job = submit(sys.argv[1], sys.argv[2], Path("."), LEFT_OUT)
    print("succeeded" if follow(sys.argv[1], job) else "failed")
except ValueError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory):
    """-> the address of a head's dashboard."""
    port, dashboard, agent = free_port(), free_port(), free_port()  # the agent's default port may be another Ray's
    raylet = Raylet("--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}",
                    f"--dashboard-agent-listen-port={agent}", room=tmp_path_factory.mktemp("head"), environment=environment())
    yield f"http://127.0.0.1:{dashboard}"
    raylet.stop()


@pytest.fixture
def folder(tmp_path):
    """Of a repository as it stands after a run."""
    for path in ("params.yaml", "tasks/core/artifacts.py", ".dvc/config", ".dvc/cache/x", ".dvc/tmp/x", ".dvc/config.local",
                 "artifacts/x", "runs/x", ".venv/x", ".git/x", "tasks/__pycache__/x"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    return tmp_path


def send(folder, address: str, command: str, **variables: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", SUBMIT, address, command], cwd=folder, env=environment(**variables),
                          capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_a_job_sees_the_code_and_nothing_that_was_computed(dashboard, folder):
    *log, last = send(folder, dashboard, "find . -type f | sort; echo ready; exit 0")
    assert last == "succeeded"
    assert [line for line in log if line.startswith("./")] == ["./.dvc/config", "./params.yaml", "./tasks/core/artifacts.py"]


@pytest.mark.slow
def test_a_job_that_fails_is_said_to(dashboard, folder):
    *log, last = send(folder, dashboard, "echo no luck; exit 3")
    assert last == "failed" and any("no luck" in line for line in log)


@pytest.mark.slow
def test_another_token_is_refused_in_one_line(dashboard, folder):
    (said,) = send(folder, dashboard, "true", RAY_AUTH_TOKEN="8" * 64)
    assert said.startswith(f"refused: --address: {dashboard}: ")


def test_the_flow_refuses_a_params_file_that_would_leave_the_cluster_idle():
    """cluster.address is null in the file that ships: the job would search on one node, in a Ray of its own."""
    done = subprocess.run([sys.executable, "-m", "flows.search", "--address", "http://127.0.0.1:1"], text=True,
                          env=environment(), capture_output=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: params.yaml: cluster.address: null, but a job runs inside of its cluster: "
                                            "write auto")
