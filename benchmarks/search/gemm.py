"""Processes that multiply matrices and do nothing else: what a second core of this machine can bring at all."""

import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

SIDE = 512  # of the square fp32 matrices


def multiply(pipe: Connection) -> None:
    """Each number of seconds that arrives is answered by how many products were made in them, per second."""
    import torch
    torch.set_num_threads(1)
    a, b = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for seconds in iter(pipe.recv, None):
        began, done = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            torch.mm(a, b)
            done += 1
        pipe.send(done / (time.perf_counter() - began))


@contextlib.contextmanager
def processes(n: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(n)]
    started = [context.Process(target=multiply, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in started:
        process.start()
    try:
        rate([ours for ours, _ in pairs], 0.5)  # the first products are slow
        yield [ours for ours, _ in pairs]
    finally:
        for process in started:
            process.terminate()


def rate(pipes: Sequence[Connection], seconds: float) -> float:
    """Products a second of all processes together."""
    for pipe in pipes:
        pipe.send(seconds)
    return sum(pipe.recv() for pipe in pipes)
