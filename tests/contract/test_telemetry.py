"""Nothing is reported to anybody: what the libraries would send is turned off before they are imported."""

import os
import re
import subprocess
import sys

import yaml

from tests.contract.reading import ROOT

REPORTERS = """
import concurrent.futures, socket, sys
import tasks.runtime.graph
def refuse(*args, **kwargs):
    raise AssertionError(f"something calls home: {args}")
socket.socket.connect = socket.create_connection = concurrent.futures.ThreadPoolExecutor.submit = refuse
import openvino, torch
openvino.convert_model(torch.jit.trace(torch.nn.Linear(2, 3), torch.ones(1, 2)), example_input=torch.ones(1, 2))
from openvino.tools.ovc import convert_impl
print(convert_impl.tm.__name__)
"""


def test_openvino_reports_neither_its_import_nor_a_conversion():
    found = subprocess.run([sys.executable, "-c", REPORTERS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[-1] == "openvino.tools.ovc.telemetry_stub"


def test_prefect_commands_at_the_top_of_a_clone_report_nothing_and_listen_here_only(tmp_path):
    """As prefect itself reads its settings: no variable is needed, and one that says otherwise is the user's own word."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "DO_NOT_TRACK"))}
    bare["PREFECT_HOME"] = str(tmp_path)
    view = [sys.executable, "-m", "prefect", "config", "view", "--show-sources"]
    said = subprocess.run(view, cwd=ROOT, env=bare, capture_output=True, text=True, check=False)
    for line in ("PREFECT_SERVER_ANALYTICS_ENABLED='False'", "PREFECT_SERVER_API_HOST='127.0.0.1'",
                 "PREFECT_FLOWS_HEARTBEAT_FREQUENCY='30'"):
        assert f"{line} (from prefect.toml)" in said.stdout


def test_every_head_and_node_that_is_documented_reports_nothing_and_wants_a_token():
    texts = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "infra").iterdir()]}
    starts = [(name, re.sub(r"\s+", " ", text[max(0, found.start() - 200):found.end()]))
              for name, text in texts.items() for found in re.finditer(r"ray start (?=--)", text)]
    assert len(starts) == 3
    assert all("RAY_AUTH_MODE=token" in start and "RAY_USAGE_STATS_ENABLED=0" in start for _, start in starts)


def test_the_server_gives_a_killed_run_up_after_several_heartbeats():
    """Of every flow that infra/prefect.yaml deploys, and wherever its worker was started."""
    (automation,) = yaml.safe_load((ROOT / "infra/automations.yaml").read_text())["automations"]
    deployments = yaml.safe_load((ROOT / "infra/prefect.yaml").read_text())["deployments"]
    flows = {deployment["entrypoint"].rpartition(":")[2] for deployment in deployments}
    assert flows <= set(automation["trigger"]["match_related"]["prefect.resource.name"])
    for deployment in deployments:
        beat = int(deployment["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * beat < automation["trigger"]["within"]
