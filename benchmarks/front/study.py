"""One point of the study: its recipe, its network as it runs, its samples, what they are worth and how fast they come."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.front.lab import CALIBRATION, HEAT_NOISE, NOISE, Lab
from benchmarks.front.networks import denoiser_of, rows_of
from benchmarks.front.peers import CALLERS
from benchmarks.front.points import DENSE, OURS, Point, steps_of
from benchmarks.results import kept_features, made
from tasks.benchmark.measure import Case, interleaved
from tasks.cache_learn.forecast import Reference, fit
from tasks.core import quality
from tasks.core.artifacts import digest, read_json, write_json
from tasks.core.calibration import ranges_on_trajectory
from tasks.core.denoiser import Denoiser
from tasks.core.learned import timesteps_of
from tasks.core.progress import track
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import dense_recipe, initial_noise, labels_for, sample, sample_in_chunks, spaced_timesteps
from tasks.fid import dull
from tasks.package.variants import uniform_precision
from tasks.runtime.cache import TRUNK
from tasks.runtime.graph import open_graph
from tasks.runtime.graph_export import export
from tasks.runtime.meaning import LEARNED
from tasks.runtime.precision import apply_precision
from tasks.runtime.solver import Predict

BATCHES = (8, 1)      # images that are timed together; eager points are judged in batches of the first: some caches decide for
                      # a whole batch at once
TOGETHER = 50         # images of an evaluation while OpenVINO samples what is judged
BLOCK = 500           # samples that are kept at a time
STATES = 256          # that int8 ranges come from
PLANNING = 32         # images that a cache plan is chosen on


# ---- what a point is ----

def sampling(point: Point, lab: Lab, best: Mapping[int, str]) -> dict:
    """Arguments of a Recipe. best: the best dull sampler of each number of steps."""
    schedule = lab.teacher.schedule
    if point == DENSE:
        return dense_recipe(schedule, steps_of(point)).sampling
    if point.sampler == point.weights or point.weights.startswith(f"{point.sampler}_"):
        rows = rows_of(lab, point.weights)
        return {"timesteps": timesteps_of(rows), "solver": LEARNED, "rows": tuple(rows)}
    name, _, steps = point.sampler.rpartition("_")
    if name == "learned":
        rows = lab.learned_rows(int(steps))
        return {"timesteps": timesteps_of(rows), "solver": LEARNED, "rows": tuple(rows)}
    if name == "best":
        if int(steps) not in best:
            raise ValueError(f"front: no dull point of {steps} steps was tried on {lab.name} yet; run the part trials first")
        name = best[int(steps)].rpartition("_")[0]
    solver, spacing = name.rsplit("_", 1)
    return {"timesteps": spaced_timesteps(schedule, int(steps), spacing), "solver": solver}


def recipe_of(point: Point, lab: Lab, best: Mapping[int, str]) -> Recipe:
    network = denoiser_of(lab, point.weights)
    precision = uniform_precision(network.prunable_layers(), point.precision)
    recipe = Recipe(**sampling(point, lab, best), precision=precision)
    return replace(recipe, cache=kept_plan(point, lab, network, recipe)) if point.cached else recipe


def kept_plan(point: Point, lab: Lab, network: Denoiser, recipe: Recipe) -> CachePlan:
    """Of the network in fp32, so precisions share it."""
    key = digest([point.weights, replace(recipe, precision={}).to_json()])[:8]
    path = lab.folder / "plans" / f"{point.weights}-{key}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(cache_plan(network, recipe)))
    return CachePlan.from_json(read_json(path))


def cache_plan(network: Denoiser, recipe: Recipe) -> CachePlan:
    """All blocks are skipped at one step, with weights by least squares; the step that strays least from the uncached run."""
    sublayers = (TRUNK,) if network.architecture == "dit" else tuple(one.name for one in network.sublayers())
    images = range(PLANNING)
    plain = Denoiser(copy.deepcopy(network.model), network.schedule)
    reference = Reference.of(plain, replace(recipe, precision={}), sublayers,
                             initial_noise(network.sample_shape, images, CALIBRATION), labels_for(images, network.num_classes))
    compute = [tuple((step != skipped,) * len(sublayers) for step in range(recipe.nfe)) for skipped in range(1, recipe.nfe)]
    fitted = [fit(CachePlan(sublayers=sublayers, compute=rows), reference) for rows in compute]
    return min(fitted, key=lambda found: reference.distance(found[1]))[0]


def opened(point: Point, lab: Lab, recipe: Recipe, batch: int) -> Predict:
    """Of a copy of the network; graphs that hold the same are opened once."""
    if point.caller != OURS:
        network = denoiser_of(lab, point.weights)
        return CALLERS[point.caller](lab, Denoiser(copy.deepcopy(network.model), network.schedule), recipe, batch,
                                     **point.settings)
    folder = exported(point, lab, recipe)
    if (folder, batch) not in lab.kept:
        lab.kept[folder, batch] = open_graph(folder, batch, torch.get_num_threads())
    return lab.kept[folder, batch]


def exported(point: Point, lab: Lab, recipe: Recipe) -> Path:
    """The graphs of ours. One folder for all recipes, but where ranges or a plan are of the recipe's own trajectory."""
    own = digest(recipe.to_json())[:8] if point.cached or point.precision == "w8a8" else "any"

    def write(out: Path) -> None:
        network = denoiser_of(lab, point.weights)
        live = Denoiser(copy.deepcopy(network.model), network.schedule)
        ranges = ranges_on_trajectory(live, recipe, STATES, CALIBRATION)
        apply_precision(live.model, recipe.precision, ranges)
        export(live.model, recipe, out)

    return made(lab.folder / "graphs" / f"{point.weights}-{point.precision}-{own}", write)


# ---- what its samples are worth ----

def features_of(point: Point, lab: Lab, n: int, best: Mapping[int, str]) -> np.ndarray:
    """(n, 64) of the report net. Kept block by block; other points' samples i are of the same noise and label."""
    @functools.cache
    def how() -> tuple[Predict, Recipe, int]:
        batch = TOGETHER if point.backend == "openvino" else BATCHES[0]
        recipe = recipe_of(point, lab, best)
        return opened(point, lab, recipe, batch), recipe, batch

    def draw(first: int, last: int) -> np.ndarray:
        predict, recipe, batch = how()
        return sampled(lab, predict, recipe, range(first, last), NOISE, batch)

    edges = [(first, min(n, first + BLOCK)) for first in range(0, n, BLOCK)]
    blocks = [kept_features(lab.folder, f"{point.file}/{first}-{last}", functools.partial(draw, first, last))
              for first, last in track(edges, len(edges), f"{lab.name} {point.name}")]
    forget_graphs(lab)
    return np.concatenate(blocks)


def sampled(lab: Lab, predict: Predict, recipe: Recipe, samples: range, seed: int, batch: int) -> np.ndarray:
    teacher = lab.teacher
    chunks = sample_in_chunks(predict, teacher.schedule, recipe, teacher.sample_shape, len(samples), seed, teacher.num_classes,
                              batch, samples.start)
    return np.concatenate([quality.features(lab.judge.net, chunk) for chunk in chunks])


def forget_graphs(lab: Lab) -> None:
    for key in [key for key in lab.kept if isinstance(key[0], Path)]:
        del lab.kept[key]


def judged(point: Point, lab: Lab, n: int, best: Mapping[int, str]) -> dict[str, float]:
    """FID of n samples, and its increase over the dense teacher's on the same noise: estimate and 95 % bound."""
    found = features_of(point, lab, n, best)
    numbers = {quality.fid_name(n): lab.bootstrap.fids(found)[0]}
    if point == DENSE:
        return numbers
    over = difference(lab, found, features_of(DENSE, lab, n, best))
    return {**numbers, "loss": over.estimate, "loss_upper95": over.upper95}


def difference(lab: Lab, found: np.ndarray, base: np.ndarray) -> quality.Difference:
    """Relative FID of the two, paired."""
    (own, drawn), (other, others) = lab.bootstrap.fids(found), lab.bootstrap.fids(base)
    return quality.relative_difference(own, other, drawn, others)


def heat_distances(points: Sequence[Point], lab: Lab) -> dict[str, float]:
    """Point -> paired distance to the converged image, as `tasks.fid.dull` has its heats. points: of one number of steps."""
    steps = min(lab.teacher.schedule.steps, dull.CONVERGED_STEPS * steps_of(points[0]))
    finest = replace(points[0], name="converged", sampler=f"dpm2m_uniform_{steps}")

    def features(point: Point) -> np.ndarray:
        recipe = recipe_of(point, lab, {})
        batch = min(TOGETHER, lab.sizes.heat)
        return sampled(lab, opened(point, lab, recipe, batch), recipe, range(lab.sizes.heat), HEAT_NOISE, batch)

    converged = features(finest)
    return {point.name: quality.paired_distance(features(point), converged)
            for point in track(points, len(points), f"{lab.name} heat of {steps_of(points[0])} steps")}


# ---- how fast they come ----

def timed(points: Sequence[Point], lab: Lab, best: Mapping[int, str]) -> dict[str, list[float]]:
    """`Case.key` -> seconds of every round, all points in turns: whole trajectories of a batch, from noise to images."""
    found: dict[str, list[float]] = {}
    for batch in BATCHES:
        cases = [Case(variant=point.name, backend=point.backend, batch=batch, run=whole(point, lab, batch, best))
                 for point in track(points, len(points), f"{lab.name} opening batch {batch}")]
        found |= interleaved(cases, warmup=1, min_repeats=lab.sizes.rounds, max_repeats=60, budget_s=lab.sizes.budget_s)
        forget_graphs(lab)
    return found


def whole(point: Point, lab: Lab, batch: int, best: Mapping[int, str]) -> Callable[[], torch.Tensor]:
    recipe = recipe_of(point, lab, best)
    predict = opened(point, lab, recipe, batch)
    noise = initial_noise(lab.teacher.sample_shape, range(batch), NOISE)
    labels = labels_for(range(batch), lab.teacher.num_classes)
    return lambda: sample(predict, lab.teacher.schedule, recipe, noise, labels)
