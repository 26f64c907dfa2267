"""What the workers of the fault tests do: importable, so that a worker process finds it."""

import os
import signal
import time
from pathlib import Path


def make_product():
    """x -> a seeded matrix product, so that another number of threads or another process would show in the last bits."""
    import torch
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))

    def product(x: int) -> tuple[int, float]:
        noise = torch.randn(64, 300, generator=torch.Generator().manual_seed(x))
        return torch.get_num_threads(), (noise @ weight).softmax(1).max().item()

    return product


def make_killed_once(folder: Path):
    """Item 3 kills its worker's process the first time that it is asked; the others are slow enough to be in flight."""
    def f(x: int) -> int:
        mark = folder / "killed"
        if x == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return x * x
    return f


def make_deadly():
    def f(x: int) -> int:
        if x == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return x
    return f


def make_hung_once(folder: Path):
    def f(x: int) -> int:
        mark = folder / "hung"
        if x == 2 and not mark.exists():
            mark.touch()
            time.sleep(600)
        return x * x
    return f


def make_uneven():
    def f(x: int) -> int:
        time.sleep(0.3 if x == 0 else 0.01)
        return x
    return f


def make_reciprocal():
    return lambda x: 1 / x


def make_nothing():
    raise ValueError("teacher: not found")
