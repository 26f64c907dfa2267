"""How many evaluations a search needs: ours, random search, TMPQ-DM's evolution and Optuna's NSGA-II on one problem.

The shipped DiT teacher, target BitOPs: 3 to 8 bits for weights and activations of every layer, 4 to 16 timesteps, two solvers,
no cache. A search sees few images of one noise; its front is scored on more images of another.
"""

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks import results
from benchmarks.results import made
from benchmarks.search.curves import EVALUATIONS, SEEDS, SOLVERS, SPACINGS
from benchmarks.search.strategies import SEARCHES
from tasks.core import denoiser as denoisers
from tasks.core.artifacts import Inputs
from tasks.core.cluster import Cluster
from tasks.core.cost import layer_costs
from tasks.core.params import Goal, read_params, stage_params
from tasks.core.recipe import Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.data import stage as data_stage
from tasks.evolve.costs import precision_menus, quantisable
from tasks.evolve.fitness import Protocol
from tasks.evolve.lab import open_lab
from tasks.evolve.problem import Planner, Problem, cost_of
from tasks.evolve.search import Evaluation, hypervolume, pareto_front
from tasks.evolve.space import Candidate
from tasks.evolve.weights import Weights
from tasks.pretrain_load.stage import TEACHERS as SHIPPED

TEACHER = "mnist_dit"
ONLY_TEACHER = {"teacher": Weights()}  # whose weights are compressed
STEPS = (4, 16)
DENSE_STEPS = 50
FEWER = 10          # times fewer BitOPs than 8 bits in every layer at 100 uniform steps: the bound on cost
CORNER = 40.0       # distance at the corner of the box whose dominated share is the score; its cost is the bound: random
                    # candidates lie about there (12 of them, looked at before any search ran)
LOOKAHEAD = 8       # it is part of the outcome; the number of workers is not
TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    evaluations: int
    every: int            # evaluations between two points of a curve
    images: int           # of an evaluation in the search
    fresh_images: int     # of the front's members, of another noise
    seeds: tuple[int, ...]
    scale: str            # of params.yaml's data, which the feature net that guides is trained with


FULL = Sizes(evaluations=EVALUATIONS, every=25, images=16, fresh_images=32, seeds=SEEDS, scale="full")
FEW = Sizes(evaluations=40, every=10, images=2, fresh_images=2, seeds=SEEDS[:1], scale="quick")


class Study:
    """One problem, two protocols, and the rows of results.csv."""

    def __init__(self, sizes: Sizes, work: Path, results_csv: Path, workers: int):
        self.sizes, self.results = sizes, results_csv
        inputs = open_inputs(work, sizes.scale, workers)
        protocol = Protocol(images=sizes.images, seed=20_000, chunk=sizes.images, calibration_steps=10, calibration_images=16,
                            prefix_mb=128)
        fresh = replace(protocol, images=sizes.fresh_images, seed=30_000)
        self.labs = {"search": open_lab(inputs, ONLY_TEACHER, protocol, LOOKAHEAD, TIMEOUT_S),
                     "fresh": open_lab(inputs, ONLY_TEACHER, fresh, LOOKAHEAD, TIMEOUT_S)}
        self.problem = problem_of(denoisers.load(SHIPPED / TEACHER), steps=STEPS, cache=(0.0,))
        self.space = self.problem.space()

    @functools.cached_property
    def references(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return {name: lab.references(self.problem.teacher.schedule) for name, lab in self.labs.items()}

    def losses(self, lab: str, asked: Iterable[Candidate], total: int, label: str) -> Iterator[float | None]:
        recipes = (("teacher", self.space.recipe(c)) for c in asked)
        return self.labs[lab].distances(self.references[lab], recipes, total, label)

    def cell(self, strategy: str, seed: int) -> list[dict]:
        """The rows of one search."""
        sizes, label = self.sizes, f"{strategy}, seed {seed}"

        def evaluate(asked: Iterable[Candidate]) -> Iterator[float | None]:
            total = len(asked) if isinstance(asked, Sized) else sizes.evaluations
            return self.losses("search", asked, total, label)

        began = time.monotonic()
        told = SEARCHES[strategy](self.space, evaluate, np.random.default_rng(seed), sizes.evaluations,
                                  seeds=self.problem.seeds(self.space))
        seconds = time.monotonic() - began
        counts = range(sizes.every, len(told) + 1, sizes.every)
        scores = fresh_scores(told, counts, (self.space.bound, CORNER), lambda asked: self.losses(
            "fresh", asked, len(asked), f"{label}: fresh noise"))
        numbers = {f"{metric}@{n}": value for n, found in scores.items() for metric, value in found.items()}
        numbers |= {"evaluations": len(told), "seconds": seconds, "seconds_fresh": time.monotonic() - began - seconds}
        protocol = (f"bound {self.space.bound:.4g}, corner {CORNER:g} units; {sizes.images} images, fronts on "
                    f"{sizes.fresh_images} of fresh noise; lookahead {LOOKAHEAD}")
        return [{"teacher": TEACHER, "variant": f"efficiency.{strategy}", "seed": seed, "metric": metric,
                 "value": f"{value:.6g}", "protocol": protocol} for metric, value in numbers.items()]

    def run(self, strategies: Sequence[str], seeds: Sequence[int]) -> None:
        done = {(row["variant"], row["seed"]) for row in results.read(self.results) if row["metric"] == "seconds_fresh"}
        due = [(strategy, seed) for seed in seeds for strategy in strategies
               if (f"efficiency.{strategy}", str(seed)) not in done]
        started = time.monotonic()
        for place, (strategy, seed) in enumerate(due):
            results.append(self.results, self.cell(strategy, seed))
            rest = len(due) - place - 1
            left = (time.monotonic() - started) / (place + 1) * rest
            print(f"efficiency {strategy}, seed {seed}: done; {rest} left, about {left / 60:.0f} min", flush=True)


def open_inputs(work: Path, scale: str, workers: int) -> Inputs:
    """The shipped teacher, and the data that the feature nets come from, as a search finds them."""
    params = read_params(scale=scale)
    cluster = Cluster.from_params({**params["cluster"], "address": None, "workers": workers})
    how = stage_params(data_stage, params)
    data = made(work / "data", lambda out: data_stage.run(how, Inputs({}, "data"), out))
    teacher = made(work / "pretrain_load", lambda out: shutil.copytree(SHIPPED / TEACHER, out / "teacher"))
    return Inputs({"data": data, "pretrain_load": teacher}, "search", cluster)


def layers_of(teacher: denoisers.Denoiser) -> tuple[str, ...]:
    """Those that have bits."""
    return tuple(c.name for c in layer_costs(teacher) if quantisable(c))


def problem_of(teacher: denoisers.Denoiser, plan: Planner = lambda *_: None, **limits: object) -> Problem:
    """plan, limits: of caches and of the space, see `Problem`."""
    layers = layers_of(teacher)
    dense = Recipe(timesteps=spaced_timesteps(teacher.schedule, DENSE_STEPS))
    cost = cost_of("bitops", teacher, dense, {})
    bound = cost(eight_bits(teacher, layers)) / FEWER
    goal = Goal(target="bitops", max_quality_loss=0.05, min_speedup=None, max_bitops=bound, max_size=None)
    return Problem(teacher=teacher, goal=goal, weights=ONLY_TEACHER, base=dense.timesteps, layers=layers,
                   menus=precision_menus("bitops", layers, None), plan=plan, cost=cost,
                   spacings=SPACINGS, limits={"grouping": "quadratic", "solvers": SOLVERS, **limits})


def eight_bits(teacher: denoisers.Denoiser, layers: Sequence[str]) -> Recipe:
    """What fewer BitOPs are counted from: 8 bits in every layer, DDIM at 100 uniform steps."""
    return Recipe(timesteps=spaced_timesteps(teacher.schedule, 100), precision=dict.fromkeys(layers, "w8a8"))


def fresh_scores(told: Sequence[Evaluation], counts: Sequence[int], corner: tuple[float, float],
                 evaluate: Callable[[list], Iterable[float | None]]) -> dict[int, dict[str, float]]:
    """Evaluations so far -> hypervolume and least loss of the front that the search would have handed over, on fresh noise."""
    fronts = {n: pareto_front(told[:n]) for n in counts}
    members = {e.candidate: e.cost for front in fronts.values() for e in front}
    losses = dict(zip(members, evaluate(list(members)), strict=True))
    fresh = {n: [Evaluation(e.candidate, e.cost, losses[e.candidate]) for e in front] for n, front in fronts.items()}
    return {n: {"hypervolume": hypervolume(within(front, corner), corner),
                "least_loss": min(e.loss for e in front if e.loss is not None)} for n, front in fresh.items()}


def within(front: Sequence[Evaluation], corner: tuple[float, float]) -> list[Evaluation]:
    """Those inside the box: what is beyond its corner dominates nothing of it."""
    return [e for e in front if e.loss is not None and e.cost < corner[0] and e.loss < corner[1]]
