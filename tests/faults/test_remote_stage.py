"""A whole stage on another node of a real Ray cluster: folders travel, and a dead node costs what came after its checkpoint."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from tests.faults.raylets import environment
from tests.faults.test_cluster_faults import SERIAL

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


@pytest.mark.slow
def test_a_stage_goes_on_elsewhere_when_its_node_dies(head, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "words.txt").write_text("travelled")
    params = json.dumps(asdict(replace(SERIAL, address=head, connect_timeout_s=120.0)))
    done = subprocess.run([sys.executable, "-c", DRIVER, params], cwd=tmp_path, env=environment(), capture_output=True,
                          text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert json.loads(lines[-1]) == {"resumed_at": 7, "threads": 1, "home": False}
    assert any("faults: its node died" in line for line in lines)
    assert (tmp_path / "out" / "deep" / "copy.txt").read_text() == "travelled"
    assert len(list((tmp_path / "runs" / "checkpoints" / "remote").iterdir())) == 1
