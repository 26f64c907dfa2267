"""The files that no test can start are at least what their readers expect."""

import json
import re
import shutil
import subprocess
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from tests.contract.reading import ROOT

INFRA = ROOT / "infra"


def test_vm_launcher_follows_rays_schema():
    import jsonschema
    schema = json.loads(files("ray.autoscaler").joinpath("ray-schema.json").read_text())
    launcher = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    assert [error.message for error in jsonschema.validators.validator_for(schema)(schema).iter_errors(launcher)] == []


def test_every_ray_start_is_authenticated():
    launcher = yaml.safe_load((INFRA / "ray-cluster.yaml").read_text())
    starts = [c for key in ("head_start_ray_commands", "worker_start_ray_commands") for c in launcher[key] if "ray start" in c]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in c for c in starts)


def test_ray_job_ends_with_its_cluster_and_runs_its_driver_inside():
    claim, job = yaml.safe_load_all((INFRA / "kuberay.yaml").read_text())
    cluster = job["spec"]["rayClusterSpec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert claim["metadata"]["name"] in str(cluster["headGroupSpec"])


def test_compose_listens_on_loopback_only():
    services = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)
    assert set(services) == {"database", "server", "worker"}


def test_deployments_bake_in_no_folder_and_run_one_at_a_time():
    config = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    assert "{{ $DIFFPRESS_CHECKOUT }}" in str(config["pull"])
    for deployment in config["deployments"]:
        path, _, name = deployment["entrypoint"].partition(":")
        assert f"def {name}(" in (ROOT / path).read_text()
        assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}


def test_constraints_pin_every_direct_dependency_exactly():
    pins = (ROOT / "constraints.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    names = [re.match(r"[\w.-]+", requirement)[0] for requirement in asked]
    pinned = {line.partition("==")[0].lower() for line in pins.splitlines() if "==" in line and not line.startswith("#")}
    assert {name.lower() for name in names} <= pinned
    assert not re.search(r"^[^#].*(\+|@|-e )", pins, flags=re.MULTILINE)


def test_ci_runs_what_a_developer_runs():
    script = (ROOT / ".ci/run").read_text()
    assert "set -euo pipefail" in script and "make test" in script
    assert subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=False).returncode == 0
    assert ".ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()


def ci_run(folder: Path, makefile: str) -> subprocess.CompletedProcess:
    """`.ci/run nightly` of a small repository whose `make` does what is said."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci/run")
    (folder / "Makefile").write_text(makefile)
    (folder / "dvc.lock").write_text("1")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return subprocess.run(["bash", folder / ".ci/run", "nightly"], capture_output=True, text=True, check=False)


def test_the_two_commands_run_in_both_orders_each_in_a_clone(tmp_path):
    log = tmp_path / "log"
    (tmp_path / "source").mkdir()
    made = f"run test:\n\t@echo $@ $(notdir $(CURDIR)) >> {log}; echo 2 > dvc.lock\n"
    done = ci_run(tmp_path / "source", made)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [f"{target} {order}" for order, targets in (
        ("run-then-test", ("run", "test")), ("test-then-run", ("test", "run"))) for target in targets]


@pytest.mark.parametrize("makefile, said", [
    ("run test:\n\t@touch left\n", "error: make run changed more than dvc.lock: ?? left"),
    ("run:\n\t@true\ntest:\n\t@exit 3\n", "Error 3")])
def test_what_a_command_leaves_or_fails_with_fails_the_night(tmp_path, makefile, said):
    done = ci_run(tmp_path, makefile)
    assert done.returncode and said in done.stderr
