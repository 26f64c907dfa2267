"""Addresses at which no job can be started: one line, in seconds. A job that runs is in tests/faults."""

import time

import pytest

from tasks.core import ray_job
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
