"""A child process in its own process group: every line streamed, and nothing of it left behind."""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence

GRACE_S = 10.0  # between asking a process group to end and killing it


def run_child(command: Sequence[str], emit: Callable[[str], None], timeout_s: float, env: dict[str, str] | None = None,
              grace_s: float = GRACE_S) -> int | None:
    """Run `command`, pass each line it prints to `emit`, and return its exit status; None when `timeout_s` ran out.

    However this ends (timeout, Ctrl-C, cancellation), the whole process group ends with it. A reader thread drains the pipe,
    so that neither a silent child nor a grandchild that keeps the pipe open can hold up the watchdog.
    """
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors="replace", env=env, start_new_session=True)
    reader = threading.Thread(target=drain, args=(child.stdout, emit), daemon=True)
    reader.start()
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop_group(child, grace_s)
        reader.join(grace_s)


def drain(stream, emit: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            if line := line.rstrip():
                emit(line)


def stop_group(child: subprocess.Popen, grace_s: float) -> None:
    """SIGTERM, `grace_s` to tidy up, SIGKILL. Where the child ended by itself, what it left in its group goes at once."""
    if child.poll() is None:
        signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_s)
    signal_group(child.pid, signal.SIGKILL)
    child.wait()


def signal_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, number)  # start_new_session made the child its group's leader
