"""One at a time in one folder: who comes second waits for the first, and says so."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.core.artifacts import RUNS

RUN_LOCK, STAGE_LOCK = RUNS / "run.lock", RUNS / "stage.lock"  # a run of several stages; a stage at work, whoever started it


@contextmanager
def one_at_a_time(path: Path, busy: str, tell: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock file `path`, which ends with this process. busy: told where another process holds it."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(busy)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
