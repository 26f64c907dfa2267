"""A cluster of two raylets on loopback."""

import pytest

from tests.faults.raylets import Raylet, environment, free_port


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """-> the address of a Ray head of one CPU."""
    address = f"127.0.0.1:{free_port()}"
    raylet = Raylet("--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false",
                    room=tmp_path_factory.mktemp("head"), environment=environment())
    yield address
    raylet.stop()


@pytest.fixture
def start_node(head, tmp_path_factory):
    """A function that starts a further raylet of one CPU, with more variables in its environment."""
    started = []

    def start(**variables: str) -> Raylet:
        started.append(Raylet(f"--address={head}", room=tmp_path_factory.mktemp("node"), environment=environment(**variables)))
        return started[-1]

    yield start
    for raylet in started:
        raylet.stop()


@pytest.fixture
def node(start_node):
    return start_node()
