"""A folder as a Ray job: shipped to a standing cluster, run inside it, its log brought home."""

import asyncio
import logging
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from tasks.core.cluster import RAY_ENV, in_short

CONNECT_S = 20.0


def submit(address: str, entrypoint: str, folder: Path, left_out: tuple[str, ...]) -> str:
    """Ship `folder` without what is `left_out` (patterns as in .gitignore) and start `entrypoint`, a shell command, in it.

    address: of the cluster's dashboard, http(s)://host:port. -> the job's id. Raises ValueError in one line when there is no
    such dashboard, or it does not accept this user's token; then nothing was started.
    """
    check_answers(address)
    client = connect(address)
    room = {"working_dir": str(folder.resolve()), "excludes": list(left_out)}
    try:
        return client.submit_job(entrypoint=entrypoint, runtime_env=room)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"--address: {address}: {in_short(error)}") from None


def shipped(folder: Path, left_out: tuple[str, ...]) -> set[Path]:
    """The files of `folder` that travel: Ray leaves out `left_out`, and what a .gitignore or .rayignore at any depth names."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
    found: set[Path] = set()
    _dir_travel(folder, [_get_excludes(folder, list(left_out))], lambda path: path.is_dir() or found.add(path),
                include_gitignore=True, logger=logging.getLogger(__name__))
    return found


def check_answers(address: str) -> None:
    """Ray's client has no time limit of its own."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--address: {address!r} is not http://host:port of a Ray dashboard")
    try:
        socket.create_connection((parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]), CONNECT_S).close()
    except OSError as error:
        raise ValueError(f"--address: {address}: no Ray dashboard answers there within {CONNECT_S:g} s ({error})") from None


def connect(address: str):
    for key, value in RAY_ENV.items():  # the token is read when ray is imported
        os.environ.setdefault(key, value)
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient
    try:
        return JobSubmissionClient(address)
    except (RayError, RuntimeError, OSError) as error:
        raise ValueError(f"--address: {address}: {in_short(error)}") from None


def follow(address: str, job: str) -> bool:
    """Print the job's log until it ends. -> whether it succeeded. Whoever stops following leaves the job at work."""
    from ray.job_submission import JobStatus
    client = connect(address)

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(tail())
    return client.get_job_status(job) == JobStatus.SUCCEEDED
