"""Is there a Ray cluster at an address, and do its nodes have this process's versions? `python -m tasks.core.ray_probe ADDRESS`

A process of its own, because Ray waits a minute and more for an address where nobody answers, and may abort the process.
Prints REACHED once there is a connection; exits with 1 and the reason as the last line of what it prints, if there is none or
if versions differ.
"""

import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tasks.core import serial
from tasks.core.cluster import REACHED, in_short

NODES_S = 15.0  # for all nodes to answer; who does not is asked again when a worker starts there


def probe(address: str) -> list[str]:
    """-> a line for every node whose versions differ. What Ray raises is raised."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    print(REACHED, flush=True)
    ray.cloudpickle.register_pickle_by_value(serial)  # the nodes may not have the code yet
    wanted, asked = serial.versions(), {}
    for node in (node for node in ray.nodes() if node["Alive"]):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        versions = ray.remote(serial.versions).options(num_cpus=0, scheduling_strategy=there)
        asked[versions.remote()] = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=NODES_S)
    said = [serial.mismatch(asked[ref], found, wanted) for ref in answered if (found := answer(ref))]
    return [line for line in said if line]


def answer(ref) -> dict | None:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError:  # the node went meanwhile
        return None


if __name__ == "__main__":
    try:
        complaints = probe(sys.argv[1])
    except Exception as error:  # Ray raises bare ones, of several lines
        complaints = [in_short(error)]
    if complaints:
        print(complaints[0], flush=True)
        sys.exit(1)
