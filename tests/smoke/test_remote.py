"""What travels: the folder that becomes a job, with all that the search reads; and results, to the DVC remote and home."""

import os
import shutil
import subprocess
import sys

import pytest
from prefect.logging import disable_run_logger

from flows import freshness, search, shipping, stages
from tasks.core.ray_job import shipped

PIPELINE = """
stages:
  data:
    cmd: python data.py
    deps: [data.py, my/images]
    outs: [artifacts/data]
    metrics: [reports/data.json]
  evolve:
    cmd: python evolve.py
    deps: [artifacts/data, evolve.py]
    outs: [artifacts/evolve]
    metrics: [reports/evolve.json]
"""
STAGE = """
import pathlib, sys
for name in ("artifacts/{0}", "reports"):
    pathlib.Path(name).mkdir(parents=True, exist_ok=True)
pathlib.Path("artifacts/{0}/x").write_text("{0}")
pathlib.Path("reports/{0}.json").write_text('{{"of": "{0}"}}')
print("paid for {0}")
"""
PARAMS = {"data": {"path": "my/images", "inception": None}, "pretrain_load": {"path": "data.py"}}


def dvc(*command: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *command, "-q"], check=True)


@pytest.fixture
def laptop(tmp_path, monkeypatch):
    """A repository with a remote; nothing was run in it."""
    home = tmp_path / "laptop"
    for path, text in {"dvc.yaml": PIPELINE, "data.py": STAGE.format("data"), "evolve.py": STAGE.format("evolve"),
                       "my/images/0.txt": "an image", ".gitignore": "/artifacts/\n/runs/\n",
                       ".dvc/.gitignore": "/cache\n/tmp\n",
                       ".dvc/config": f"[core]\n    analytics = false\n    remote = store\n"
                                      f"['remote \"store\"']\n    url = {tmp_path / 'store'}\n"}.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        (home / path).write_text(text)
    monkeypatch.chdir(home)
    subprocess.run(["git", "init", "-q"], check=True)
    monkeypatch.setattr(stages, "publish", lambda stage: None)
    with disable_run_logger():
        yield home


def test_results_come_home_through_the_remote_and_one_that_is_away_costs_a_line(laptop, tmp_path, capfd):
    dvc("repro")
    freshness.exchange("push", "--run-cache")
    for computed in ("artifacts", ".dvc/cache", ".dvc/tmp", "reports"):
        shutil.rmtree(laptop / computed)
    (laptop / "dvc.lock").unlink()
    dvc("fetch", "--run-cache")
    assert freshness.to_run(freshness.dag()) == {"data", "evolve"}
    assert stages.run_stage.fn("data", 60.0).name == "Cached"
    assert (laptop / "artifacts/data/x").read_text() == "data"
    assert (laptop / "reports/data.json").read_text() == '{"of": "data"}'
    shutil.rmtree(tmp_path / "store")
    assert stages.run_stage.fn("evolve", 60.0).name == "Completed"


@pytest.mark.parametrize("place", [".gitignore", "my/.gitignore", "my/images/.rayignore"])
def test_data_that_would_stay_behind_is_named(laptop, place):
    shipping.check(PARAMS, "evolve", search.LEFT_OUT)
    (laptop / place).write_text("*.txt\n")
    with pytest.raises(ValueError, match=r"params.yaml: data.path: 'my/images': my/images/0.txt would stay behind, since"):
        shipping.check(PARAMS, "evolve", search.LEFT_OUT)


def test_data_that_dvc_has_comes_from_the_remote_once_it_is_there(laptop, tmp_path):
    dvc("add", "my/images")
    with pytest.raises(ValueError, match="my/images is not in the DVC remote, where the job takes it from; dvc push my/images"):
        shipping.check(PARAMS, "evolve", search.LEFT_OUT)
    dvc("push", "my/images.dvc")
    shipping.check(PARAMS, "evolve", search.LEFT_OUT)
    (laptop / "my/images/1.txt").write_text("another one")
    with pytest.raises(ValueError, match="my/images has changed since it was added to DVC"):
        shipping.check(PARAMS, "evolve", search.LEFT_OUT)
    (laptop / "my/images/1.txt").unlink()
    (laptop / ".dvc/config").write_text("[core]\n    analytics = false\n")
    with pytest.raises(ValueError, match="only DVC has my/images, and there is no DVC remote"):
        shipping.check(PARAMS, "evolve", search.LEFT_OUT)


def test_a_file_outside_of_the_folder_is_named(laptop, tmp_path):
    (tmp_path / "inception.pt").write_text("x")
    asked = PARAMS | {"data": {"path": "my/images", "inception": "../inception.pt"}}
    with pytest.raises(ValueError, match=r"data.inception: '../inception.pt' lies outside of this folder"):
        shipping.check(asked, "evolve", search.LEFT_OUT)


@pytest.mark.parametrize("name, config, said", [
    ("config.local", "[core]\n    remote = other\n['remote \"other\"']\n    url = s3://bucket/x\n", "does not travel"),
    ("config", "[core]\n    remote = store\n['remote \"store\"']\n    url = ../../store\n", "is a path relative to here")])
def test_a_remote_that_the_job_would_not_know_is_refused(laptop, name, config, said):
    (laptop / ".dvc" / name).write_text(config)
    with pytest.raises(ValueError, match=said):
        shipping.check(PARAMS, "evolve", search.LEFT_OUT)


def test_what_travels_is_what_ray_packs(laptop, tmp_path):
    """Its own package of the same folder, with links and ignore files at all depths."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package
    (laptop / "my/elsewhere").mkdir()
    (laptop / "my/elsewhere/a.txt").write_text("a")
    os.symlink(laptop / "my/elsewhere", laptop / "my/images/link")
    (laptop / "my/images/.gitignore").write_text("b*\n!b1.txt\n")
    for name in ("b0.txt", "b1.txt"):
        (laptop / "my/images" / name).write_text(name)
    create_package(str(laptop), tmp_path / "packed.zip", include_gitignore=True, excludes=list(search.LEFT_OUT))
    packed = {name for name in zipfile.ZipFile(tmp_path / "packed.zip").namelist() if not name.endswith("/")}
    assert {file.relative_to(laptop).as_posix() for file in shipped(laptop, search.LEFT_OUT)} == packed
    assert "my/images/link/a.txt" in packed and "my/images/b0.txt" not in packed and ".git/HEAD" not in packed
