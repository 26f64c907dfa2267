"""SIGKILL of the driver in the middle of the search: the next run writes the same files and evaluates nothing twice."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from tasks.evolve import fitness
from tests.unit.evolve.toy import PARAMS, artifacts, run

ROOT = Path(__file__).parents[2]
CHILD = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.faults import test_evolve_kill as drill
os.chdir(sys.argv[1])
drill.search(pause_s=0.05)
"""
ENOUGH = 6  # logged evaluations: the teacher's two and some candidates
SEARCH = replace(PARAMS, evaluations=24)


def search(pause_s: float = 0.0) -> list[int]:
    """In the working directory; -> a number for every call of the sampler. pause_s: what makes an evaluation slow."""
    calls, sample = [], fitness.sample_in_chunks

    def slow(*args, **kwargs):
        calls.append(len(calls))
        time.sleep(pause_s)
        return sample(*args, **kwargs)

    fitness.sample_in_chunks = slow
    try:
        run(SEARCH, artifacts(Path("artifacts")), Path("out"))
    finally:
        fitness.sample_in_chunks = sample
    return calls


def logged(room: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in room.glob("runs/evolve/*.jsonl"))


def test_a_killed_search_goes_on_to_the_same_files(tmp_path, monkeypatch):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for room in (cut, whole):
        room.mkdir()
    child = subprocess.Popen([sys.executable, "-c", CHILD.format(root=str(ROOT)), str(cut)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while logged(cut) < ENOUGH and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was still searching"
    paid, outs = logged(cut), {}
    assert paid >= ENOUGH and not (cut / "out" / "recipe.json").exists()
    calls = {}
    for room in (cut, whole):
        monkeypatch.chdir(room)
        for left in ("artifacts", "out"):
            if (room / left).exists():
                (room / left).rename(room / f"{left}.killed")
        calls[room] = len(search())
        outs[room] = {path.name: path.read_bytes() for path in (room / "out").iterdir()}
    assert outs[cut] == outs[whole]
    assert 0 < calls[cut] <= calls[whole] - paid + 1, "at most the line that the kill tore is evaluated again"
