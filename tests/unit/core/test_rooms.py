"""Temporary folders end with their process, or with the next one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tasks.core import rooms
from tests.contract.reading import ROOT

HOLDS = "from tasks.core.rooms import own_room; print(own_room(), flush=True); input()"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(rooms, "LONGEST", 1000)
    rooms.own_room.cache_clear()
    yield tmp_path
    rooms.own_room.cache_clear()


def holder() -> tuple[subprocess.Popen, Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLDS], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)
    return process, Path(process.stdout.readline().strip())


def test_a_room_goes_with_its_process():
    process, room = holder()
    assert (room / "lock").exists()
    process.communicate("\n")
    assert not room.exists()


def test_rooms_of_the_dead_are_cleared_and_those_of_the_living_stay():
    (living, kept), (dead, left) = holder(), holder()
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert left.exists()
    rooms.clear(rooms.shared())
    assert not left.exists() and kept.exists()
    living.communicate("\n")


def test_a_process_has_one_room(here):
    room = rooms.own_room()
    assert room == rooms.own_room() and room.parent.parent == here and room.stat().st_mode & 0o077 == 0


def test_rays_sockets_fit_below_every_room(tmp_path, monkeypatch):
    """Linux allows 107 letters; Ray's longest is session_<date>_<microseconds>_<pid>/sockets/plasma_store."""
    monkeypatch.setattr(rooms.tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    deepest = rooms.shared() / "room-12345678/session_2026-11-30_20-52-54_998088_4194304/sockets/plasma_store"
    assert len(str(deepest)) <= 107


def test_what_multiprocessing_keeps_in_a_room_goes_before_it_without_a_word():
    """A torch that compiles or a pool of workers asks for such a folder; removed under its hands it printed a stack trace."""
    code = ("import tempfile; from tasks.core.rooms import own_room; tempfile.tempdir = str(own_room());"
            "from multiprocessing import util; util.get_temp_dir(); print(own_room())")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, check=True)
    assert done.stderr == "" and not Path(done.stdout.strip()).exists()
