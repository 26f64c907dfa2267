"""Peak memory of a piece of work, in a process of its own so that nothing freed earlier is reused unseen."""

import multiprocessing
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

PAGE = resource.getpagesize()


def peak_growth(works: Sequence[Callable[[], object]], preload: Sequence[str]) -> list[int]:
    """Bytes by which the resident set grows at its peak while each `work()` runs, each in a fresh child.

    preload: modules imported once, before the children are forked, so that libraries do not count. works are pickled.
    Linux only (`/proc`). Raises RuntimeError if a child dies.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return [_in_child(context, work) for work in works]


def _in_child(context: multiprocessing.context.ForkServerContext, work: Callable[[], object]) -> int:
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(work, theirs))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError("a memory measurement's process died; its error is above") from None
    finally:
        child.join()


def _measure(work: Callable[[], object], result: Connection) -> None:
    before = resident()
    work()
    result.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
