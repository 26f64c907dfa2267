"""The end of a run that is told to stop, by Ctrl-C, SIGTERM or a terminal that closes: one line, soon, and no stack trace."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT_S = 14.0  # for everything to unwind: the stage, what DVC puts back, what Prefect's server is told
LINE = "stopped; the next run goes on from the last checkpoint"


stopping = threading.Event()
last_words = [LINE]


class Stopped(SystemExit):
    """Raised where the first signal finds the main thread. Its code is the exit status: 128 and the signal's number."""


@contextlib.contextmanager
def heeded(line: str = LINE) -> Iterator[None]:
    """For the process of a run alone: under a worker the signals are Prefect's. line: what is said when one comes."""
    before = {number: signal.getsignal(number) for number in STOPS}
    heed()
    last_words.append(line)
    try:
        yield
    finally:
        last_words.pop()
        if not stopping.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)


def heed() -> None:
    for number in STOPS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)


def heed_again() -> None:
    """Prefect takes SIGTERM for itself while a flow runs, and its own way waits for a server that may be gone."""
    if signal.getsignal(signal.SIGINT) is stop:
        heed()


def stop(number: int, _) -> None:
    """Say so once, let everything unwind, and be gone in LIMIT_S whatever hangs. What is printed after this is not shown."""
    if stopping.is_set():
        return
    stopping.set()
    say(last_words[-1])
    quieten(2)
    if number == signal.SIGHUP and os.isatty(1):
        quieten(1)  # the terminal that closed: writing there is an error
    threading.Thread(target=end, args=(128 + number,), daemon=True, name="ending").start()
    raise Stopped(128 + number)


def say(line: str) -> None:
    """To the terminal's own file: a signal may come in the midst of a print. There may be no terminal any more."""
    bar_open = "\n" if sys.stderr.isatty() else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{bar_open}{line}\n".encode())


def quieten(file: int) -> None:
    """Threads of Prefect's print stack traces when the server goes before they do."""
    if not os.environ.get("DIFFPRESS_DEBUG"):
        os.dup2(os.open(os.devnull, os.O_WRONLY), file)


def end(status: int) -> None:
    time.sleep(LIMIT_S)
    os._exit(status)  # children see it and end
