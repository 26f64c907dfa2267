"""The folder as a Ray job of a real cluster: what travels, what does not, whose token counts, what comes home."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from tasks.core.params import resolve
from tests.contract.reading import tracked
from tests.faults.raylets import ROOT, Raylet, environment, free_port

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
def head(tmp_path_factory):
    """As infra/README.md starts one that serves its own machine alone; a job's `python` is that of the head's PATH."""
    port, dashboard, agent = free_port(), free_port(), free_port()  # the agent's default port may be another Ray's
    own = environment(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", PATH=os.pathsep.join([str(Path(sys.executable).parent),
                                                                                 os.environ["PATH"]]))
    own.pop("PYTHONPATH")  # what a job has came with it
    raylet = Raylet("--head", f"--port={port}", "--include-dashboard=true", f"--dashboard-port={dashboard}",
                    f"--dashboard-agent-listen-port={agent}", room=tmp_path_factory.mktemp("head"), environment=own)
    raylet.dashboard = f"http://127.0.0.1:{dashboard}"
    yield raylet
    raylet.stop()


@pytest.fixture
def dashboard(head):
    """-> the address of a head's dashboard."""
    return head.dashboard


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


@pytest.mark.slow
def test_a_head_of_one_machine_listens_on_the_loopback_only(head):
    """`--node-ip-address 127.0.0.1` would not do: Ray 2.60 listens on all addresses then, too."""
    addresses = {connection.laddr.ip for process in head.tree() for connection in process.net_connections("inet")
                 if connection.status == psutil.CONN_LISTEN}
    assert addresses and all(address.removeprefix("::ffff:").startswith("127.") or address == "::1" for address in addresses)


MINIATURE = {  # of everything that takes time; nothing of it is good
    "cluster": {"workers": 1, "connect_timeout_s": 300.0},
    "data": {"source": "digits", "epochs": 1, "holdout": 100},
    "pretrain_load": {"bank": 10, "bank_steps": 2},
    "profile": {"repeats": 3},
    "mask_search": {"images": 2, "steps": 2, "inputs": 4, "densities": [0.5]},
    "solver_learn": {"evaluations": [2], "noises": 8, "held": 4, "teacher": {"steps": 3}, "steps": 1, "batch": 2},
    "distill": {"steps": 2, "warmup": 1, "batch": 4, "holdout": 4, "few_steps": {"evaluations": [2], "held": 4, "steps": 0}},
    "finish": {"steps": 0, "held": 4},
    "cache_learn": {"base_steps": 4, "grid": 4, "error_samples": 2, "max_gap": 2, "validation": 2,
                    "router": {"steps": 2, "batch": 2}, "refine": {"images": 2, "tries": 0},
                    "weights": {"steps": 1, "batch": 2}},
    "evolve": {"evaluations": 3, "single_evaluations": 1, "lookahead": 2, "steps": [4, 6], "finals": {"images": 0},
               "protocol": {"images": 2, "chunk": 2, "calibration_images": 32, "calibration_steps": 4}}}
UNTIL_EVOLVE = ("data", "pretrain_load", "profile", "mask_search", "solver_learn", "distill", "cache_learn", "evolve")


def committed_params() -> dict:
    """Not as a user may have changed them."""
    return yaml.safe_load(subprocess.check_output(["git", "show", "HEAD:params.yaml"], cwd=ROOT))


def merge(block: dict, other: dict) -> dict:
    return block | {key: merge(block[key], value) if isinstance(value, dict) else value for key, value in other.items()}


def clone(room: Path, store: Path) -> Path:
    """This repository, as git knows it, with small numbers and a DVC remote; nothing was run in it."""
    for path in tracked():
        (room / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, room / path.relative_to(ROOT))
    params = resolve(committed_params(), "quick")
    (room / "params.yaml").write_text(yaml.safe_dump(merge(params, MINIATURE), sort_keys=False))
    with (room / ".dvc/config").open("a") as config:
        config.write(f"    remote = store\n['remote \"store\"']\n    url = {store}\n")
    subprocess.run(["git", "init", "-q"], cwd=room, check=True)
    return room


@pytest.mark.slow
def test_a_search_outlives_the_laptop_and_comes_home(dashboard, tmp_path):
    own = environment(PREFECT_HOME=str(tmp_path / "prefect"), TMPDIR=str(tmp_path))
    own.pop("PYTHONPATH")
    laptop, home = clone(tmp_path / "laptop", tmp_path / "store"), clone(tmp_path / "home", tmp_path / "store")
    command = [sys.executable, "-m", "flows.search", "--address", dashboard]
    with subprocess.Popen(command, cwd=laptop, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sent:
        lines = []
        for line in sent.stdout:
            lines.append(line)
            if "data: done" in line:
                break
        assert sent.poll() is None, "".join(lines)
        sent.kill()
    job = next(line.split(":")[0] for line in lines if ": submitted;" in line)
    code = f"from tasks.core.ray_job import follow; print('succeeded' if follow({dashboard!r}, {job!r}) else 'failed')"
    done = subprocess.run([sys.executable, "-c", code], cwd=laptop, env=own, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "succeeded", done.stdout + done.stderr
    assert "bring it home" in done.stdout

    subprocess.run([sys.executable, "-m", "dvc", "fetch", "-q", "--run-cache"], cwd=home, env=own, check=True)
    done = subprocess.run(command[:3], cwd=home, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh = [line for line in done.stdout.splitlines() if line.endswith(": fresh")]
    assert fresh == [f"{stage}: fresh" for stage in UNTIL_EVOLVE]
    assert " done in " not in done.stdout and (home / "artifacts/evolve/manifest.json").exists()


def test_the_flow_refuses_a_params_file_that_names_another_cluster(tmp_path):
    """A job runs inside of its cluster; with the address of a head, its driver would join that one."""
    params = committed_params()
    params["cluster"]["address"] = "head:6379"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    done = subprocess.run([sys.executable, "-m", "flows.search", "--address", "http://127.0.0.1:1"], cwd=tmp_path, text=True,
                          env=environment(), capture_output=True, check=False, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == ("error: params.yaml: cluster.address: head:6379, but a job runs inside of its "
                                            "cluster: write auto or null")
