"""A process that works for another one ends when the other one does, however that ended.

SIGKILL and the out-of-memory killer let nothing unwind, and what was started goes on: a stage computes for a run that is gone,
and meets the next one in its folder. So whoever works for another process holds a lifeline to it and looks twice a second.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

import psutil

MASTER = "DIFFPRESS_MASTER"  # in the environment: the process that the reader works for, by its number
LOOK_S = 0.5
GRACE_S = 8.0                # between asking processes to end and killing them


def hold(end: Callable[[], None]) -> None:
    """Call `end` in a thread of its own once a process that this one works for is gone; it may be gone already."""
    masters = [find(int(os.environ[MASTER]))] if os.environ.get(MASTER, "").isdigit() else []
    if "DVC_STAGE" in os.environ:  # `dvc repro` without a flow sets that, too
        masters += dvc_above()
    if masters:
        threading.Thread(target=watch, args=(masters, end), daemon=True, name="lifeline").start()


def watch(masters: list[psutil.Process | None], end: Callable[[], None]) -> None:
    while not any(gone(master) for master in masters):
        time.sleep(LOOK_S)
    end()


def find(pid: int) -> psutil.Process | None:
    """The process `pid` among those that this one descends from; another one of that number came later."""
    return next((process for process in psutil.Process().parents() if process.pid == pid), None)


def dvc_above() -> list[psutil.Process]:
    """Of the processes that this one descends from, the nearest Python: a shell may stand between a stage and DVC."""
    with contextlib.suppress(psutil.Error):
        return [process for process in psutil.Process().parents() if "python" in process.name() or process.name() == "dvc"][:1]
    return []


def gone(process: psutil.Process | None) -> bool:
    try:
        return process is None or not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def end_myself() -> None:
    """SIGTERM, which unwinds; where that takes too long, SIGKILL, for what this process started as well."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    started = psutil.Process().children(recursive=True)
    for process in [*started, psutil.Process()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def end_my_group() -> None:
    """For the leader of a process group: end all others of it, and itself where it does not end with them."""
    stop(os.getpid(), GRACE_S, spared=os.getpid())
    time.sleep(GRACE_S)
    os.killpg(os.getpid(), signal.SIGKILL)


def stop(group: int, grace_s: float, spared: int | None = None) -> None:
    """SIGTERM to every process of a group, `grace_s` to tidy up, SIGKILL to those that are left."""
    started, asked = time.monotonic(), set()
    while left := set(members(group)) - {spared}:
        waited = time.monotonic() - started
        if waited > grace_s + LOOK_S:
            return  # killed, and the system has yet to take them
        if waited > grace_s:
            signal_all(left, signal.SIGKILL)
        signal_all(left - asked, signal.SIGTERM)
        asked |= left
        time.sleep(0.05)


def signal_all(processes: set[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def members(group: int) -> list[int]:
    """The processes of a group that are alive; ended ones that nobody collected do not count."""
    found = []
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found
