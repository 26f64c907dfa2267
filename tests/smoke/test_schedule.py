"""Schedules really fire: a Prefect server, the project's own deployment file, and scheduled runs that exist afterwards.

With SQLAlchemy 2.1 the deployment shows as READY and no run is ever created; with FastAPI 0.155 the server does not start.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PREFECT = [sys.executable, "-m", "prefect"]

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(what, timeout_s: float, every_s: float = 1.0):
    """The first truthy answer of `what`; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if answer := what():
                return answer
        except httpx.TransportError:
            pass
        time.sleep(every_s)
    raise AssertionError(f"nothing after {timeout_s} s")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """-> (client of its API, the environment of a CLI that talks to it)."""
    home, port = tmp_path_factory.mktemp("prefect"), free_port()
    url = f"http://127.0.0.1:{port}/api"
    env = {**os.environ, "PREFECT_HOME": str(home), "PREFECT_PROFILE": "ephemeral"}
    start = [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (open(home / "server.log", "w") as log, httpx.Client(base_url=url, timeout=30) as client,
          subprocess.Popen(start, env=env, stdout=log, stderr=subprocess.STDOUT) as process):
        try:
            wait_for(lambda: client.get("/health").status_code == 200, 180)
            yield client, {**env, "PREFECT_API_URL": url}
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def deployed(server):
    client, env = server
    for command in (["work-pool", "create", "diffpress", "--type", "process"],
                    ["--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"]):
        done = subprocess.run([*PREFECT, *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return client


def test_the_nightly_schedule_creates_runs(deployed):
    nightly = deployed.get("/deployments/name/nightly/nightly").json()
    asked = {"deployments": {"id": {"any_": [nightly["id"]]}}, "sort": "EXPECTED_START_TIME_ASC"}
    runs = wait_for(lambda: deployed.post("/flow_runs/filter", json=asked).json(), 120)
    assert {run["state_type"] for run in runs} == {"SCHEDULED"}
    assert runs[0]["expected_start_time"][11:16] == "01:00"


def test_no_folder_of_this_machine_is_baked_in(deployed):
    for flow, name in (("nightly", "nightly"), ("compress", "on-demand")):
        deployment = deployed.get(f"/deployments/name/{flow}/{name}").json()
        assert str(ROOT) not in str(deployment)
        assert "{{ $DIFFPRESS_CHECKOUT }}" in str(deployment["pull_steps"])


def test_the_second_run_waits(deployed):
    deployment = deployed.get("/deployments/name/compress/on-demand").json()
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
