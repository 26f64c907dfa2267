"""Which noise levels a student trains on: those where its errors move the image.

The loss counts the errors of all timesteps alike. The sampler does not: some are carried to the image and grown on the way,
others are made good by the steps that follow. So before it trains, the student takes one step of the teacher's trajectories at
a time, and what that does to the images is measured.
"""

from collections import deque

import numpy as np
import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser
from tasks.core.recipe import Recipe
from tasks.core.sampler import initial_noise, labels_for, network, spaced_timesteps, trajectory
from tasks.runtime.solver import clip_bound, integrate, solver_steps

STEPS = 20   # of DDIM on a uniform list, at which effects are measured; in between they are interpolated
IMAGES = 16  # trajectories
PART = 0.25  # of the student's error, as it is before training: what is left of it when training ends is small, too
SEED = 271   # of noise that no sample starts from


def timestep_density(teacher: Denoiser, student: Denoiser, importance: float) -> Tensor:
    """(T,) fp64, sums to 1: of the timesteps of a batch. importance: in [0, 1], the share that follows the effect of errors on
    the image; the rest is even. All is, where student and teacher are one."""
    total = teacher.schedule.steps
    even = torch.full((total,), 1 / total, dtype=torch.float64)
    timesteps, effects = error_effects(teacher, student)
    return importance * interpolated(timesteps, effects, total) + (1 - importance) * even if effects.all() else even


@torch.inference_mode()
def error_effects(teacher: Denoiser, student: Denoiser) -> tuple[Tensor, Tensor]:
    """Timesteps (K,), falling, and (K,) fp64: mean square of what the student's error at step k alone changes in the image,
    over that of the error; 0 where it makes none."""
    device = next(teacher.model.parameters()).device
    timesteps = spaced_timesteps(teacher.schedule, min(STEPS, teacher.schedule.steps))
    right, other = network(teacher), network(student)
    labels = labels_for(range(IMAGES), teacher.num_classes)
    labels = None if labels is None else labels.to(device)
    noise = initial_noise(teacher.sample_shape, range(IMAGES), SEED).to(device)
    states = [(x, x0) for _, x, x0 in trajectory(right, teacher.schedule, Recipe(timesteps=timesteps), noise, labels)]
    steps, clip = solver_steps(teacher.schedule.config, timesteps, "ddim"), clip_bound(teacher.schedule.config)
    (_, image), effects = states[-1], []
    for k, (x, _) in enumerate(states):
        t = torch.full((IMAGES,), timesteps[k], device=device)
        told = right(x, t, labels, k)
        wrong = torch.lerp(told, other(x, t, labels, k), PART)

        def erring(x: Tensor, t: Tensor, labels: Tensor | None, i: int, wrong: Tensor = wrong) -> Tensor:
            return right(x, t, labels, i) if i else wrong

        [(_, _, moved)] = deque(integrate(erring, steps[k:], x, labels, clip), maxlen=1)
        effects.append((moved - image).double().square().mean() / (wrong - told).double().square().mean())
    return torch.tensor(timesteps), torch.stack(effects).nan_to_num(0.0).cpu()


def interpolated(timesteps: Tensor, effects: Tensor, total: int) -> Tensor:
    """(total,) fp64 of sum 1. Effects spread over decades, so it is their logarithm that is straight between two of them."""
    density = np.exp(np.interp(np.arange(total), timesteps.flip(0).numpy(), effects.flip(0).log().numpy()))
    return torch.from_numpy(density / density.sum())
