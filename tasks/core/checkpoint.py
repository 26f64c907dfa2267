"""Resumable checkpoints of long stages: outside DVC's outs, keyed by everything the work depends on."""

import os
import time
from pathlib import Path

import torch

from tasks.core import disk


class Checkpoint:
    """One file that a killed run resumes from; another key starts afresh.

    key: digest of inputs, params and code (see `artifacts.work_key`). The file is replaced atomically, so a kill at any
    moment leaves the previous one whole; at most `every_s` seconds of work are lost.
    """

    def __init__(self, folder: Path, key: str, every_s: float = 30.0):
        self.path = Path(folder) / f"{key}.pt"
        self.every_s = every_s
        self._saved_at = time.monotonic()
        self._warned = False

    def load(self) -> dict | None:
        """The saved state, on the CPU; None when there is none. A file cut short by a full disk counts as none."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError) as error:
            print(f"checkpoint {self.path} is unreadable ({type(error).__name__}); starting afresh")
            return None

    def save(self, state: dict) -> None:
        """state: tensors, numbers, strings and containers of these (what `weights_only` can read back).

        Where there is no room, or no leave to write, work goes on and the previous checkpoint stays: hours of training are
        worth more than the minutes that a kill would then cost. Said once, until a save succeeds again.
        """
        partial = self.path.with_suffix(".partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, partial)
            os.replace(partial, self.path)
            self._warned = False
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError
            partial.unlink(missing_ok=True)
            if not (isinstance(error, OSError) or disk.is_full(error)):
                raise
            if not self._warned:
                print(f"warning: no checkpoint: {disk.describe(error, self.path)}; going on without", flush=True)
            self._warned = True
        self._saved_at = time.monotonic()

    def save_if_due(self, state) -> None:
        """state: a function that builds the state, called only when a checkpoint is due."""
        if time.monotonic() - self._saved_at >= self.every_s:
            self.save(state())

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
