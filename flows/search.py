"""The search alone, for a cluster that stands: `evolve` and what it needs, nothing after it.

`python -m flows.search` on a node of the cluster with `cluster: {address: auto}` in params.yaml (infra/README.md): the driver
runs inside the cluster, and finished evaluations are never paid twice, so it may be stopped and started at will.
`python -m flows.search --address http://HEAD:8265` from anywhere else ships this folder there as a Ray job that does the same,
and shows its log. The DVC remote, if there is one, gives the job what is computed already, and takes what it finds.
"""

from flows import ending

if __name__ == "__main__":
    ending.heed()  # before the imports that take seconds

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from prefect import flow
from prefect.states import State

from flows import freshness, shipping
from flows.compress import STAGE_TIMEOUT_H, compress, main
from tasks.core.cluster import INSIDE
from tasks.core.params import PARAMS_FILE, validate_all
from tasks.core.ray_job import follow, submit

LAST = "evolve"
LEFT_OUT = ("/artifacts/", "/runs/", "/.venv/", "/.git/", "/.dvc/cache/", "/.dvc/tmp/", "/.dvc/config.local", "__pycache__/",
            ".*_cache/")
HOME = "`dvc fetch --run-cache` and `make run` bring it home"


@flow(name="search", validate_parameters=False)
def search(scale: str | None = None, stage_timeout_h: float = STAGE_TIMEOUT_H) -> State:
    return compress(scale, LAST, stage_timeout_h, return_state=True)


def send(address: str, arguments: list[str]) -> int:
    """The search as a job of the cluster whose dashboard is at `address`. -> exit status."""
    params = validate_all()
    if (named := params["cluster"]["address"]) not in (None, "auto"):
        raise ValueError(f"{PARAMS_FILE}: cluster.address: {named}, but a job runs inside of its cluster: write auto or null")
    freshness.check_paths(params)
    shipping.check(params, LAST, LEFT_OUT)
    if not freshness.has_remote():
        print("no DVC remote is configured (dvc remote add -d NAME URL): the job computes everything itself, and what it finds "
              "stays on the cluster", flush=True)
    job = submit(address, shlex.join(["python", "-m", "flows.search", "--job", *arguments]), Path("."), LEFT_OUT)
    print(f"{job}: submitted; `ray job logs {job}` shows it again, `ray job stop {job}` ends it", flush=True)
    with ending.heeded(f"{job}: goes on without us"):
        return 0 if follow(address, job) else 1


def work(arguments: list[str]) -> int:
    """The job's own part, in the folder as it was shipped: without history, cache and artifacts. -> exit status."""
    os.environ[INSIDE] = "auto"
    subprocess.run([sys.executable, "-m", "dvc", "config", "--local", "core.no_scm", "true"], check=True)
    there = freshness.has_remote()
    if there:
        freshness.exchange("fetch", "--run-cache")
        freshness.exchange("checkout", "--allow-missing")
    status = main(arguments, until=LAST)
    if there and status in (0, 1):  # a search that failed has finished some stages, too
        try:
            freshness.exchange("push", "--run-cache")
        except RuntimeError as error:
            raise RuntimeError(f"what the search has found stays here: {error}") from error
        print(f"pushed to the DVC remote: {HOME}", flush=True)
    return status


def entry(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.search", description="Search; nothing after it.",
                                     epilog="Everything else as in python -m flows.compress --help.")
    parser.add_argument("--address", metavar="URL", help="of a Ray dashboard: search there, as a job")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    asked, rest = parser.parse_known_args(arguments)
    try:
        if asked.address is None:
            return work(rest) if asked.job else main(rest, until=LAST)
        return send(asked.address, rest)
    except (ValueError, RuntimeError) as error:  # of what was asked; of DVC's remote
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


if __name__ == "__main__":
    sys.exit(entry(sys.argv[1:]))
