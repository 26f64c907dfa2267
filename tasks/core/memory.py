"""What becomes of memory that was freed, in the C library and in Python."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

TRIM, TOP_PAD, MMAP = -1, -2, -3  # mallopt(3): M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
RARELY = 100_000    # objects made beyond those freed, before young ones are looked through
LARGEST = 32 << 20  # bytes; glibc takes no higher threshold for what it maps by itself


def keep_freed_memory() -> None:
    """Memory of freed tensors stays with the process, for the next ones of their size. Without effect where there is no glibc.

    By default glibc hands large blocks back to the system and asks for them again, a page fault for every 4 KiB: a fifth of a
    taught training step on a CPU. Not for processes whose memory is measured.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(MMAP, LARGEST)
    mallopt(TRIM, 2**31 - 1)
    mallopt(TOP_PAD, 2 * LARGEST)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """While open, cycles of Python's objects are looked for a hundred times less often: where many small objects are made and
    kept, and none in cycles, looking costs time and finds nothing."""
    before = gc.get_threshold()
    gc.set_threshold(RARELY, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
