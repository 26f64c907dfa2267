"""Addresses at which no job can be started: one line, in seconds. A job that runs is in tests/faults."""

import time

import pytest
from ray.runtime_env import RuntimeEnv
from ray.runtime_env.runtime_env import _merge_runtime_env

from tasks.core import ray_job
from tasks.core.cluster import ROOT, in_short, to_ship
from tests.faults.raylets import free_port


@pytest.mark.parametrize("address", ["head:8265", "ray://head:10001", "http://"])
def test_an_address_that_is_no_url_is_named(address):
    with pytest.raises(ValueError, match=f"--address: '{address}' is not http://host:port"):
        ray_job.submit(address, "true", None, ())


def test_where_nobody_listens_it_says_so_at_once():
    address, began = f"http://127.0.0.1:{free_port()}", time.monotonic()
    with pytest.raises(ValueError, match=f"--address: {address}: no Ray dashboard answers there") as refused:
        ray_job.submit(address, "true", None, ())
    assert "\n" not in str(refused.value) and time.monotonic() - began < 5


def test_a_host_that_swallows_everything_is_given_up(monkeypatch):
    """TEST-NET-1 (RFC 5737) is routed nowhere."""
    monkeypatch.setattr(ray_job, "CONNECT_S", 0.3)
    with pytest.raises(ValueError, match="--address: http://192.0.2.1:8265: no Ray dashboard answers"):
        ray_job.check_answers("http://192.0.2.1:8265")


OWN, OTHER = f"gcs://{ROOT.name}.zip", "gcs://_ray_pkg_0123456789abcdef.zip"


@pytest.mark.parametrize("job", [{}, {"env_vars": {"A": "1"}}, {"working_dir": OWN, "excludes": ["/runs/"]},
                                 {"working_dir": OTHER, "excludes": ["/data/"]}, {"working_dir": OTHER}, {"pip": ["einops"]}])
def test_what_the_driver_ships_goes_together_with_what_its_job_did(job):
    """By Ray's own rule: a key in both is an error. Either of them brings the code."""
    merged = _merge_runtime_env(RuntimeEnv(**job), RuntimeEnv(**to_ship(job)))
    assert merged is not None
    assert merged.get("working_dir") == OWN or merged["py_modules"] == [str(ROOT / "tasks"), str(ROOT / "flows")]


def test_a_job_with_modules_of_its_own_is_refused():
    with pytest.raises(ValueError, match="this Ray job has py_modules in its runtime environment"):
        to_ship({"py_modules": ["gcs://_ray_pkg_0123456789abcdef.zip"]})


@pytest.mark.parametrize("said, short", [
    ("Package size (600.00MiB) exceeds the maximum size of 512.00MiB. To exclude large files, add them to '.gitignore'",
     "Package size (600.00MiB) exceeds the maximum size of 512.00MiB"),
    ("No module named 'ray.x'\n  File \"a.py\", line 3", "No module named 'ray.x' File \"a.py\", line 3"),
    ("Version 2.60.0 of ray, e.g. of the head, is not ours", "Version 2.60.0 of ray, e.g. of the head, is not ours"),
    ("", "ValueError")])
def test_the_first_sentence_of_what_ray_says_is_passed_on(said, short):
    assert in_short(ValueError(said)) == short


def test_pages_become_a_line():
    """Ray's own message about a conflict, which was two thousand letters."""
    said = f"Failed to merge the Job's runtime env {{'excludes': {['/artifacts/'] * 100}}} with a ray.init's"
    assert len(in_short(ValueError(said))) <= 305 and in_short(ValueError(said)).startswith("Failed to merge the Job's")
