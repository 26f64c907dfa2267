"""One cell of the study: how its arm samples, how far its images stray, what it computed, how fast it is: metric -> value."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import results
from benchmarks.cache import rules
from benchmarks.cache.arms import CONVERGED, OURS, SUBLAYERS, Cell
from benchmarks.cache.lab import (
    BATCH,
    NOISE,
    Lab,
    first_pairs,
    further_pairs,
    sampled_features,
    span,
    trained_router,
    uniform,
    unseen_pairs,
)
from benchmarks.cache.packages import PACKAGES
from benchmarks.cache.work import counted_calls
from benchmarks.results import kept_features
from tasks.benchmark.measure import Case, interleaved
from tasks.cache_learn.baselines import time_threshold, uniform_interval
from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.router import router_costs
from tasks.core import quality
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import cached_network, initial_noise, labels_for, sample, trajectory
from tasks.fid.measure import losses
from tasks.runtime.graph import live_graph
from tasks.runtime.solver import Predict, recipe_steps

MARGIN, RESAMPLES = 0.05, 1000  # relative FID increase that still counts as equal; of the bootstrap


@dataclass(frozen=True, kw_only=True)
class Run:
    """A copy of the teacher as one arm has it. layers: its Linear and Conv2d by path, from before anything was wrapped."""

    predict: Predict
    recipe: Recipe
    layers: Mapping[str, nn.Module]
    denoiser: Denoiser


# ---- how an arm samples ----

def errors(lab: Lab, recipe: Recipe, *, budget: float, unit: str, max_masks: int, forecast: str,
           grown: bool = True) -> CachePlan:
    """grown: whether the table's errors count as what they grow to."""
    table = lab.table(unit) if grown else replace(lab.table(unit), growth=np.ones(len(lab.table(unit).grid)))
    costs = table.costs(recipe_steps(lab.teacher.schedule.config, recipe))
    return table.forecasting(plan_from_costs(costs, table.sublayers, budget, max_masks), forecast, recipe.timesteps)


def refined(lab: Lab, recipe: Recipe, *, budget: float, unit: str, learned: bool) -> CachePlan:
    return lab.refined(recipe, budget, unit, learned)


def router(lab: Lab, recipe: Recipe, *, budget: float, max_masks: int) -> CachePlan:
    return plan_from_costs(router_costs(lab.beta(recipe.nfe), recipe.nfe), lab.sublayers, budget, max_masks)


def rule(make: Callable[..., CachePlan], lab: Lab, recipe: Recipe, **settings) -> CachePlan:
    return make(recipe.nfe, lab.sublayers, **settings)


PLANS = {"errors": errors, "refined": refined, "router": router, "layers": partial(rule, rules.layers),
         "uniform_interval": partial(rule, uniform_interval), "time_threshold": partial(rule, time_threshold)}


def recipe_of(cell: Cell, lab: Lab) -> Recipe:
    """With the cell's plan, if it is one; a package's cache is in its model, not in the recipe."""
    recipe = uniform(lab.teacher, cell.solver, cell.nfe)
    if cell.arm is None or cell.arm.make in PACKAGES:
        return recipe
    settings = {**cell.arm.fixed, cell.arm.strength: cell.value}
    if cell.arm.make == "fewer_steps":
        return uniform(lab.teacher, cell.solver, round(cell.nfe * (1 - settings["budget"])))
    return replace(recipe, cache=PLANS[cell.arm.make](lab, recipe, **settings))


def opened(cell: Cell, lab: Lab) -> Run:
    denoiser = Denoiser(copy.deepcopy(lab.teacher.model), lab.teacher.schedule)
    recipe, layers = recipe_of(cell, lab), denoiser.prunable_layers()
    if cell.arm is not None and cell.arm.make in PACKAGES:
        chosen = {"sublayers": SUBLAYERS[cell.teacher]} if cell.arm.make == "taylorseer" else {}
        predict = PACKAGES[cell.arm.make](denoiser, recipe, **cell.arm.fixed, **chosen, **{cell.arm.strength: cell.value})
    else:
        predict = cached_network(denoiser, recipe)
    return Run(predict=predict, recipe=recipe, layers=layers, denoiser=denoiser)


# ---- what comes out, and for how much work ----

def features_path(cell: Cell, samples: range) -> str:
    return f"{cell.variant.replace('/', '-')}-{span(samples)}"


def drawn(cell: Cell, lab: Lab, run: Run, samples: range) -> np.ndarray:
    """(len(samples), 64) features, in the place of any that were kept."""
    found = sampled_features(lab, run.predict, run.recipe, samples, f"{lab.name} {cell.variant}")
    results.put(lab.folder / "features" / f"{features_path(cell, samples)}.npy", found)
    return found


def straying(cell: Cell, lab: Lab) -> dict[str, float]:
    """removed_share, macs_share, fidelity to the uncached run of the same solver and steps, FID of so few samples."""
    run, pairs = opened(cell, lab), first_pairs(lab.sizes)
    with counted_calls(run.layers) as calls:
        found = drawn(cell, lab, run, pairs)
    shares = lab.meter.shares(calls, -(-len(pairs) // BATCH) * cell.nfe)
    return {"removed_share": 1 - shares["computed_share"], "macs_share": shares["macs_share"],
            "fidelity": quality.paired_distance(found, lab.uncached(cell.solver, cell.nfe, pairs)) / lab.unit,
            quality.fid_name(len(pairs)): quality.fid(found, lab.judge.reference)}


def straying_further(cell: Cell, lab: Lab) -> dict[str, float]:
    """fidelity_further: of pairs that had no say in what was chosen to be judged by them."""
    pairs = further_pairs(lab.sizes)
    found = drawn(cell, lab, opened(cell, lab), pairs)
    return {"fidelity_further": quality.paired_distance(found, lab.uncached(cell.solver, cell.nfe, pairs)) / lab.unit}


def judged(cell: Cell, lab: Lab) -> dict[str, float]:
    """FID of many samples, and its increase over the uncached run by paired bootstrap. Through OpenVINO: plans only."""
    n = lab.sizes.finalists
    own, base = (many(lab, c, range(n)) for c in (cell, uncached(cell)))
    judge = lab.finalists_judge
    rows = losses({"dense": base, cell.variant: own}, judge, lab.strata(n), MARGIN, RESAMPLES, np.random.default_rng(0))
    return {quality.fid_name(n): quality.fid(own, judge.reference),
            f"{quality.fid_name(n)}_uncached": quality.fid(base, judge.reference),
            "loss": rows[cell.variant]["loss"], "loss_upper95": rows[cell.variant]["loss_upper95"]}


def straying_unseen(cell: Cell, lab: Lab) -> dict[str, float]:
    """fidelity_unseen: of more pairs, that judge nothing else. Through OpenVINO: plans only."""
    pairs = unseen_pairs(lab.sizes)
    return {"fidelity_unseen": quality.paired_distance(*(many(lab, c, pairs) for c in (cell, uncached(cell)))) / lab.unit}


def uncached(cell: Cell) -> Cell:
    return replace(cell, arm=None, value=None)


def many(lab: Lab, cell: Cell, samples: range) -> np.ndarray:
    recipe = recipe_of(cell, lab)
    return kept_features(lab.folder, f"{features_path(cell, samples)}-many", lambda: sampled_features(
        lab, live_graph(lab.teacher, recipe, BATCH), recipe, samples, f"{lab.name} {cell.variant}"))


def to_converged(cell: Cell, lab: Lab) -> dict[str, float]:
    """Distance to the images that DPM-Solver++ ends at, and what the way there costs, in evaluations of the whole network."""
    run, pairs = opened(cell, lab), first_pairs(lab.sizes)
    with counted_calls(run.layers) as calls:
        found = sampled_features(lab, run.predict, run.recipe, pairs, f"{lab.name} {cell.variant}")
    converged = lab.uncached(CONVERGED.solver, CONVERGED.nfe, pairs)
    return {"converged_evaluations": lab.meter.shares(calls, -(-len(pairs) // BATCH))["macs_share"],
            "converged_distance": quality.paired_distance(found, converged) / lab.unit}


# ---- speed ----

def router_time(cell: Cell, lab: Lab) -> dict[str, float]:
    """Seconds of training the router from nothing; its checkpoints are kept as in use."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        trained_router(lab, cell.nfe, Checkpoint(Path(folder), "router"))
        return {"router_s": time.monotonic() - began}


def timed(cells: list[Cell], lab: Lab) -> dict[str, dict[str, float]]:
    """Variant -> its numbers, for all strengths of one arm under one setting: whole trajectories of BATCH images, in turns with
    the uncached run. speedup_<backend>: median over rounds of the ratio; speedup_predicted: from the MACs that were left."""
    base = replace(cells[0], arm=None, value=None)
    runs = {cell.variant: opened(cell, lab) for cell in (base, *cells)}
    found = {name: predicted(run, lab, base.nfe) for name, run in runs.items()}
    for backend in cells[0].arm.backends:
        cases = [Case(variant=name, backend=backend, batch=BATCH, run=whole(run, lab, backend)) for name, run in runs.items()]
        times = interleaved(cases, warmup=1, min_repeats=lab.sizes.repeats, max_repeats=100, budget_s=lab.sizes.timed_s)
        uncached = times[cases[0].key]
        for name, case in zip(runs, cases, strict=True):
            ratios = [u / own for u, own in zip(uncached, times[case.key], strict=True)]
            found[name] |= {f"latency_ms_{backend}": 1e3 * statistics.median(times[case.key]),
                            f"speedup_{backend}": statistics.median(ratios)}
            if cells[0].arm.name == OURS and name != base.variant:
                found[name] |= step_times(runs[name], lab, backend)
    return found


def step_times(run: Run, lab: Lab, backend: str) -> dict[str, float]:
    """Median ms of the steps of a cached run that compute all blocks, of those that skip them, and of these right after one of
    the former."""
    whole_steps = [all(row) for row in run.recipe.cache.compute]
    noise, labels = noise_and_labels(lab)
    predict, elapsed = predictor(run, lab, backend), []
    for _ in range(1 + lab.sizes.repeats):  # the first one warms up
        began, times = time.perf_counter(), []
        for _ in trajectory(predict, lab.teacher.schedule, run.recipe, noise, labels):
            times.append(1e3 * (time.perf_counter() - began))
            began = time.perf_counter()
        elapsed.append(times)
    found: dict[str, list[float]] = {}
    for times in elapsed[1:]:
        for i, (ms, whole) in enumerate(zip(times, whole_steps, strict=True)):
            after_whole = not whole and whole_steps[i - 1]
            for kind in ("whole",) if whole else ("skipped", "skipped_after_whole") if after_whole else ("skipped",):
                found.setdefault(f"{kind}_ms_{backend}", []).append(ms)
    return {name: statistics.median(times) for name, times in found.items()}


def predicted(run: Run, lab: Lab, nfe: int) -> dict[str, float]:
    """Of the very trajectory that is timed. Raises ValueError for a cache that carries something over to the next one."""
    go = whole(run, lab, "eager")
    with counted_calls(run.layers) as calls:
        first = go()
    shares = lab.meter.shares(calls, nfe)
    if not torch.equal(first, go()):
        raise ValueError("a second trajectory from the same noise gives other images: the cache is not reset")
    return {"removed_share_timed": 1 - shares["computed_share"], "speedup_predicted": 1 / shares["macs_share"]}


def whole(run: Run, lab: Lab, backend: str) -> Callable[[], torch.Tensor]:
    (noise, labels), predict = noise_and_labels(lab), predictor(run, lab, backend)
    return lambda: sample(predict, lab.teacher.schedule, run.recipe, noise, labels)


def noise_and_labels(lab: Lab) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the batch that is timed."""
    return (initial_noise(lab.teacher.sample_shape, range(BATCH), NOISE), labels_for(range(BATCH), lab.teacher.num_classes))


def predictor(run: Run, lab: Lab, backend: str) -> Predict:
    return live_graph(lab.teacher, run.recipe, BATCH) if backend == "openvino" else run.predict


def groups(cells: list[Cell]) -> list[list[Cell]]:
    """Cells that are timed together."""
    found: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.teacher, cell.setting, cell.arm.name), []).append(cell)
    return list(found.values())
