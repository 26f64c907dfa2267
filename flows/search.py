"""The search alone, for a cluster that stands: `evolve` and what it needs, nothing after it.

`python -m flows.search` on a node of the cluster with `cluster: {address: auto}` in params.yaml (infra/README.md): the driver
runs inside the cluster, and finished evaluations are never paid twice, so it may be stopped and started at will.
"""

import sys

from prefect import flow
from prefect.states import State

from flows.compress import STAGE_TIMEOUT_H, compress, main

LAST = "evolve"


@flow(name="search", validate_parameters=False)
def search(scale: str | None = None, stage_timeout_h: float = STAGE_TIMEOUT_H) -> State:
    return compress(scale, LAST, stage_timeout_h, return_state=True)


if __name__ == "__main__":
    sys.exit(main(until=LAST))
