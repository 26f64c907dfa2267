"""What networks are tried on: noised images, one evaluation each, and the states of a recipe's own trajectories."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.recipe import Recipe
from tasks.core.sampler import cached_network, initial_noise, labels_for, trajectory
from tasks.core.training import stratified_timesteps
from tasks.runtime.cache import remove_cache
from tasks.runtime.precision import Ranges, calibrate_ranges, widths
from tasks.runtime.solver import recipe_steps


@dataclass(frozen=True, kw_only=True)
class Calibration:
    x: Tensor              # (N, C, H, W) fp32, noised to t
    t: Tensor              # (N,) int64, spread evenly over the schedule
    labels: Tensor | None  # (N,) int64

    def to(self, device: torch.device | str) -> "Calibration":
        labels = None if self.labels is None else self.labels.to(device)
        return Calibration(x=self.x.to(device), t=self.t.to(device), labels=labels)


def noised(schedule: Schedule, images: np.ndarray, labels: np.ndarray | None, n: int, rng: torch.Generator) -> Calibration:
    """images: uint8 (N, C, H, W). n of them (or all there are), each at one noise level of its own."""
    index = torch.randperm(len(images), generator=rng)[:n]
    x0 = torch.from_numpy(images[index.numpy()]).float() / 127.5 - 1
    t = stratified_timesteps(len(index), schedule.steps, rng)
    noise = torch.randn(x0.shape, generator=rng)
    return Calibration(x=schedule.add_noise(x0, noise, t), t=t,
                       labels=None if labels is None else torch.from_numpy(labels)[index])


def chunk_of(shape: Sequence[int]) -> int:
    """Images (C, H, W) that are evaluated together in bounded memory: 64 of up to 32 x 32 pixels, fewer of larger ones."""
    return min(64, max(1, 64 * 32 * 32 // prod(shape[1:])))


@torch.inference_mode()
def predictions(denoiser: Denoiser, calibration: Calibration) -> Tensor:
    """(N, C, H, W), computed in chunks of bounded memory."""
    x, t, labels = calibration.x, calibration.t, calibration.labels
    chunk = chunk_of(x.shape[1:])
    parts = [slice(i, i + chunk) for i in range(0, len(x), chunk)]
    return torch.cat([denoiser(x[s], t[s], None if labels is None else labels[s]) for s in parts])


def relative_error(predicted: Tensor, reference: Tensor) -> float:
    """Mean squared difference over the mean square of the reference: 0 is equal, 1 is as good as predicting nothing."""
    return ((predicted - reference).square().mean() / reference.square().mean()).item()


def ranges_on_trajectory(denoiser: Denoiser, recipe: Recipe, states: int, seed: int) -> Ranges:
    """Activation ranges from at least `states` states on the recipe's own trajectories, its cache live.

    Empty if no layer rounds its inputs.
    """
    if all(widths(token) is None for token in recipe.precision.values()):
        return {}
    images = range(-(-states // recipe.nfe))
    noise, labels = initial_noise(denoiser.sample_shape, images, seed), labels_for(images, denoiser.num_classes)
    try:
        visited = list(trajectory(cached_network(denoiser, recipe), denoiser.schedule, recipe, noise, labels))
    finally:
        remove_cache(denoiser.model)
    times = [row.t for row in recipe_steps(denoiser.schedule.config, recipe)]
    batches = ((x, torch.full((len(x),), times[step]), labels) for step, x, _ in visited)
    return calibrate_ranges(denoiser.model, batches, denoiser.joins())
