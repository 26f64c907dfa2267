"""A node whose packages differ is named before anything runs on it: when the address is tried, and when a worker starts."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import version

import pytest

from tasks.core.serial import check_versions, mismatch, versions
from tests.faults.raylets import ROOT, environment
from tests.faults.test_cluster_faults import SERIAL

OTHER = "9.9.9"
CONNECT = """
import json, sys
from tasks.core.cluster import Cluster, ClusterParams
from tests.faults.jobs import make_product
import tasks.core.cluster
cluster = Cluster(ClusterParams(**json.loads(sys.argv[1])))
if sys.argv[2] == "late":
    tasks.core.cluster.check_reachable = lambda params: None
try:
    cluster.warm_workers(make_product).warm()
    print("two workers are warm")
except ValueError as error:
    print("refused:", error)
"""


def connect(head: str, when: str) -> str:
    """-> the last line of a driver that starts two workers. when: late, if the node came after the address was tried."""
    params = json.dumps(asdict(replace(SERIAL, address=head, workers=2, connect_timeout_s=300.0)))
    done = subprocess.run([sys.executable, "-c", CONNECT, params, when], cwd=ROOT, env=environment(), capture_output=True,
                          text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_a_node_with_another_torch_is_named(head, start_node, tmp_path):
    said = tmp_path / f"torch-{OTHER}.dist-info"
    said.mkdir()
    (said / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {OTHER}\n")
    start_node(PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    line = f"has torch {OTHER} instead of {version('torch')}; constraints.txt is to be installed there, too"
    for when in ("early", "late"):
        refused = connect(head, when)
        assert refused.startswith("refused: ") and refused.endswith(line) and "node " in refused


def test_the_line_names_node_packages_and_both_versions():
    here = {"python": "3.11.4", "torch": "2.13.0", "numpy": "2.4.1"}
    assert mismatch("far", here, here) is None
    assert mismatch("far", here | {"torch": "2.12.0", "numpy": "none"}, here).startswith(
        "cluster: node far has torch 2.12.0 instead of 2.13.0, numpy none instead of 2.4.1;")


def test_this_process_agrees_with_itself_and_with_no_other():
    assert check_versions(versions()) is None
    with pytest.raises(ValueError, match=f"has python .* instead of {OTHER}"):
        check_versions(versions() | {"python": OTHER})
