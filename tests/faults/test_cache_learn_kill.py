"""SIGKILL in the middle of any of the three trainings: the next run goes on from the checkpoint to the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.cache_learn.rollout import train_rollout
from tasks.cache_learn.router import train_hard_router, train_router
from tasks.core.checkpoint import Checkpoint
from tasks.core.recipe import Recipe
from tests.unit.cache_learn.toy import Constant, Scale, ToyDenoiser, names, toy

ROOT = Path(__file__).parents[2]
STEPS = {"router": 300, "hard": 100, "rollout": 100}
TIMESTEPS = (999, 799, 599, 399)
CHILD = ("import sys; from tests.faults.test_cache_learn_kill import train; "
         "train(sys.argv[1], sys.argv[2], every_s=0.05, pause_s=0.005)")


class Slow(ToyDenoiser):
    pause_s = 0.0

    def __call__(self, x, t, labels=None):
        time.sleep(self.pause_s)
        return super().__call__(x, t, labels)


def train(kind: str, folder: str | Path, every_s: float, pause_s: float = 0.0):
    made = toy(Constant(), Scale(-0.6))
    denoiser = Slow(made.model, made.schedule)
    denoiser.pause_s = pause_s
    images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    how = {"steps": STEPS[kind], "batch": 8, "lr": 0.1, "label_dropout": 0.1, "seed": 0,
           "checkpoint": Checkpoint(folder, "k" * 16, every_s)}
    if kind == "router":
        return train_router(denoiser, names(denoiser), images, None, TIMESTEPS, lam=1e-3, reduction="mean", **how)
    how |= {"budget": 0.3, "max_masks": 3, "noise": 0.5}
    if kind == "hard":
        return train_hard_router(denoiser, names(denoiser), images, None, TIMESTEPS, reduction="mean", **how)
    gap = np.arange(4) - np.arange(4)[:, None]
    costs = np.where(gap >= 0, gap, np.inf)[None].repeat(2, axis=0)
    return train_rollout(denoiser, names(denoiser), costs, Recipe(timesteps=TIMESTEPS), window=2, forecast="taylor", **how)


@pytest.mark.parametrize("kind", STEPS)
def test_a_killed_training_resumes_to_the_same_bytes(tmp_path, kind):
    saved = tmp_path / "cut" / f"{'k' * 16}.pt"
    child = subprocess.Popen([sys.executable, "-c", CHILD, kind, str(saved.parent)], cwd=ROOT)
    deadline = time.monotonic() + 300  # importing alone takes minutes where the machine is shared
    while not saved.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, "it was still training"
    done = Checkpoint(saved.parent, "k" * 16).load()["step"]
    assert 0 < done < STEPS[kind]
    resumed, curve = train(kind, saved.parent, every_s=1e9)
    whole, undisturbed = train(kind, tmp_path / "whole", every_s=1e9)
    assert curve == undisturbed
    assert resumed == whole if kind != "router" else resumed.numpy().tobytes() == whole.numpy().tobytes()
