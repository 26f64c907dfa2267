"""Real `ray start` nodes on this machine, to be killed."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
TOKEN = "7" * 64
STARTS = 3  # Ray gives a node 30 s to start, and a busy machine more than once


class Raylet:
    """`ray start --block` with one CPU, and all that it started."""

    def __init__(self, *arguments: str, room: Path, environment: dict[str, str]):
        self.command = [Path(sys.executable).parent / "ray", "start", "--block", "--num-cpus=1", *arguments]
        self.room, self.environment, self.log = room, environment, room / "ray.log"
        for _ in range(STARTS):
            self.start()
            until(lambda: self.process.poll() is not None or "Ray runtime started" in self.log.read_text(), "ray start")
            if self.process.poll() is None:
                return
        raise AssertionError(self.log.read_text())

    def start(self) -> None:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, cwd=self.room, stdout=log,
                                            stderr=subprocess.STDOUT)

    def tree(self) -> list[psutil.Process]:
        try:
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        for process in self.tree():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(30)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.kill()


def environment(**more: str) -> dict[str, str]:
    """Of nodes and drivers of one cluster."""
    free = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}  # a Ray of this machine alone sets 0 in the whole process
    return os.environ | free | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(happened: Callable[[], bool], what: str, timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for this: {what}"
        time.sleep(0.02)
