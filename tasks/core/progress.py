"""Progress of long work: a bar with rate and ETA on a terminal, plain lines otherwise."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

BAR = 24


def format_line(label: str, done: int, total: int, elapsed_s: float, note: str = "") -> str:
    """`distill [######------] 120/300  5.1/s  ETA 0:35  <note>`; the ETA is of this run's own rate."""
    filled = BAR * done // max(total, 1)
    rate = done / elapsed_s if elapsed_s > 0 else 0.0
    left = int((total - done) / rate) if rate > 0 else 0
    shown = f"{rate:.1f}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.1f} s each"
    line = f"{label} [{'#' * filled}{'-' * (BAR - filled)}] {done}/{total}  {shown}  ETA {left // 60}:{left % 60:02d}"
    return f"{line}  {note}" if note else line


def track(items: Iterable, total: int, label: str, done: int = 0, note: Callable[[], str] = str) -> Iterator:
    """Yield `items` and say how far they are. done: how many an earlier run finished already; note: asked for what else there
    is to say each time that a line is written, and never else, so it may cost something."""
    terminal = sys.stdout.isatty()
    every_s = float(os.environ.get("DIFFPRESS_PROGRESS_S", 0.2 if terminal else 5.0))
    started = said = time.monotonic()
    here = 0
    for item in items:
        yield item
        here += 1
        now = time.monotonic()
        if now - said >= every_s:
            said = now
            line = format_line(label, done + here, total, (now - started) * (done + here) / here, note())
            print(f"\r\x1b[K{line}" if terminal else line, end="" if terminal else "\n", flush=True)
    if terminal:
        print("\r\x1b[K", end="", flush=True)
    if time.monotonic() - started >= every_s:
        print(f"{label}: {here} done in {time.monotonic() - started:.0f} s", flush=True)
