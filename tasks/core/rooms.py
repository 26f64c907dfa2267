"""This process's folder for what is of no use after it: temporary files, Ray's session.

A killed process tidies nothing up. So each room holds a lock that its process keeps, and whoever opens a room of its own
clears those whose lock is free.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from multiprocessing.util import Finalize
from pathlib import Path
from typing import IO

LAST = -1000   # priority of what is done when a process ends; multiprocessing removes its own folders at -100
LONGEST = 40  # letters of a room's path: Ray's sockets lie 62 deeper, and a socket's path has at most 107


@functools.cache
def own_room() -> Path:
    """Made by the first call in a process, removed when the process ends."""
    base = shared()
    clear(base)
    new = Path(tempfile.mkdtemp(prefix="new-", dir=base))
    lock = open(new / "lock", "w")  # noqa: SIM115 -- for as long as the process lives
    fcntl.flock(lock, fcntl.LOCK_EX)
    room = new.rename(new.with_name(new.name.replace("new-", "room-")))  # a room is locked from its first moment on
    Finalize(None, leave, args=(room, lock), exitpriority=LAST)  # atexit would come before multiprocessing's own folders in it
    return room


def shared() -> Path:
    """The folder of all rooms of this user; of a process in a room, which has its temporary files there, the same one."""
    name, temporary = f"diffpress-{os.getuid()}", Path(tempfile.gettempdir())
    base = next((place for place in temporary.parents if place.name == name), temporary / name)
    if len(str(base)) + len("/room-12345678") > LONGEST:
        base = Path("/tmp") / name
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    if base.stat().st_uid != os.getuid():
        raise ValueError(f"{base}: belongs to another user; remove it, or set TMPDIR to a folder of your own")
    return base


def clear(base: Path) -> None:
    """Remove the rooms of processes that are gone."""
    for room in base.glob("room-*"):
        with contextlib.suppress(OSError), open(room / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(room)


def remove(room: Path) -> None:
    shutil.rmtree(room, ignore_errors=True)
    if room.exists():  # a process that is just ending wrote into it: the next one clears it
        (room / "lock").touch()


def leave(room: Path, lock: IO) -> None:
    remove(room)
    lock.close()
