"""Prefect's temporary server: it ends with the run that it is of, whatever ends that, and not before.

`python -m flows.server PORT` is the server's own process.
"""

import os
import signal
import subprocess
import sys

from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, get_current_settings

from flows.child import python_path
from tasks.core import lifeline

NO_UI = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


class Server(SubprocessASGIServer):
    """In a session of its own: a terminal sends Ctrl-C to all of its foreground, and a run whose server is gone could not say
    that it was stopped."""

    def _run_uvicorn_command(self) -> subprocess.Popen:
        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        ours = {**NO_UI, **settings, "PYTHONPATH": python_path(), lifeline.MASTER: str(os.getpid())}
        return subprocess.Popen([sys.executable, "-m", "flows.server", str(self.port)], env=os.environ | ours,
                                start_new_session=True)


def start_server() -> None:
    """Start what Prefect would start by itself where no PREFECT_API_URL is set. Raises RuntimeError if it does not start."""
    if not PREFECT_API_URL.value():
        Server().start()  # one for the process: the flow finds it running


def serve(port: int) -> None:
    import uvicorn
    lifeline.hold(end)
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error",
                lifespan="on")


def end() -> None:
    """Nobody is left to read its answers, and its database bears a kill."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
