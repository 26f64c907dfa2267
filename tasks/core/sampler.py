"""Timestep lists, noise and the sampling loop of the pipeline; the solvers themselves are `runtime/solver.py`."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.recipe import Recipe
from tasks.runtime.cache import CacheHandle, apply_cache
from tasks.runtime.solver import (
    NO_SIGNAL,
    Predict,
    clip_bound,
    final,
    guided_steps,
    integrate,
    recipe_steps,
    with_guidance,
)

SPACINGS = ("uniform", "logsnr", "quadratic", "karras")
RHO, NOISIEST = 7, 80.0  # of Karras et al.: exponent, and sigma/alpha that lists begin at, or at the schedule's if that is less


def spaced_timesteps(schedule: Schedule, steps: int, spacing: str = "uniform") -> tuple[int, ...]:
    """A strictly decreasing list of `steps` timesteps that starts at T - 1; `karras` may start at a less noisy one.

    uniform: diffusers' "trailing" (arXiv 2305.08891, table 2); logsnr: uniform in log(alpha/sigma), DPM-Solver's choice;
    quadratic: DDIM's tau_i ~ i^2; karras: uniform in (sigma/alpha)^(1/7) down to the cleanest level (arXiv
    2206.00364, eq. 5), as diffusers' `use_karras_sigmas` with `sigma_max`.
    """
    total = checked_total(schedule, steps)
    if spacing == "uniform":
        return trailing(total, steps)
    if spacing == "quadratic":
        wanted = np.linspace(np.sqrt(total - 1), 0, steps, endpoint=False) ** 2
    elif spacing in ("logsnr", "karras"):
        lam = log_snr(schedule.alphas_cumprod.double().numpy())
        levels = np.linspace(lam[-1], lam[0], steps, endpoint=False) if spacing == "logsnr" else karras(lam[-1], lam[0], steps)
        wanted = np.interp(levels, lam[::-1], np.arange(total)[::-1])
    else:
        raise ValueError(f"spacing: {spacing!r} is not one of {', '.join(SPACINGS)}")
    return strictly_decreasing(np.rint(wanted).astype(int))


def karras(noisy: float, clean: float, steps: int) -> np.ndarray:
    """log(alpha/sigma) of each step, both ends included. A cosine schedule goes on to 20,000 times more noise than signal, and
    would have most of a short list where there is nothing but noise."""
    top = min(np.exp(-noisy), NOISIEST)
    return -RHO * np.log(np.linspace(top ** (1 / RHO), np.exp(-clean / RHO), steps))


def checked_total(schedule: Schedule, steps: int) -> int:
    """T. Raises ValueError if there are not as many timesteps as steps."""
    if not 1 <= steps <= schedule.steps:
        raise ValueError(f"steps: {steps} is not between 1 and {schedule.steps}, the schedule's number of steps")
    return schedule.steps


def trailing(total: int, steps: int) -> tuple[int, ...]:
    """diffusers rounds before it subtracts, and where a float falls short of 0 its list has one timestep more, -1."""
    return as_timesteps(np.round(np.arange(total, 0, -(total / steps)))[:steps] - 1)


def as_timesteps(values: np.ndarray) -> tuple[int, ...]:
    return tuple(values.astype(int).tolist())


def log_snr(bars: np.ndarray) -> np.ndarray:
    """log(alpha/sigma), finite also at a timestep without signal or without noise: there as of 2^-24, with which DPM-Solver
    calculates in diffusers, or of half of what the next timestep has."""
    with np.errstate(divide="ignore"):
        lam = 0.5 * np.log(bars / (1 - bars))
    most, found = 0.5 * np.log(1 / NO_SIGNAL - 1), lam[np.isfinite(lam)]
    half = 0.5 * np.log(2)
    return lam.clip(min(-most, found.min() - half), max(most, found.max() + half))


def pipeline_timesteps(schedule: Schedule, steps: int) -> tuple[int, ...]:
    """The list of the teacher's own pipeline: what diffusers' DDIMScheduler makes of its `timestep_spacing`.

    Raises ValueError where `steps_offset` puts a step beyond the schedule, for which diffusers has no noise level either.
    """
    total, spacing = checked_total(schedule, steps), schedule.config.get("timestep_spacing", "leading")
    if spacing == "trailing":
        return trailing(total, steps)
    if spacing == "linspace":
        return as_timesteps(np.linspace(0, total - 1, steps).round()[::-1])
    offset = schedule.config.get("steps_offset", 0)
    found = as_timesteps(np.arange(steps)[::-1] * (total // steps) + offset)
    if found[0] >= total:
        raise ValueError(f"scheduler_config.json: steps_offset: {offset} puts the first of {steps} steps at timestep "
                         f"{found[0]}, beyond {total - 1}, the last that there is")
    return found


def dense_recipe(schedule: Schedule, steps: int) -> Recipe:
    """How the dense teacher samples: as diffusers' DDIMPipeline does with the teacher's own scheduler config."""
    return Recipe(timesteps=pipeline_timesteps(schedule, steps), solver="ddim_diffusers")


def dense_and_finer(schedule: Schedule, steps: int) -> tuple[Recipe, Recipe]:
    """The dense teacher's at `steps` steps and at twice as many; at the most below it where the schedule has not as many."""
    for n in range(min(steps, schedule.steps // 2), 0, -1):
        with contextlib.suppress(ValueError):  # of an offset
            return dense_recipe(schedule, n), dense_recipe(schedule, 2 * n)
    raise ValueError(f"scheduler_config.json: steps_offset: {schedule.config['steps_offset']} leaves no place for two steps")


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
    """Yield (step, x before it, x0 predicted in it), each NCHW; with the last step the sample instead of x0."""
    clip = clip_bound(schedule.config)
    steps = guided_steps(recipe_steps(schedule.config, recipe), guidance, clip)
    yield from integrate(with_guidance(predict, guidance, null_label), steps, noise, labels, clip)


@torch.inference_mode()
def sample(predict: Predict, schedule: Schedule, recipe: Recipe, noise: Tensor, labels: Tensor | None,
           guidance: float = 1.0, null_label: int = 0) -> Tensor:
    """-> NCHW images in [-1, 1]."""
    clip = clip_bound(schedule.config)
    steps = guided_steps(recipe_steps(schedule.config, recipe), guidance, clip)
    return final(with_guidance(predict, guidance, null_label), steps, noise, labels, clip)


def to_uint8(images: Tensor) -> np.ndarray:
    """NCHW in [-1, 1] -> NCHW uint8. Raises ValueError for images that are not finite: as integers they would be black."""
    if not images.isfinite().all():
        raise ValueError("sampling: an image is not finite: the network's prediction overflowed, or this backend's did")
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
