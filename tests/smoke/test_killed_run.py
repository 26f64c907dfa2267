"""A run that was killed under a worker: the server calls it Crashed within the time that infra/automations.yaml says, and the
next run of the same deployment, which waits for its slot, starts."""

import os
import signal
import subprocess
import time

import psutil
import pytest
import yaml

from tests.smoke.test_schedule import PREFECT, ROOT, server, wait_for  # noqa: F401 -- a fixture

pytestmark = pytest.mark.slow

FLOW = """
import os, time
from prefect import flow

@flow
def compress():
    with open("at_work", "a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)
"""
SOON_S = 120 + 30 + 30  # of the automation, of a heartbeat, and for the server to look


@pytest.fixture
def clone(server, tmp_path):  # noqa: F811
    """-> (client, environment, folder): deployed as infra/ says, but for what the flow does."""
    client, env = server
    config = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())
    deployment = next(d for d in config["deployments"] if d["entrypoint"] == "flows/compress.py:compress")
    config["deployments"] = [deployment | {"entrypoint": "flow.py:compress"}]
    (tmp_path / "flow.py").write_text(FLOW)
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump(config))
    env |= {"DIFFPRESS_CHECKOUT": str(tmp_path)}
    for command in (["work-pool", "create", "diffpress", "--type", "process", "--overwrite"],
                    ["--no-prompt", "deploy", "--all"],
                    ["automation", "create", "--from-file", str(ROOT / "infra/automations.yaml")]):
        done = subprocess.run([*PREFECT, *command], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    yield client, env, tmp_path
    for line in (tmp_path / "at_work").read_text().split():
        if psutil.pid_exists(int(line)):
            os.kill(int(line), signal.SIGKILL)


def test_a_killed_run_has_crashed_and_the_next_one_starts(clone):
    client, env, folder = clone
    start = [*PREFECT, "worker", "start", "--pool", "diffpress"]
    deployment = client.get("/deployments/name/compress/on-demand").json()["id"]
    first = client.post(f"/deployments/{deployment}/create_flow_run", json={}).json()["id"]
    with open(folder / "log", "w") as log, subprocess.Popen(start, cwd=folder, env=env, stdout=log, stderr=log) as worker:
        wait_for((folder / "at_work").exists, 300)
        os.kill(int((folder / "at_work").read_text()), signal.SIGKILL)
        worker.kill()
        killed = time.monotonic()
    assert client.get(f"/flow_runs/{first}").json()["state_type"] == "RUNNING"
    second = client.post(f"/deployments/{deployment}/create_flow_run", json={}).json()["id"]
    with open(folder / "log", "w") as log, subprocess.Popen(start, cwd=folder, env=env, stdout=log, stderr=log) as worker:
        try:
            wait_for(lambda: client.get(f"/flow_runs/{first}").json()["state_type"] == "CRASHED", SOON_S)
            assert time.monotonic() - killed > 60, "the automation said so, not the worker"
            wait_for(lambda: client.get(f"/flow_runs/{second}").json()["state_type"] == "RUNNING", 120)
        finally:
            worker.kill()
