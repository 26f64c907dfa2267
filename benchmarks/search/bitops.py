"""BitOPs at equal quality: what the search finds, beside the best of what anyone would try and beside W8A8 at 100 steps.

On the shipped DiT. Distances to the dense teacher's images guide a first search, an estimate of FID the one that goes on from
its front. The best few within a tenth of the BitOPs of W8A8 at 100 steps are compared on more samples, and the one that wins is
judged: guide, choice and judgement have noise, a feature net and real images of their own. At 5 and 6 steps timesteps and
solver alone are searched, in fp32.
"""

import functools
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.holdout import judge_unseen
from benchmarks.results import made
from benchmarks.search.correlation import sample_features
from benchmarks.search.curves import DULL_SPACINGS, EQUAL, MARGIN, SOLVERS, SPACINGS
from benchmarks.search.efficiency import (
    LOOKAHEAD,
    ONLY_TEACHER,
    TEACHER,
    TIMEOUT_S,
    eight_bits,
    layers_of,
    open_inputs,
    problem_of,
)
from benchmarks.search.strategies import ours
from tasks.cache_learn import stage as cache_stage
from tasks.cache_learn.table import ReuseTable
from tasks.core import denoiser as denoisers
from tasks.core import quality
from tasks.core.artifacts import Inputs, digest, hash_file
from tasks.core.checkpoint import Checkpoint
from tasks.core.params import read_params, stage_params
from tasks.core.progress import track
from tasks.core.quality import Gaussian, anchored_fid, fid, fid_name
from tasks.core.recipe import Recipe
from tasks.core.sampler import labels_for, spaced_timesteps
from tasks.data import stage as data_stage
from tasks.data.features import load_feature_net
from tasks.evolve.fitness import Protocol, ranges_of
from tasks.evolve.lab import EvaluationLog, Lab, open_lab, succeeded
from tasks.evolve.problem import Problem, planner
from tasks.evolve.search import Evaluation, pareto_front, search
from tasks.evolve.space import Space
from tasks.fid.measure import Judge, losses
from tasks.pretrain_load.stage import TEACHERS as SHIPPED

STEPS, BUDGETS = (4, 20), (0.0, 0.1, 0.25, 0.4)    # of the search that distance guides
GUIDED_STEPS = (6, 30)                             # of the one that FID guides
GUIDED_BUDGETS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6)
EQUAL_ROWS = ("w8a8_100", "tenth", "dull.", f"seconds_{EQUAL}")  # what their names begin with
REUSE = ((2, "learned"), (2, "none"))              # all blocks at once: a step computes them or does not
DULL_STEPS, DULL_BITS = (5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 25, 28, 30, 35, 40, 50), (5, 6, 7, 8)
DULL_GUESSED = ("w7a7", "w8a8")                    # whose FID is guessed for all of them; of fewer bits, for the nearest
RESAMPLES = 1000                                   # of the bootstrap
IN_DOUBT = 0.1                                     # above the least guess of FID: a guess is up to 5 % off
GUIDING, CHOOSING, JUDGING = 50_000, 53_000, 52_000  # seeds of noise: neither the search's nor fid's
GOING_ON = 12                                      # points of the first search's front, the dearest, where the second begins
FINALISTS = 8                                      # the best of where the search looked, of which samples choose one
BLOCK = 2500                                       # samples that are kept together


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
    few_judged: int       # those of lists of few steps
    scale: str


FULL = Sizes(evaluations=600, guided=400, few_evaluations=300, images=32, guiding=400, anchors=5000, chosen=2500, judged=20_000,
             few_judged=10_000, scale="full")
FEW = Sizes(evaluations=30, guided=10, few_evaluations=10, images=4, guiding=20, anchors=100, chosen=100, judged=100,
            few_judged=100, scale="quick")


@dataclass(frozen=True)
class Point:
    recipe: Recipe
    cost: float   # BitOPs over those of the dense teacher at 50 steps
    guess: float  # of FID, on the images that guide


class Study:
    """The shipped DiT, a lab for distances, a judge of samples."""

    def __init__(self, sizes: Sizes, work: Path, results_csv: Path, workers: int):
        self.sizes, self.work, self.results = sizes, work, results_csv
        self.inputs = open_inputs(work, sizes.scale, workers)
        protocol = Protocol(images=sizes.images, seed=20_000, chunk=sizes.images, calibration_steps=10, calibration_images=16,
                            prefix_mb=128)
        self.lab, self.data = open_lab(self.inputs, ONLY_TEACHER, protocol, LOOKAHEAD, TIMEOUT_S), self.inputs["data"]
        self.teacher, self.protocol = denoisers.load(SHIPPED / TEACHER), protocol
        self.recipes: dict[str, Recipe] = {}  # that were judged
        self.judges = {GUIDING: self.judge_of(self.data, "search", "guides"),
                       CHOOSING: self.judge_of(self.other_data(), "report", "chooses"),
                       JUDGING: self.judge_of(self.data, "report", "judges")}
        self.base = eight_bits(self.teacher, layers_of(self.teacher))

    def judge_of(self, data: Path, which: str, part: str) -> Judge:
        """part: of the real images that nothing here was trained on."""
        return judge_unseen(load_feature_net(data, which), part, self.teacher.sample_shape)

    def other_data(self) -> Path:
        """Another seed's feature nets, so that what chooses is neither the net that guides nor the one that judges."""
        how = stage_params(data_stage, read_params(scale=self.sizes.scale))
        how = replace(how, seed=how.seed + 1)
        return made(self.work / "other_data", lambda out: data_stage.run(how, Inputs({}, "data"), out))

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

    @property
    def judged_by(self) -> str:
        return f"OpenVINO, report net, {len(self.judges[JUDGING].features)} real images that nothing else has seen"

    @functools.cached_property
    def guide(self) -> "Guide":
        return Guide.of(self)

    # ---- what is found ----

    def distances(self, recipes: Iterable[Recipe], total: int, label: str) -> Iterator[float | None]:
        return self.lab.distances(self.references, (("teacher", recipe) for recipe in recipes), total, label)

    def dull(self) -> list[Point]:
        """Of what anyone would try, by rising cost the best guess of each cost, as far as it may be as good as any; at the end
        the base."""
        recipes = list(dull_recipes(self.teacher))
        found = self.distances(recipes, len(recipes), "dull, by distance")
        near = pareto_front([Evaluation(recipe, self.problem.cost(recipe), loss)
                             for recipe, loss in zip(recipes, found, strict=True)])
        tried = [recipe for recipe in recipes if {*recipe.precision.values()} <= {*DULL_GUESSED}]
        tried += [e.candidate for e in near if e.candidate not in tried]
        found = self.guide.fids(tried, len(tried), "dull, by FID")
        points = [Point(recipe, self.problem.cost(recipe), guess) for recipe, guess in zip(tried, found, strict=True)
                  if guess is not None]
        return [*best_of_each_cost(points), Point(self.base, self.problem.cost(self.base), float("nan"))]

    def searched(self, space: Space, budget: int, label: str) -> list[Evaluation]:
        def evaluate(asked: Iterable) -> Iterator[float | None]:
            return self.distances((space.recipe(c) for c in asked), budget, label)

        return search(space, evaluate, np.random.default_rng(0), budget, ours(), self.problem.seeds(space))

    def within_a_tenth(self) -> list[Point]:
        """What the search for everything found within the bound, the best guesses first."""
        space = self.problem.space()
        nearest = pareto_front(self.searched(space, self.sizes.evaluations, "ours, by distance"))
        wide = at_most_bits(space)

        def evaluate(asked: Iterable) -> Iterator[float | None]:
            return self.guide.fids((wide.recipe(c) for c in asked), self.sizes.guided, "ours, by FID")

        tried = (self.problem.seeds(replace(wide, bound=space.bound, cache=(budget,))) for budget in wide.cache)
        seeds = [*itertools.chain(*tried), *(replace(e.candidate, genes=only(wide.menus)) for e in nearest[-GOING_ON:])]
        told = search(wide, evaluate, np.random.default_rng(0), self.sizes.guided, ours(random=0.1), seeds)
        within = sorted((e for e in told if e.loss is not None and e.cost <= space.bound), key=lambda e: e.loss)
        return [Point(wide.recipe(e.candidate), e.cost, e.loss) for e in within[:FINALISTS]]

    def nearest(self, steps: int) -> list[Recipe]:
        """Lists of so many steps, nearest first."""
        space = self.problem.space_of_timesteps(steps)
        told = self.searched(space, self.sizes.few_evaluations, f"ours at {steps} steps")
        best = sorted((e for e in told if e.loss is not None), key=lambda e: e.loss)[:FINALISTS]
        return [space.recipe(e.candidate) for e in best]

    # ---- samples ----

    def features(self, recipe: Recipe, noise: int, n: int) -> np.ndarray:
        """(n, D) of the first n samples of a noise, by the net that judges them."""
        def block(first: int) -> np.ndarray:
            size = min(BLOCK, n - first)
            path = self.work / "features" / f"{digest([recipe.to_json(), noise, first, size])}.npy"
            label = f"samples {first} to {first + size} of {n}, {recipe.solver} {recipe.nfe} steps"
            return results.kept(path, lambda: sample_features(self.teacher, recipe, self.ranges, self.judges[noise].net, size,
                                                              label, noise, first))
        return np.concatenate([block(first) for first in range(0, n, BLOCK)])

    def fid(self, recipe: Recipe, noise: int, n: int) -> float:
        return fid(self.features(recipe, noise, n), self.judges[noise].reference)

    def loss(self, recipe: Recipe, base: Recipe, n: int) -> dict[str, float]:
        """fid of n samples that are judged, and its increase over the base's, paired: loss and loss_upper95."""
        own, dense = (self.features(one, JUDGING, n) for one in (recipe, base))
        strata = labels_for(range(n), self.teacher.num_classes).numpy()
        found = losses({"dense": dense, "own": own}, self.judges[JUDGING], strata, MARGIN, RESAMPLES, np.random.default_rng(0))
        return {fid_name(n): self.fid(recipe, JUDGING, n), "loss": found["own"]["loss"],
                "loss_upper95": found["own"]["loss_upper95"]}

    def best(self, recipes: Iterable[Recipe]) -> Recipe:
        """That of least FID where samples choose."""
        return min(recipes, key=lambda recipe: self.fid(recipe, CHOOSING, self.sizes.chosen))

    def cheapest(self, points: Iterable[Point]) -> Iterator[tuple[Point, dict[str, float]]]:
        """Points and their numbers; the last one is the cheapest that is as good as the base. One that is worse by more than
        the margin where samples choose is not judged: it has loss_chosen alone."""
        base = self.fid(self.base, CHOOSING, self.sizes.chosen)
        for point in points:
            found = {"loss_chosen": self.fid(point.recipe, CHOOSING, self.sizes.chosen) / base - 1}
            if found["loss_chosen"] <= MARGIN:
                found |= self.loss(point.recipe, self.base, self.sizes.judged)
            yield point, found
            if found.get("loss_upper95", math.inf) <= MARGIN:
                return

    # ---- rows ----

    def compared_at_equal_quality(self) -> Iterator[dict]:
        sizes = self.sizes
        protocol = (f"{sizes.evaluations} evaluations of {sizes.images} images by distance, {sizes.guided} of {sizes.guiding} "
                    f"by FID, search net; the best of {FINALISTS} on {sizes.chosen} samples, another net, judged on "
                    f"{sizes.judged} others, against W8A8 at 100 steps; {self.judged_by}")
        own = self.fid(self.base, JUDGING, sizes.judged)
        yield from rows("w8a8_100", {"cost": self.problem.cost(self.base), fid_name(sizes.judged): own}, protocol)
        tenth = self.within_a_tenth()
        chosen = self.best(point.recipe for point in tenth)
        own = next(point for point in tenth if point.recipe == chosen)
        judged = [("tenth", own, self.loss(chosen, self.base, sizes.judged))]
        judged += [(f"dull.{k}", *found) for k, found in enumerate(self.cheapest(self.dull()))]
        for name, point, found in judged:
            self.recipes[name] = point.recipe
            yield from rows(name, {"cost": point.cost, "fid_guessed": point.guess, **facts(point.recipe), **found}, protocol)

    def compared_at_few_steps(self, steps: int) -> Iterator[dict]:
        n, recipe = self.sizes.few_judged, self.best(self.nearest(steps))
        self.recipes[f"steps{steps}"] = recipe
        protocol = (f"{self.sizes.few_evaluations} evaluations of {self.sizes.images} images; the best of {FINALISTS} on "
                    f"{self.sizes.chosen} samples, judged on {n} others; fp32; {self.judged_by}; loss: of ours over this one, "
                    "paired")
        for solver, spacing in itertools.product(SOLVERS, DULL_SPACINGS):
            base = Recipe(timesteps=spaced_timesteps(self.teacher.schedule, steps, spacing), solver=solver)
            numbers = {"fid_base": self.fid(base, JUDGING, n), **self.loss(recipe, base, n)}
            yield from rows(f"steps{steps}.{solver}_{spacing}", numbers, protocol)

    def run(self, parts: Iterable[str]) -> None:
        """parts: of `curves.BITOPS`. Rows and recipes of a part replace all that it had."""
        for name in parts:
            began = time.monotonic()
            self.recipes.clear()
            found = list(self.compared_at_equal_quality() if name == EQUAL else
                         self.compared_at_few_steps(int(name.removeprefix("steps"))))
            found += rows(f"seconds_{name}", {"seconds": time.monotonic() - began}, "what an earlier run kept is not in it")
            own = EQUAL_ROWS if name == EQUAL else (name, f"seconds_{name}")
            self.keep(own)
            results.replace(self.results, lambda row, own=own: row["variant"].removeprefix("bitops.").startswith(own), found)
            print(f"bitops {name}: done in {time.monotonic() - began:.0f} s", flush=True)

    def keep(self, own: tuple[str, ...]) -> None:
        """The recipes of a part, beside the results, to be sampled from again. own: what their names begin with."""
        folder = self.results.parent / "recipes"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.json"):
            if path.stem.startswith(own):
                path.unlink()
        for name, recipe in self.recipes.items():
            (folder / f"{name}.json").write_text(json.dumps(recipe.to_json()) + "\n")


@dataclass(frozen=True)
class Guide:
    """FID of recipes against real images that do not judge, estimated from few samples by the search's net."""

    lab: Lab
    anchor: np.ndarray   # features of the few images as `anchor` samples them
    whole: Gaussian      # of many more
    reference: Gaussian

    @classmethod
    def of(cls, study: Study) -> "Guide":
        sizes, judge = study.sizes, study.judges[GUIDING]
        whole = results.kept(study.work / "features" / f"anchor-{sizes.anchors}.npy", lambda: sample_features(
            study.teacher, anchor(study.teacher), {}, judge.net, sizes.anchors, "anchor", GUIDING))
        protocol = replace(study.protocol, images=sizes.guiding, chunk=min(50, sizes.guiding), seed=GUIDING)
        lab = open_lab(study.inputs, ONLY_TEACHER, protocol, LOOKAHEAD, TIMEOUT_S)
        known = digest([sizes.anchors, "guides", hash_file(Path(quality.__file__))])[:8]  # of distances there is another log
        lab = replace(lab, log=EvaluationLog(lab.log.path.with_name(f"{lab.log.path.stem}-fid-{known}.jsonl")))
        return cls(lab, whole[: sizes.guiding], Gaussian.of(whole), judge.reference)

    def fids(self, recipes: Iterable[Recipe], total: int, label: str) -> Iterator[float | None]:
        found = self.lab.results((("teacher", recipe) for recipe in recipes), label, self.fid, LOOKAHEAD)
        return succeeded(track(found, total, label), label)

    def fid(self, found: np.ndarray) -> float:
        return anchored_fid(found, self.anchor, self.whole, self.reference)


def at_most_bits(space: Space) -> Space:
    """Timesteps, solver and cache alone, every layer at the most bits, whatever it costs."""
    return replace(space.unbounded(), steps=GUIDED_STEPS, menus=tuple(menu[-1:] for menu in space.menus), cache=GUIDED_BUDGETS)


def only(menus: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The genes of menus of one choice each."""
    return tuple(gene for gene, in menus)


def anchor(teacher: denoisers.Denoiser) -> Recipe:
    """What the few images and the many are both sampled by."""
    return Recipe(timesteps=spaced_timesteps(teacher.schedule, 20), solver="dpm2m")


def dull_recipes(teacher: denoisers.Denoiser) -> Iterator[Recipe]:
    """Every solver, spacing and number of steps, with the same bits in every layer."""
    layers = layers_of(teacher)
    for solver, spacing, steps, bits in itertools.product(SOLVERS, SPACINGS, DULL_STEPS, DULL_BITS):
        yield Recipe(timesteps=spaced_timesteps(teacher.schedule, steps, spacing), solver=solver,
                     precision=dict.fromkeys(layers, f"w{bits}a{bits}"))


def best_of_each_cost(points: Iterable[Point]) -> list[Point]:
    """By rising cost, without those whose guess is so far above the least that it cannot be doubted."""
    best: dict[float, Point] = {}
    for point in sorted(points, key=lambda point: -point.guess):
        best[point.cost] = point  # the last one stays
    least = min(point.guess for point in best.values())
    return [best[cost] for cost in sorted(best) if best[cost].guess <= (1 + IN_DOUBT) * least]


def facts(recipe: Recipe) -> dict[str, float]:
    bits = [int(part) for token in recipe.precision.values() for part in token[1:].split("a")]
    removed = recipe.cache.removed_share if recipe.cache else 0.0
    return {"nfe": recipe.nfe, "bits_mean": float(np.mean(bits)), "removed_share": removed}


def rows(variant: str, numbers: Mapping[str, float], protocol: str) -> list[dict]:
    return [{"teacher": TEACHER, "variant": f"bitops.{variant}", "seed": 0, "metric": metric, "value": f"{value:.6g}",
             "protocol": protocol} for metric, value in numbers.items()]
