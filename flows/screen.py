"""What a person at a terminal sees of a run: the stages' own lines, with progress bars moving in place."""

import contextlib
import logging
import re
import sys
from typing import TextIO

PROGRESS = re.compile(r"^\S.* \[#*-*\] \d+/\d+ ")  # as tasks/core/progress.py writes it
SHOWN = "screen"  # a log record with this attribute is for the terminal, too


class Screen(logging.Handler):
    """Takes the place of Prefect's console handler. Lines of the run are shown, framework messages and stack traces are not."""

    def __init__(self, stream: TextIO | None = None):
        super().__init__()
        self.stream = stream or sys.stdout
        self.in_place = self.stream.isatty()
        self.bar_open = False

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, SHOWN):
            self.show(record.getMessage())

    def show(self, line: str) -> None:
        bar = self.in_place and is_progress(line)
        clear = "\r\x1b[K" if self.bar_open or bar else ""
        with contextlib.suppress(OSError):  # the terminal is gone, or whoever read us: the work is not
            self.stream.write(f"{clear}{line}" if bar else f"{clear}{line}\n")
            self.stream.flush()
        self.bar_open = bar


def is_progress(line: str) -> bool:
    return PROGRESS.match(line) is not None


def take_over() -> Screen:
    """Route this process's logs to the screen alone; what goes to the Prefect server is untouched."""
    screen = Screen()
    logging.getLogger().handlers[:] = [screen]
    return screen
