"""Ctrl-C as a terminal sends it: to the run, to Prefect's temporary server and to all else of the foreground."""

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import sys
from flows import compress, stages
compress.prepare = lambda *_: compress.Plan("quick", {"data": ()}, {"data"})
stages.command = lambda *_: [sys.executable, "-c", "import time; print('at work', flush=True); time.sleep(600)"]
stages.put_back = lambda *_: ""
sys.exit(compress.main([]))
"""


def heed_ctrl_c():
    """As from a terminal: a script in the background ignores SIGINT, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_a_run_in_one_line(tmp_path):
    own_server = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    run = subprocess.Popen([sys.executable, "-c", RUN], cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           env=own_server | {"PYTHONPATH": str(ROOT), "PREFECT_HOME": str(tmp_path)}, start_new_session=True,
                           preexec_fn=heed_ctrl_c)
    try:
        while "at work" not in (line := run.stdout.readline()):
            assert line, run.stderr.read()
        os.killpg(run.pid, signal.SIGINT)
        printed, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130
    assert said.strip() == "stopped; the next run goes on from the last checkpoint"
    assert "Traceback" not in printed
