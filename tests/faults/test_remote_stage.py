"""A whole stage on another node of a real Ray cluster: folders travel, and a dead node costs what came after its checkpoint."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.faults.test_cluster_faults import SERIAL

ROOT = Path(__file__).parents[2]
DRIVER = """
import json, sys
from pathlib import Path
from tasks.core import cluster, ray_run
from tasks.core.artifacts import Inputs
from tests.faults import remote
ray_run.SYNC_S = 0.5
params = cluster.ClusterParams(**json.loads(sys.argv[1]))
home = cluster.Cluster(params)
out = Path("out")
out.mkdir()
inputs = Inputs({"data": Path("data")}, "0123456789abcdef", home, {"cpus": 1})
report = home.run(remote, {"sleep_s": 4.0, "home": str(Path.cwd())}, inputs, out)
print(json.dumps(report.numbers))
"""


@pytest.fixture
def head(tmp_path_factory):
    """A Ray head with one CPU, as `ray start` makes it. -> its address and the environment with its token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64, "PYTHONPATH": str(ROOT)}
    ray = Path(sys.executable).parent / "ray"
    command = [ray, "start", "--head", "--block", "--num-cpus=1", f"--port={port}", "--include-dashboard=false"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               cwd=tmp_path_factory.mktemp("head"))
    yield f"127.0.0.1:{port}", environment
    process.terminate()
    process.wait(30)


@pytest.mark.slow
def test_a_stage_goes_on_elsewhere_when_its_node_dies(head, tmp_path):
    address, environment = head
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("travelled")
    params = json.dumps(asdict(replace(SERIAL, address=address, connect_timeout_s=120.0)))
    done = subprocess.run([sys.executable, "-c", DRIVER, params], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == {"resumed_at": 7, "threads": 1, "home": False}
    assert any("faults: its node died" in line for line in lines)
    assert (tmp_path / "out" / "deep" / "copy.txt").read_text() == "travelled"
    assert len(list((tmp_path / "runs" / "checkpoints" / "remote").iterdir())) == 1
