"""A stage whose node dies once, after a checkpoint: importable, so that a node finds it."""

import os
import signal
import time
from pathlib import Path

import torch

from tasks.core.artifacts import Inputs, Report


def run(params: dict, inputs: Inputs, out: Path) -> Report:
    checkpoint = inputs.checkpoint("remote")
    saved = checkpoint.load()
    if saved is None:
        checkpoint.save({"done": 7})
        time.sleep(params["sleep_s"])  # in which the checkpoint travels home
        os.kill(os.getpid(), signal.SIGKILL)
    (out / "deep").mkdir()
    (out / "deep" / "copy.txt").write_text((inputs["data"] / "words.txt").read_text())
    return Report({"resumed_at": saved["done"], "threads": torch.get_num_threads(), "home": Path.cwd() == Path(params["home"])})
