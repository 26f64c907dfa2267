"""Prefect's temporary server, out of the reach of Ctrl-C."""

import signal

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL


def start_server() -> None:
    """Start what Prefect would start by itself where no PREFECT_API_URL is set; it ends with this process.

    A terminal sends Ctrl-C to all of its foreground processes. The server's share waits for ever, since a process inherits
    the signals that are blocked where it is started: a run whose server is gone could not say that it was stopped.
    Raises RuntimeError if the server does not start.
    """
    if PREFECT_API_URL.value():
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        SubprocessASGIServer().start()  # one for the process: the flow finds it running
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
