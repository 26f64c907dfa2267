"""The end of a process that is told to stop: one line, its own status, and a limit to what hangs."""

import os
import pty
import signal
import subprocess
import sys

import pytest

from flows.child import run_child
from flows.ending import LINE
from tests.contract.reading import ROOT

RUN = """
import os, signal, sys, time
from flows import ending
ending.LIMIT_S = 1.0
ending.heed()
print("ready", flush=True)
try:
    time.sleep(60)
finally:
    print("a stack trace", file=sys.stderr)
    signal.raise_signal(signal.SIGTERM)  # again, in the midst of it
    time.sleep(float(sys.argv[1]))
"""


def start(hangs_s: float, **streams) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", RUN, str(hangs_s)], cwd=ROOT, text=True, stderr=subprocess.PIPE, **streams,
                            preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)])


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("hangs_s", [0, 60])
def test_one_line_and_the_signals_own_status_even_where_something_hangs(number, status, hangs_s):
    run = start(hangs_s, stdout=subprocess.PIPE)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(number)
    _, said = run.communicate(timeout=20)
    assert (run.returncode, said) == (status, f"{LINE}\n")


def test_a_terminal_that_closes_ends_the_run_with_status_129():
    master, slave = pty.openpty()
    run = start(0, stdout=slave)
    os.close(slave)
    assert b"ready" in os.read(master, 100)
    os.close(master)
    run.send_signal(signal.SIGHUP)
    assert run.wait(20) == 129


def test_what_nohup_has_ignored_stays_ignored():
    code = "import signal; from flows import ending; signal.signal(1, signal.SIG_IGN); ending.heed(); signal.raise_signal(1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_signal_in_the_midst_of_ending_a_child_waits_until_it_has_ended():
    """The child takes a second to tidy up, and has us told to stop meanwhile: that would leave it behind."""
    code = ("import os, signal, sys, time\n"
            "signal.signal(15, lambda *_: (os.kill(os.getppid(), 15), time.sleep(1), print('tidy', flush=True), sys.exit()))\n"
            "print('up', flush=True); time.sleep(60)")
    happened = []
    before = signal.signal(signal.SIGTERM, lambda *_: happened.append("told"))
    try:
        assert run_child([sys.executable, "-c", code], happened.append, timeout_s=3.0) is None
    finally:
        signal.signal(signal.SIGTERM, before)
    assert happened == ["up", "tidy", "told"]
