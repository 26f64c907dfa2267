"""SIGKILL in the middle of either training: the next run goes on from the checkpoint to the same bytes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tasks.cache_learn import forecast
from tasks.cache_learn.router import train_router
from tasks.core.checkpoint import Checkpoint
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import initial_noise
from tests.unit.cache_learn.toy import Constant, Scale, ToyDenoiser, names, toy

ROOT = Path(__file__).parents[2]
STEPS = {"router": 300, "forecast": 200}
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
    how = {"steps": STEPS[kind], "batch": 8, "lr": 0.1, "checkpoint": Checkpoint(folder, "k" * 16, every_s)}
    if kind == "router":
        images = torch.rand(32, 1, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
        return train_router(denoiser, names(denoiser), images, None, TIMESTEPS, lam=1e-3, reduction="mean", label_dropout=0.1,
                            seed=0, **how)
    plan = CachePlan(sublayers=tuple(names(denoiser)), compute=((True, True), (False, True), (True, False), (False, False)))
    noise = initial_noise(denoiser.sample_shape, range(16), 0)
    reference = forecast.Reference.of(denoiser, Recipe(timesteps=TIMESTEPS), names(denoiser), noise, None)
    return forecast.train(forecast.fit(plan, reference)[0], reference, window=2, **how)


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
