"""Which sublayers may reuse their last outputs, learned on the dense teacher: reuse errors, a router, hard gates, whole runs.

Reads: data (train split), pretrain_load (teacher).
Writes: errors.npy E[sublayer, from, to] on the timesteps of grid.json, for planning on any timestep list; router.csv (cache
step, timestep, sublayer, beta) and curve.csv of its training; refine_curve.csv of the plan that was refined on whole
trajectories; hard_curve.csv where hard gates were trained; plan.json, the CachePlan on the base list: of what was learned the
plan whose images are closest to the uncached run's. Report: what each plan removes and how far it strays, beside rules without
learning.
Left out: other timestep lists (evolve plans for those from the table); forecasts in the table: its entries are of plain reuse.
"""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.errors import empty_errors, interpolate_errors, measure_errors
from tasks.cache_learn.plan import plan_from_costs, step_weights
from tasks.cache_learn.refine import proposals, refine, sample_cached, straying
from tasks.cache_learn.rollout import train_rollout
from tasks.cache_learn.router import router_costs, step_pairs, threshold_plan, train_hard_router, train_router
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser, load
from tasks.core.params import check_choice, check_range
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import SPACINGS, initial_noise, labels_for, network, sample, spaced_timesteps
from tasks.runtime.cache import FORECASTS
from tasks.runtime.solver import SOLVERS

INPUTS = ("data", "pretrain_load")
LEARNED = ("errors", "router", "hard", "refined")  # may be chosen; the others, as published or without learning, only reuse


@dataclass(frozen=True, kw_only=True)
class RouterParams:
    """Training of the Learning-to-Cache router; see `router.train_router`."""

    steps: int             # all pairs together
    batch: int
    lr: float
    lam: float             # weight of sum beta
    reduction: str         # mean | sum
    theta: float           # computed where beta > theta
    label_dropout: float

    def __post_init__(self):
        check_choice("router.reduction", self.reduction, ("mean", "sum"))
        for name, low, high in (("steps", 1, 10**7), ("batch", 1, 4096), ("lr", 0, 10), ("lam", 0, 1e6), ("theta", 0, 1),
                                ("label_dropout", 0, 1)):
            check_range(f"router.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class HardParams:
    """Training of a plan with hard gates under `budget` and `max_masks`; see `leader.Leader`."""

    along: str             # pairs (as the router's) | trajectory (see `rollout.train_rollout`)
    steps: int             # 0: not trained
    batch: int
    lr: float
    noise: float
    window: int            # along the trajectory: steps that a gradient passes back through
    label_dropout: float

    def __post_init__(self):
        check_choice("hard.along", self.along, ("pairs", "trajectory"))
        for name, low, high in (("steps", 0, 10**6), ("batch", 1, 4096), ("lr", 0, 10), ("noise", 0, 10), ("window", 2, 1000),
                                ("label_dropout", 0, 1)):
            check_range(f"hard.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class RefineParams:
    """Of the search on whole trajectories; see `refine.refine`."""

    images: int            # compared with the uncached run's
    tries: int             # changes of the plan; 0: the best of those that the table proposes

    def __post_init__(self):
        for name, low, high in (("images", 1, 10**5), ("tries", 0, 10**6)):
            check_range(f"refine.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class Params:
    base_steps: int        # NFE of the list that router and plan are made for
    spacing: str           # uniform | logsnr | quadratic
    solver: str            # ddim | dpm2m
    grid: int              # timesteps of the error table
    error_samples: int
    max_gap: int           # grid intervals
    budget: float          # share of sublayer evaluations to remove
    max_masks: int         # distinct step masks, the full one included
    forecast: str          # none | taylor: what a skipped sublayer returns in the learned plans
    validation: int        # noises on which plans are compared
    seed: int
    refine: RefineParams
    router: RouterParams
    hard: HardParams

    def __post_init__(self):
        check_choice("spacing", self.spacing, SPACINGS)
        check_choice("solver", self.solver, SOLVERS)
        check_choice("forecast", self.forecast, FORECASTS)
        for name, low, high in (("base_steps", 2, 1000), ("grid", 2, 1000), ("error_samples", 1, 10**5), ("budget", 0, 0.95),
                                ("max_gap", 1, self.grid - 1), ("max_masks", 1, 8), ("validation", 1, 10**5)):
            check_range(name, getattr(self, name), low, high)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    denoiser = load(inputs["pretrain_load"] / "teacher")
    sublayers = [s.name for s in denoiser.sublayers()]
    recipe = Recipe(timesteps=spaced_timesteps(denoiser.schedule, params.base_steps, params.spacing), solver=params.solver)
    grid = spaced_timesteps(denoiser.schedule, params.grid)

    errors = error_table(denoiser, sublayers, grid, params, inputs)
    beta, curve = router(denoiser, sublayers, recipe.timesteps, params, inputs)
    plans = compared_plans(errors, grid, beta, denoiser, sublayers, recipe, params)
    if params.hard.steps:
        plans["hard"], hard_curve = hard_plan(errors, grid, denoiser, sublayers, recipe, params, inputs)
        write_rows(out / "hard_curve.csv", ("step", "loss"), hard_curve)
    plans |= {name: replace(plan, forecast=params.forecast) for name, plan in plans.items() if name in LEARNED}
    plans["refined"], refine_curve = refined_plan(errors, grid, denoiser, sublayers, recipe, params,
                                                  inputs.checkpoint("cache_refine"))
    distances = dict(zip(plans, rollout_distances(denoiser, recipe, plans.values(), params), strict=True))
    chosen = min((name for name in LEARNED if name in plans), key=lambda name: np.median(distances[name]))

    np.save(out / "errors.npy", errors)
    write_json(out / "grid.json", {"timesteps": grid, "sublayers": sublayers, "forecast": params.forecast})
    write_json(out / "plan.json", {"timesteps": recipe.timesteps, **asdict(plans[chosen])})
    write_rows(out / "router.csv", ("step", "timestep", "sublayer", "beta"), router_rows(beta, recipe.timesteps, sublayers))
    write_rows(out / "curve.csv", ("step", "loss"), curve)
    write_rows(out / "refine_curve.csv", ("try", "distance"), refine_curve)
    return Report({"chosen": chosen, "plans": {name: summary(plan, distances[name]) for name, plan in plans.items()}})


def error_table(denoiser: Denoiser, sublayers: list[str], grid: tuple[int, ...], params: Params, inputs: Inputs) -> np.ndarray:
    checkpoint = inputs.checkpoint("cache_errors")
    saved = checkpoint.load()
    errors = saved["errors"].numpy() if saved else empty_errors(len(sublayers), len(grid))
    noise, labels = draws(denoiser, range(params.error_samples), params.seed)
    return measure_errors(denoiser, sublayers, grid, noise, labels, params.max_gap, errors,
                          keep=lambda table: checkpoint.save_if_due(lambda: {"errors": torch.from_numpy(table)}))


def draws(denoiser: Denoiser, indices: range, seed: int) -> tuple[Tensor, Tensor | None]:
    """Noise and stratified labels of the samples `indices`."""
    return initial_noise(denoiser.sample_shape, indices, seed), labels_for(indices, denoiser.num_classes)


def router(denoiser: Denoiser, sublayers: list[str], timesteps: tuple[int, ...], params: Params,
           inputs: Inputs) -> tuple[Tensor, list[tuple[int, float]]]:
    images, labels = training_images(denoiser, inputs)
    how = asdict(params.router)
    del how["theta"]
    return train_router(denoiser, sublayers, images, labels, timesteps, **how, seed=params.seed,
                        checkpoint=inputs.checkpoint("cache_router"))


def training_images(denoiser: Denoiser, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    images = torch.from_numpy(np.load(inputs["data"] / "train.npy")).float() / 127.5 - 1
    path = inputs["data"] / "train_labels.npy"
    return images, torch.from_numpy(np.load(path)) if denoiser.num_classes and path.exists() else None


def hard_plan(errors: np.ndarray, grid: tuple[int, ...], denoiser: Denoiser, sublayers: list[str], recipe: Recipe,
              params: Params, inputs: Inputs) -> tuple[CachePlan, list[tuple[int, float]]]:
    how = asdict(params.hard) | {"budget": params.budget, "max_masks": params.max_masks, "seed": params.seed}
    along, window = how.pop("along"), how.pop("window")
    checkpoint = inputs.checkpoint("cache_hard")
    if along == "pairs":
        images, labels = training_images(denoiser, inputs)
        return train_hard_router(denoiser, sublayers, images, labels, recipe.timesteps, **how,
                                 reduction=params.router.reduction, checkpoint=checkpoint)
    return train_rollout(denoiser, sublayers, reuse_costs(errors, grid, denoiser, recipe), recipe, **how, window=window,
                         forecast=params.forecast, checkpoint=checkpoint)


def reuse_costs(errors: np.ndarray, grid: tuple[int, ...], denoiser: Denoiser, recipe: Recipe) -> np.ndarray:
    """(S, N, N) between the steps of the recipe, see `plan_from_costs`."""
    return interpolate_errors(errors, grid, recipe.timesteps) * step_weights(denoiser.schedule.config, recipe.timesteps,
                                                                             recipe.solver)


def refined_plan(errors: np.ndarray, grid: tuple[int, ...], denoiser: Denoiser, sublayers: list[str], recipe: Recipe,
                 params: Params, checkpoint: Checkpoint) -> tuple[CachePlan, list[tuple[int, float]]]:
    """On noises that neither the error table nor the comparison of plans has."""
    first = params.error_samples + params.validation
    noise, labels = draws(denoiser, range(first, first + params.refine.images), params.seed)
    proposed = proposals(reuse_costs(errors, grid, denoiser, recipe), sublayers, params.budget, params.max_masks,
                         params.forecast)
    return refine(proposed, straying(denoiser, recipe, noise, labels), params.budget, params.max_masks, params.refine.tries,
                  params.seed, checkpoint)


def compared_plans(errors: np.ndarray, grid: tuple[int, ...], beta: Tensor, denoiser: Denoiser, sublayers: list[str],
                   recipe: Recipe, params: Params) -> dict[str, CachePlan]:
    """All at the share `budget`, as far as they can reach it, but router_published, whose share its theta decides."""
    steps = len(recipe.timesteps)
    return {
        "errors": plan_from_costs(reuse_costs(errors, grid, denoiser, recipe), sublayers, params.budget, params.max_masks),
        "router": plan_from_costs(router_costs(beta, steps), sublayers, params.budget, params.max_masks),
        "router_published": threshold_plan(beta, params.router.theta, steps, sublayers),
        "uniform_interval": uniform_interval(steps, sublayers, params.budget),
        "time_threshold": time_threshold(steps, sublayers, params.budget),
    }


def rollout_distances(denoiser: Denoiser, recipe: Recipe, plans: Iterable[CachePlan], params: Params) -> list[np.ndarray]:
    """(validation,) for each plan: mean squared pixel difference, in [-1, 1], to the uncached image of the same noise."""
    first = params.error_samples  # noises that the error table has not seen
    noise, labels = draws(denoiser, range(first, first + params.validation), params.seed)
    reference = sample(network(denoiser), denoiser.schedule, recipe, noise, labels)
    return [(sample_cached(denoiser, recipe, plan, noise, labels) - reference).square().mean(dim=(1, 2, 3)).numpy()
            for plan in plans]


def summary(plan: CachePlan, distances: np.ndarray) -> dict:
    """A few samples that turn into another image decide the mean, so plans are compared by the median."""
    return {"removed_share": plan.removed_share, "masks": len(plan.masks), "rollout_mse_median": float(np.median(distances)),
            "rollout_mse_mean": float(distances.mean())}


def router_rows(beta: Tensor, timesteps: tuple[int, ...], sublayers: list[str]) -> list[tuple]:
    return [(m, timesteps[m], name, value) for row, (_, m) in zip(beta.tolist(), step_pairs(len(timesteps)), strict=True)
            for name, value in zip(sublayers, row, strict=True)]


def write_rows(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
