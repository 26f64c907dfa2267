"""A child process in its own process group: every line streamed, and nothing of it left behind."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.ending import STOPS
from tasks.core import lifeline

GRACE_S = 8.0  # between asking a process group to end and killing it


def run_child(command: Sequence[str], emit: Callable[[str], None], timeout_s: float, env: dict[str, str] | None = None,
              grace_s: float = GRACE_S) -> int | None:
    """Run `command`, pass each line it prints to `emit`, and return its exit status; None when `timeout_s` ran out.

    However this ends (timeout, Ctrl-C, cancellation), the whole process group ends with it. A reader thread drains the pipe,
    so that neither a silent child nor a grandchild that keeps the pipe open can hold up the watchdog.
    """
    known = (os.environ if env is None else env) | {lifeline.MASTER: str(os.getpid())}
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors="replace", env=known, start_new_session=True)
    listening = threading.Event()
    listening.set()
    reader = threading.Thread(target=drain, args=(child.stdout, lambda line: listening.is_set() and emit(line)), daemon=True)
    reader.start()
    try:
        return child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return None
    except BaseException:
        listening.clear()  # the last words of what is stopped say nothing
        raise
    finally:
        with undisturbed():
            lifeline.stop(child.pid, grace_s)  # start_new_session made the child its group's leader
            child.wait()
            reader.join(grace_s)


def drain(stream, emit: Callable[[str], None]) -> None:
    with stream:
        for line in stream:
            if line := line.rstrip():
                emit(line)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A second signal would leave behind what the first one was to end: here it waits until that is done."""
    if threading.current_thread() is not threading.main_thread():  # nowhere else do signals raise anything
        yield
        return
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in STOPS
              if signal.getsignal(number) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def python_path() -> str:
    """Where a child finds this code, whatever its working directory."""
    return os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
