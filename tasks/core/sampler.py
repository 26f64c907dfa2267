"""Timestep lists, noise and the sampling loop of the pipeline; the solvers themselves are `runtime/solver.py`."""

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.recipe import Recipe
from tasks.runtime.cache import CacheHandle, apply_cache
from tasks.runtime.solver import Predict, clip_bound, integrate, solver_steps, with_guidance

SPACINGS = ("uniform", "logsnr", "quadratic")


def spaced_timesteps(schedule: Schedule, steps: int, spacing: str = "uniform") -> tuple[int, ...]:
    """A strictly decreasing list of `steps` timesteps that starts at T - 1.

    uniform: diffusers' "trailing" (arXiv 2305.08891, table 2); logsnr: uniform in log(alpha/sigma), DPM-Solver's choice;
    quadratic: DDIM's tau_i ~ i^2.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise ValueError(f"steps: {steps} is not between 1 and {total}, the schedule's number of steps")
    if spacing == "uniform":
        wanted = total - np.arange(steps) * total / steps - 1
    elif spacing == "quadratic":
        wanted = np.linspace(np.sqrt(total - 1), 0, steps, endpoint=False) ** 2
    elif spacing == "logsnr":
        bars = schedule.alphas_cumprod.double().numpy()
        lam = 0.5 * np.log(bars / (1 - bars))
        wanted = np.interp(np.linspace(lam[-1], lam[0], steps, endpoint=False), lam[::-1], np.arange(total)[::-1])
    else:
        raise ValueError(f"spacing: {spacing!r} is not one of {', '.join(SPACINGS)}")
    return strictly_decreasing(np.rint(wanted).astype(int))


def strictly_decreasing(timesteps: Sequence[int]) -> tuple[int, ...]:
    """Push equal neighbours apart, as little as possible, staying at or above 0."""
    out: list[int] = []
    for i, t in enumerate(timesteps):
        floor = len(timesteps) - 1 - i
        out.append(max(floor, min(int(t), out[-1] - 1 if out else int(t))))
    return tuple(out)


def initial_noise(shape: tuple[int, ...], indices: Sequence[int], seed: int) -> Tensor:
    """(len(indices), *shape) standard normal; sample i is the same whatever batch it is drawn in."""
    draws = [torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + int(i))) for i in indices]
    return torch.stack(draws)


def labels_for(indices: Sequence[int], num_classes: int) -> Tensor | None:
    """Stratified labels: i mod classes; None for an unconditional model."""
    return torch.tensor([int(i) % num_classes for i in indices]) if num_classes else None


def network(denoiser: Denoiser) -> Predict:
    """The live denoiser as a solver wants it."""
    return lambda x, t, labels, step: denoiser(x, t, labels)


def cached_network(denoiser: Denoiser, recipe: Recipe) -> Predict:
    """The denoiser with the recipe's cache plan live, if it has one; `remove_cache` ends that."""
    plan = recipe.cache
    if plan is None:
        return network(denoiser)
    handle = apply_cache(denoiser.model, plan.sublayers, plan.compute, plan.forecast, recipe.timesteps, plan.weights)
    return stepping(denoiser, handle)


def stepping(denoiser: Denoiser, handle: CacheHandle) -> Predict:
    """The live denoiser, its cache told of every step."""
    def predict(x: Tensor, t: Tensor, labels: Tensor | None, step: int) -> Tensor:
        handle.step = step
        return denoiser(x, t, labels)

    return predict


@torch.inference_mode()
def trajectory(predict: Predict, schedule: Schedule, recipe: Recipe, noise: Tensor, labels: Tensor | None,
               guidance: float = 1.0, null_label: int = 0) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (step, x before it, x0 predicted in it), each NCHW."""
    steps = solver_steps(schedule.config, recipe.timesteps, recipe.solver)
    yield from integrate(with_guidance(predict, guidance, null_label), steps, noise, labels, clip_bound(schedule.config))


def sample(predict: Predict, schedule: Schedule, recipe: Recipe, noise: Tensor, labels: Tensor | None,
           guidance: float = 1.0, null_label: int = 0) -> Tensor:
    """-> NCHW images in [-1, 1]."""
    # nothing of a step outlives the next one, so the small tensors of all of them stay in the CPU's caches
    [(_, _, x0)] = deque(trajectory(predict, schedule, recipe, noise, labels, guidance, null_label), maxlen=1)
    return x0


def to_uint8(images: Tensor) -> np.ndarray:
    """NCHW in [-1, 1] -> NCHW uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


def sample_in_chunks(predict: Predict, schedule: Schedule, recipe: Recipe, shape: tuple[int, ...], n: int, seed: int,
                     num_classes: int, chunk: int = 50, first: int = 0) -> Iterator[np.ndarray]:
    """Yield uint8 NCHW chunks of samples first .. first + n - 1.

    Every batch is padded to `chunk`: other batch sizes move the last bits of a matrix product, and sample 17 is to be the
    same image for any number of workers.
    """
    for start in range(first, first + n, chunk):
        indices = range(start, start + chunk)
        noise, labels = initial_noise(shape, indices, seed), labels_for(indices, num_classes)
        yield to_uint8(sample(predict, schedule, recipe, noise, labels))[: first + n - start]
