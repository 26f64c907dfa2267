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


class Raylet:
    """`ray start --block` with one CPU, and all that it started."""

    def __init__(self, *arguments: str, room: Path, environment: dict[str, str]):
        ray = Path(sys.executable).parent / "ray"
        self.process = subprocess.Popen([ray, "start", "--block", "--num-cpus=1", *arguments], env=environment, cwd=room,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

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
    return os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def until(happened: Callable[[], bool], what: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s for this: {what}"
        time.sleep(0.02)
