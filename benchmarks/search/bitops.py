"""BitOPs at equal quality: what the search finds, beside the best of what anyone would try and beside W8A8 at 100 steps.

On the shipped DiT. Distances to the dense teacher's images guide a first search, an estimate of FID the one that goes on from
its front; which point of a front is good enough is found on samples of one noise and judged on those of another. At 5 and 6
steps timesteps and solver alone are searched, in fp32.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.search.correlation import sample_features
from benchmarks.search.curves import DULL_SPACINGS, EQUAL, MARGIN
from benchmarks.search.efficiency import (
    LOOKAHEAD,
    SOLVERS,
    TEACHER,
    TIMEOUT_S,
    eight_bits,
    layers_of,
    open_inputs,
    problem_of,
)
from benchmarks.search.strategies import ours
from benchmarks.sparsity.lab import made
from tasks.cache_learn import stage as cache_stage
from tasks.cache_learn.table import ReuseTable
from tasks.core import denoiser as denoisers
from tasks.core import quality
from tasks.core.artifacts import digest, hash_file
from tasks.core.checkpoint import Checkpoint
from tasks.core.params import read_params, stage_params
from tasks.core.progress import track
from tasks.core.quality import Gaussian, anchored_fid, fid, fid_name
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, labels_for, spaced_timesteps
from tasks.data.features import load_feature_net, load_labels, load_reference
from tasks.evolve.fitness import Protocol, ranges_of
from tasks.evolve.lab import EvaluationLog, Lab, open_lab, succeeded
from tasks.evolve.problem import Problem, planner
from tasks.evolve.search import Evaluation, pareto_front, search
from tasks.evolve.space import Candidate, Space
from tasks.fid.measure import Judge, losses
from tasks.pretrain_load.stage import TEACHERS as SHIPPED

STEPS, BUDGETS = (4, 20), (0.0, 0.1, 0.25, 0.4)    # of the search that distance guides
LISTS = (6, 24)                                    # steps of the one that FID guides
REUSE = ((2, "learned"), (2, "none"))              # all blocks at once: a step computes them or does not
DULL_STEPS, DULL_BITS = (5, 6, 8, 10, 12, 14, 16, 20, 25, 30, 40, 50), (5, 6, 7, 8)
RESAMPLES = 1000                                   # of the bootstrap
HOPED = MARGIN / 2                                 # increase, on the noise that chooses, of a point that is worth judging
GUIDING, CHOOSING, JUDGING = 50_000, 51_000, 52_000  # seeds of noise: neither the search's nor fid's
GOING_ON = 12                                      # points of the first search's front, the dearest, where the second begins
FINALISTS = 8                                      # lists of few steps, nearest first, of which the choosing noise takes one


@dataclass(frozen=True, kw_only=True)
class Sizes:
    evaluations: int      # of the search for everything, guided by distance
    guided: int           # of the one that goes on from there, guided by FID
    few_evaluations: int  # of that for timesteps and solver alone
    images: int           # of an evaluation
    guiding: int          # of one that is guided by FID
    anchors: int          # samples that its estimate leans on
    chosen: int           # samples that choose
    judged: int           # samples that are reported
    scale: str


FULL = Sizes(evaluations=600, guided=150, few_evaluations=300, images=32, guiding=400, anchors=5000, chosen=2500, judged=10_000,
             scale="full")
FEW = Sizes(evaluations=30, guided=10, few_evaluations=10, images=4, guiding=20, anchors=100, chosen=100, judged=100,
            scale="quick")


@dataclass(frozen=True)
class Point:
    """A recipe on a front."""

    recipe: Recipe
    cost: float   # BitOPs over those of the dense teacher at 50 steps
    guess: float  # on the images that guide: distance, or FID


class Study:
    """The shipped DiT, a lab for distances, a judge of samples."""

    def __init__(self, sizes: Sizes, work: Path, results_csv: Path, workers: int):
        self.sizes, self.work, self.results = sizes, work, results_csv
        self.inputs = open_inputs(work, sizes.scale, workers)
        protocol = Protocol(images=sizes.images, seed=20_000, chunk=sizes.images, calibration_steps=10, calibration_images=16,
                            prefix_mb=128)
        self.lab, self.data = open_lab(self.inputs, None, protocol, LOOKAHEAD, TIMEOUT_S), self.inputs["data"]
        self.teacher, self.protocol = denoisers.load(SHIPPED / TEACHER), protocol
        self.judge = Judge.of(load_feature_net(self.data, "report"), np.load(self.data / "holdout.npy"),
                              load_labels(self.data, "holdout"), load_reference(self.data, "report"))
        self.base = eight_bits(self.teacher, layers_of(self.teacher))

    @functools.cached_property
    def problem(self) -> Problem:
        how = stage_params(cache_stage, read_params(scale=self.sizes.scale))
        folder = made(self.work / "reuse_table", lambda out: cache_stage.reuse_table(
            self.teacher, how, lambda name: Checkpoint(self.work / "checkpoints" / name, "bitops")).write(out))
        return problem_of(self.teacher, planner(ReuseTable.read(folder), self.teacher), steps=STEPS, cache=BUDGETS, reuse=REUSE)

    @functools.cached_property
    def references(self) -> tuple[np.ndarray, np.ndarray]:
        return self.lab.references(self.teacher.schedule)

    @functools.cached_property
    def ranges(self) -> Mapping:
        return ranges_of(self.teacher, self.protocol)

    @functools.cached_property
    def guide(self) -> "Guide":
        return Guide.of(self)

    # ---- fronts ----

    def distances(self, recipes: Iterable[Recipe], total: int, label: str) -> Iterator[float | None]:
        return self.lab.distances(self.references, (("teacher", recipe) for recipe in recipes), total, label)

    def dull(self) -> list[Point]:
        """Front of what anyone would try."""
        recipes = list(dull_recipes(self.teacher))
        found = self.distances(recipes, len(recipes), "dull")
        return front_of([Evaluation(recipe, self.problem.cost(recipe), loss)
                         for recipe, loss in zip(recipes, found, strict=True)], lambda recipe: recipe)

    def searched(self, space: Space, budget: int, label: str) -> list[Evaluation]:
        def evaluate(asked: Iterable) -> Iterator[float | None]:
            return self.distances((space.recipe(c) for c in asked), budget, label)

        return search(space, evaluate, np.random.default_rng(0), budget, ours(), self.problem.seeds(space))

    def front(self) -> list[Point]:
        space = self.problem.space()
        nearest = pareto_front(self.searched(space, self.sizes.evaluations, "ours, by distance"))
        lists = lists_of(space, LISTS)

        def evaluate(asked: Iterable) -> Iterator[float | None]:
            return self.guide.fids((lists.recipe(c) for c in asked), self.sizes.guided, "ours, by FID")

        seeds = [*self.problem.seeds(lists), *(in_space(e.candidate, lists) for e in nearest[-GOING_ON:])]
        told = search(lists, evaluate, np.random.default_rng(0), self.sizes.guided, ours(random=0.1), seeds)
        return front_of(told, lists.recipe)

    def nearest(self, steps: int) -> list[Recipe]:
        """Lists of so many steps, nearest first."""
        space = self.problem.space_of_timesteps(steps)
        told = self.searched(space, self.sizes.few_evaluations, f"ours at {steps} steps")
        best = sorted((e for e in told if e.loss is not None), key=lambda e: e.loss)[:FINALISTS]
        return [space.recipe(e.candidate) for e in best]

    # ---- samples ----

    def features(self, recipe: Recipe, noise: int) -> np.ndarray:
        """Of the samples that choose, or of those that are judged."""
        n = self.sizes.chosen if noise == CHOOSING else self.sizes.judged
        path = self.work / "features" / f"{digest([recipe.to_json(), n, noise])}.npy"
        label = f"{n} samples, {recipe.solver} {recipe.nfe} steps"
        return results.kept(path, lambda: sample_features(self.teacher, recipe, self.ranges, self.judge.net, n, label, noise))

    def loss(self, recipe: Recipe, base: Recipe, noise: int) -> dict[str, float]:
        """fid, and its increase over the base's, paired: loss and loss_upper95."""
        own, dense = (self.features(one, noise) for one in (recipe, base))
        strata = labels_for(range(len(own)), self.teacher.num_classes)
        found = losses({"dense": dense, "own": own}, self.judge, strata.numpy(), MARGIN, RESAMPLES, np.random.default_rng(0))
        return {fid_name(len(own)): fid(own, self.judge.reference), "loss": found["own"]["loss"],
                "loss_upper95": found["own"]["loss_upper95"]}

    def cheapest(self, front: Sequence[Point]) -> Iterator[tuple[Point, dict[str, float]]]:
        """Points that were judged, and how; the last one is the cheapest that is as good as the base, if any is. The first is
        found on other samples; while the bound is not met the next dearer one is judged."""
        chosen = first_of(len(front), lambda i: self.loss(front[i].recipe, self.base, CHOOSING)["loss"] <= HOPED)
        for point in front[chosen:]:
            found = self.loss(point.recipe, self.base, JUDGING)
            yield point, found
            if found["loss_upper95"] <= MARGIN:
                return

    # ---- rows ----

    def compared_at_equal_quality(self) -> Iterator[dict]:
        sizes = self.sizes
        protocol = (f"{sizes.evaluations} evaluations of {sizes.images} images by distance, {sizes.guided} of {sizes.guiding} "
                    f"by FID, search net; chosen on {sizes.chosen} samples, judged on {sizes.judged} others, against W8A8 at "
                    "100 steps; OpenVINO, report net")
        own = fid(self.features(self.base, JUDGING), self.judge.reference)
        yield from rows("w8a8_100", {"cost": self.problem.cost(self.base), fid_name(self.sizes.judged): own}, protocol)
        ours, dull, bound = self.front(), self.dull(), self.problem.space().bound
        tenth = [point for point in ours if point.cost <= bound][-1:]
        for name, guess, judged in (("ours", "fid_guessed", self.cheapest(ours)), ("dull", "distance", self.cheapest(dull)),
                                    ("tenth", "fid_guessed", ((p, self.loss(p.recipe, self.base, JUDGING)) for p in tenth))):
            for k, (point, found) in enumerate(judged):
                self.keep(f"{name}.{k}", point.recipe)
                numbers = {"cost": point.cost, guess: point.guess, **facts(point.recipe), **found}
                yield from rows(f"{name}.{k}", numbers, protocol)

    def compared_at_few_steps(self, steps: int) -> Iterator[dict]:
        recipe = min(self.nearest(steps), key=lambda one: fid(self.features(one, CHOOSING), self.judge.reference))
        self.keep(f"steps{steps}", recipe)
        protocol = (f"{self.sizes.few_evaluations} evaluations of {self.sizes.images} images; the best of {FINALISTS} on "
                    f"{self.sizes.chosen} samples, judged on {self.sizes.judged} others; fp32, OpenVINO, report net; loss: of "
                    "ours over this one, paired")
        for solver, spacing in itertools.product(SOLVERS, DULL_SPACINGS):
            base = Recipe(timesteps=spaced_timesteps(self.teacher.schedule, steps, spacing), solver=solver)
            found = self.loss(recipe, base, JUDGING)
            own = fid(self.features(base, JUDGING), self.judge.reference)
            yield from rows(f"steps{steps}.{solver}_{spacing}", {"fid_base": own, **found}, protocol)

    def keep(self, name: str, recipe: Recipe) -> None:
        """Beside the results, so that it can be sampled from again."""
        folder = self.results.parent / "recipes"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(recipe.to_json()) + "\n")

    def run(self, parts: Iterable[str]) -> None:
        """parts: of `curves.BITOPS`. Rows of a part replace those it had."""
        for name in parts:
            began = time.monotonic()
            found = list(self.compared_at_equal_quality() if name == EQUAL else
                         self.compared_at_few_steps(int(name.removeprefix("steps"))))
            found += rows(f"seconds_{name}", {"seconds": time.monotonic() - began}, "what an earlier run kept is not in it")
            own = {row["variant"] for row in found}
            results.replace(self.results, lambda row, own=own: row["variant"] in own, found)
            print(f"bitops {name}: done in {time.monotonic() - began:.0f} s", flush=True)


@dataclass(frozen=True)
class Guide:
    """FID of recipes against the holdout, estimated from few images by the search's net."""

    lab: Lab
    anchor: np.ndarray   # features of the few images as `anchor` samples them
    whole: Gaussian      # of many more
    reference: Gaussian

    @classmethod
    def of(cls, study: Study) -> "Guide":
        sizes, net = study.sizes, load_feature_net(study.data, "search")
        whole = results.kept(study.work / "features" / f"anchor-{sizes.anchors}.npy", lambda: sample_features(
            study.teacher, anchor(study.teacher), {}, net, sizes.anchors, "anchor", GUIDING))
        protocol = replace(study.protocol, images=sizes.guiding, chunk=min(50, sizes.guiding), seed=GUIDING)
        lab = open_lab(study.inputs, None, protocol, LOOKAHEAD, TIMEOUT_S)
        known = digest([sizes.anchors, "holdout", hash_file(Path(quality.__file__))])[:8]  # of distances there is another log
        lab = replace(lab, log=EvaluationLog(lab.log.path.with_name(f"{lab.log.path.stem}-fid-{known}.jsonl")))
        return cls(lab, whole[: sizes.guiding], Gaussian.of(whole), load_reference(study.data, "search"))

    def fids(self, recipes: Iterable[Recipe], total: int, label: str) -> Iterator[float | None]:
        found = self.lab.results((("teacher", recipe) for recipe in recipes), label, self.fid, LOOKAHEAD)
        return succeeded(track(found, total, label), label)

    def fid(self, found: np.ndarray) -> float:
        return anchored_fid(found, self.anchor, self.whole, self.reference)


def lists_of(space: Space, steps: tuple[int, int]) -> Space:
    """Timesteps and solver alone, every layer at the most bits, whatever it costs."""
    return replace(space.unbounded(), steps=steps, menus=tuple(menu[-1:] for menu in space.menus), cache=(0.0,),
                   reuse=space.reuse[:1])


def in_space(candidate: Candidate, space: Space) -> Candidate:
    """With its timesteps and solver."""
    return replace(candidate, genes=tuple(gene for gene, in space.menus), cache=space.cache[0], reuse=space.reuse[0])


def anchor(teacher: denoisers.Denoiser) -> Recipe:
    """What the few images and the many are both sampled by."""
    return Recipe(timesteps=spaced_timesteps(teacher.schedule, 20), solver="dpm2m")


def dull_recipes(teacher: denoisers.Denoiser) -> Iterator[Recipe]:
    """Every solver, spacing and number of steps, with the same bits in every layer."""
    layers = layers_of(teacher)
    for solver, spacing, steps, bits in itertools.product(SOLVERS, SPACINGS, DULL_STEPS, DULL_BITS):
        yield Recipe(timesteps=spaced_timesteps(teacher.schedule, steps, spacing), solver=solver,
                     precision=dict.fromkeys(layers, f"w{bits}a{bits}"))


def front_of(told: Sequence[Evaluation], recipe: Callable[[object], Recipe]) -> list[Point]:
    """By rising cost and falling distance."""
    return [Point(recipe(e.candidate), e.cost, e.loss) for e in pareto_front(told)]


def first_of(n: int, holds: Callable[[int], bool]) -> int:
    """The first of 0 .. n - 1 that holds, by bisection: taken to hold for all after it; the last one if none is found to."""
    low, high = 0, n - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def facts(recipe: Recipe) -> dict[str, float]:
    bits = [int(part) for token in recipe.precision.values() for part in token[1:].split("a")]
    removed = recipe.cache.removed_share if recipe.cache else 0.0
    return {"nfe": recipe.nfe, "bits_mean": float(np.mean(bits)), "removed_share": removed}


def rows(variant: str, numbers: Mapping[str, float], protocol: str) -> list[dict]:
    return [{"teacher": TEACHER, "variant": f"bitops.{variant}", "seed": 0, "metric": metric, "value": f"{value:.6g}",
             "protocol": protocol} for metric, value in numbers.items()]
