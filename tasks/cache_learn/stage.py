"""Which sublayers may be skipped and what they return then, learned on the dense teacher: reuse errors, a router, whole runs.

Reads: data (train split), pretrain_load (teacher).
Writes: errors.npy E[sublayer, from, to] on the timesteps of grid.json, for planning on any timestep list; products.npy, from
which plans on any list have weights; in grid.json, how errors grow and how plans forecast and may learn more; router.csv (cache
step, timestep, sublayer, beta) and curve.csv of its training; refine_curve.csv of the plan that was refined on whole
trajectories, forecast_curve.csv of the training of its weights; plan.json, the CachePlan on the base list: of what was learned
the plan whose images are closest to the uncached run's. Report: what each plan removes and how far it strays, beside rules
without learning.
Left out: other timestep lists (evolve plans for those from the table, whose entries are of plain reuse).
"""

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.errors import empty_errors, measure_errors, measure_growth, measure_products
from tasks.cache_learn.forecast import Reference, fit, sample_plan, train
from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.refine import proposals, refine, straying
from tasks.cache_learn.router import router_costs, step_pairs, threshold_plan, train_router
from tasks.cache_learn.table import ReuseTable
from tasks.core.artifacts import Inputs, Report, write_json
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser, load
from tasks.core.params import check_choice, check_range
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import SPACINGS, initial_noise, labels_for, network, sample, spaced_timesteps
from tasks.runtime.cache import FORECASTS, TRUNK, has_trunk
from tasks.runtime.solver import SOLVERS, recipe_steps

INPUTS = ("data", "pretrain_load")
UNITS = ("trunk", "sublayer")
LEARNED = ("errors", "router", "refined")  # may be chosen; the others, as published or without learning, only reuse


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
        check_choice("cache_learn.router.reduction", self.reduction, ("mean", "sum"))
        for name, low, high in (("steps", 1, 10**7), ("batch", 1, 4096), ("lr", 0, 10), ("lam", 0, 1e6), ("theta", 0, 1),
                                ("label_dropout", 0, 1)):
            check_range(f"cache_learn.router.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class RefineParams:
    """Of the search on whole trajectories; see `refine.refine`."""

    images: int            # compared with the uncached run's
    tries: int             # changes of the plan; 0: the best of those that the table proposes

    def __post_init__(self):
        for name, low, high in (("images", 1, 10**5), ("tries", 0, 10**6)):
            check_range(f"cache_learn.refine.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class WeightsParams:
    """Training of the refined plan's forecast weights; see `forecast.train`."""

    steps: int             # 0: as the least squares have them
    batch: int             # of refine.images
    lr: float
    window: int

    def __post_init__(self):
        for name, low, high in (("steps", 0, 10**6), ("batch", 1, 4096), ("lr", 0, 10), ("window", 1, 1000)):
            check_range(f"cache_learn.weights.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class Params:
    base_steps: int        # NFE of the list that router and plan are made for
    spacing: str           # uniform | logsnr | quadratic
    solver: str            # see runtime/solver.py
    grid: int              # timesteps of the error table
    error_samples: int
    max_gap: int           # grid intervals
    budget: float          # share of sublayer evaluations to remove
    max_masks: int         # distinct step masks, the full one included
    unit: str              # trunk | sublayer: what is skipped by the plans from the table
    forecast: str          # none | taylor | learned: what a skipped sublayer returns in the learned plans
    validation: int        # noises on which plans are compared
    seed: int
    router: RouterParams
    refine: RefineParams
    weights: WeightsParams

    def __post_init__(self):
        check_choice("cache_learn.spacing", self.spacing, SPACINGS)
        check_choice("cache_learn.solver", self.solver, SOLVERS)
        check_choice("cache_learn.unit", self.unit, UNITS)
        check_choice("cache_learn.forecast", self.forecast, FORECASTS)
        for name, low, high in (("base_steps", 2, 1000), ("grid", 3, 1000), ("error_samples", 1, 10**5), ("budget", 0, 0.95),
                                ("max_gap", 1, self.grid - 1), ("max_masks", 1, 8), ("validation", 1, 10**5)):
            check_range(f"cache_learn.{name}", getattr(self, name), low, high)


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    denoiser = load(inputs["pretrain_load"] / "teacher")
    sublayers = units_of(denoiser, "sublayer")
    recipe = Recipe(timesteps=spaced_timesteps(denoiser.schedule, params.base_steps, params.spacing), solver=params.solver)

    table = reuse_table(denoiser, params, inputs.checkpoint)
    beta, curve = router(denoiser, sublayers, recipe.timesteps, params, inputs)
    reference = reference_of(denoiser, recipe, table.sublayers, params)
    plans = compared_plans(table, beta, reference, sublayers, params)
    plans["refined"], curves = refined_plan(table, reference, params, inputs.checkpoint)
    distances = rollout_distances(denoiser, recipe, plans, params)
    chosen = min(LEARNED, key=lambda name: np.median(distances[name]))

    learn = {"images": params.refine.images, **asdict(params.weights)} if params.forecast == "learned" else None
    table.write(out, forecast=params.forecast, learn=learn)
    write_json(out / "plan.json", {"timesteps": recipe.timesteps, **asdict(plans[chosen])})
    write_rows(out / "router.csv", ("step", "timestep", "sublayer", "beta"), router_rows(beta, recipe.timesteps, sublayers))
    write_rows(out / "curve.csv", ("step", "loss"), curve)
    for name, (header, rows) in curves.items():
        write_rows(out / f"{name}_curve.csv", header, rows)
    return Report({"chosen": chosen, "plans": {name: summary(plan, distances[name]) for name, plan in plans.items()}})


def units_of(denoiser: Denoiser, unit: str) -> list[str]:
    """What a plan may skip: all blocks at once, or every sublayer for itself; this, too, where the blocks are no trunk."""
    if unit == "trunk" and has_trunk(denoiser.model):
        return [TRUNK]
    if unit == "trunk":
        print("cache_learn.unit: trunk, but skip blocks hand on an image beside their output: each sublayer is planned for "
              "itself, as unit sublayer says", flush=True)
    return [s.name for s in denoiser.sublayers()]


def reuse_table(denoiser: Denoiser, params: Params, checkpoint: Callable[[str], Checkpoint]) -> ReuseTable:
    sublayers, grid = units_of(denoiser, params.unit), spaced_timesteps(denoiser.schedule, params.grid)
    noise, labels = draws(denoiser, range(params.error_samples), params.seed)

    def kept(name: str, empty: np.ndarray, measure: Callable[..., np.ndarray]) -> np.ndarray:
        store = checkpoint(f"cache_{name}")
        saved = store.load()
        return measure(saved[name].numpy() if saved else empty,
                       keep=lambda array: store.save_if_due(lambda: {name: torch.from_numpy(array)}))

    errors = kept("errors", empty_errors(len(sublayers), len(grid)),
                  partial(measure_errors, denoiser, sublayers, grid, noise, labels, params.max_gap))
    growth = kept("growth", np.full(len(grid), np.nan), partial(measure_growth, denoiser, grid, noise, labels))
    products = measure_products(denoiser, sublayers, grid, noise, labels)
    return ReuseTable(sublayers=sublayers, grid=grid, errors=errors, growth=growth, products=products)


def draws(denoiser: Denoiser, indices: range, seed: int) -> tuple[Tensor, Tensor | None]:
    """Noise and stratified labels of the samples `indices`."""
    return initial_noise(denoiser.sample_shape, indices, seed), labels_for(indices, denoiser.num_classes)


def router(denoiser: Denoiser, sublayers: list[str], timesteps: tuple[int, ...], params: Params,
           inputs: Inputs) -> tuple[Tensor, list[tuple[int, float]]]:
    images, labels = training_images(denoiser, inputs)
    how = asdict(params.router) | ({} if denoiser.has_null_label else {"label_dropout": 0.0})
    del how["theta"]
    return train_router(denoiser, sublayers, images, labels, timesteps, **how, seed=params.seed,
                        checkpoint=inputs.checkpoint("cache_router"))


def training_images(denoiser: Denoiser, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    images = torch.from_numpy(np.load(inputs["data"] / "train.npy")).float() / 127.5 - 1
    path = inputs["data"] / "train_labels.npy"
    return images, torch.from_numpy(np.load(path)) if denoiser.num_classes and path.exists() else None


def reference_of(denoiser: Denoiser, recipe: Recipe, sublayers: Sequence[str], params: Params) -> Reference:
    """Of noises that neither the error table nor the comparison of plans has."""
    first = params.error_samples + params.validation
    return Reference.of(denoiser, recipe, sublayers,
                        *draws(denoiser, range(first, first + params.refine.images), params.seed))


def refined_plan(table: ReuseTable, reference: Reference, params: Params,
                 checkpoint: Callable[[str], Checkpoint]) -> tuple[CachePlan, dict[str, tuple[tuple[str, str], list]]]:
    """For the reference's list, of the table's sublayers. -> plan, header and rows of its curves by name."""
    proposed = proposals(costs_of(table, reference), table.sublayers, params.budget, params.max_masks, params.forecast)
    plan, curve = refine(proposed, straying(reference, params.forecast), params.budget, params.max_masks, params.refine.tries,
                         params.seed, checkpoint("cache_refine"))
    curves = {"refine": (("try", "distance"), curve)}
    if params.forecast == "learned":
        plan, curve = train(fit(plan, reference)[0], reference, **asdict(params.weights),
                            checkpoint=checkpoint("cache_forecast"))
        curves["forecast"] = ("step", "loss"), curve
    return plan, curves


def costs_of(table: ReuseTable, reference: Reference) -> np.ndarray:
    """(S, N, N) between the steps of the reference's list."""
    return table.costs(recipe_steps(reference.denoiser.schedule.config, reference.recipe))


def compared_plans(table: ReuseTable, beta: Tensor, reference: Reference, routed: Sequence[str],
                   params: Params) -> dict[str, CachePlan]:
    """All at the share `budget`, as far as they can reach it, but router_published, whose share its theta decides. What is
    learned forecasts, what is published or a rule reuses. routed: the sublayers of beta."""
    steps, recipe = params.base_steps, reference.recipe
    of = partial(plan_from_costs, budget=params.budget, max_masks=params.max_masks)
    return {
        "errors": table.forecasting(of(costs_of(table, reference), table.sublayers), params.forecast, recipe.timesteps),
        "router": forecasting(of(router_costs(beta, steps), routed), reference.recording(routed), params.forecast),
        "router_published": threshold_plan(beta, params.router.theta, steps, routed),
        "uniform_interval": uniform_interval(steps, table.sublayers, params.budget),
        "time_threshold": time_threshold(steps, table.sublayers, params.budget),
    }


def forecasting(plan: CachePlan, reference: Reference, forecast: str) -> CachePlan:
    return fit(plan, reference)[0] if forecast == "learned" else replace(plan, forecast=forecast)


def rollout_distances(denoiser: Denoiser, recipe: Recipe, plans: Mapping[str, CachePlan],
                      params: Params) -> dict[str, np.ndarray]:
    """(validation,) for each plan: mean squared pixel difference, in [-1, 1], to the uncached image of the same noise."""
    first = params.error_samples  # noises that the error table has not seen
    noise, labels = draws(denoiser, range(first, first + params.validation), params.seed)
    uncached = sample(network(denoiser), denoiser.schedule, recipe, noise, labels)
    images = {name: sample_plan(denoiser, replace(recipe, cache=plan), noise, labels) for name, plan in plans.items()}
    return {name: (found - uncached).square().mean(dim=(1, 2, 3)).numpy() for name, found in images.items()}


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
