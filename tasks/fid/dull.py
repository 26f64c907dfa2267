"""The dull front: what anyone gets from few steps, a better solver and one precision for all layers."""

import csv
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tasks.core.cost import bitops, layer_costs
from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.quality import EQUAL
from tasks.core.recipe import Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.fid.sampling import Job
from tasks.fid.variants import read_files
from tasks.runtime.packed import WEIGHTS

BACKEND = "openvino"  # whose times of profile/model.csv count: packages ship for it
SCREEN = 0.15         # relative FID above compressed's up to which a point stays a contender until more samples decide


@dataclass(frozen=True, kw_only=True)
class Point:
    precision: str  # fp32 | bf16 | int8
    solver: str
    spacing: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.solver}_{self.spacing}_{self.steps}_{self.precision}"

    @property
    def package(self) -> str:
        return f"dull_{self.precision}"

    def recipe(self, packages: Mapping[str, Recipe], schedule: Schedule) -> Recipe:
        """The package's own but for solver and timesteps."""
        timesteps = spaced_timesteps(schedule, self.steps, self.spacing)
        return replace(packages[self.package], solver=self.solver, timesteps=timesteps)


def grid(precisions: Iterable[str], solvers: Iterable[str], spacings: Iterable[str], steps: Iterable[int]) -> list[Point]:
    """The full grid, precision outermost: a worker keeps one package open at a time."""
    axes = itertools.product(precisions, solvers, spacings, steps)
    return [Point(precision=p, solver=solver, spacing=spacing, steps=n) for p, solver, spacing, n in axes]


def jobs(points: Sequence[Point], packages: Mapping[str, Recipe], schedule: Schedule, n: int, seed: int,
         name: str | None = None) -> list[Job]:
    """n samples of each point; name: instead of the points' own."""
    return [Job(name=name or point.name, package=point.package, recipe=point.recipe(packages, schedule), n=n, seed=seed)
            for point in points]


def read_times(path: Path, batch: int, precisions: Iterable[str]) -> dict[str, float]:
    """profile/model.csv -> microseconds of one network evaluation of `batch` images, by precision.

    Raises ValueError naming the batch sizes that were profiled when a precision has no row at this one.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["backend"] == BACKEND]
    times = {row["precision"]: float(row["time_us"]) for row in rows if int(row["batch"]) == batch}
    missing = [p for p in precisions if p not in times]
    if missing:
        raise ValueError(f"{path}: no {BACKEND} row for {', '.join(missing)} at batch {batch}; "
                         f"it has {', '.join(sorted({row['precision'] + ' at ' + row['batch'] for row in rows}))}")
    return times


def images_per_s(point: Point, times: Mapping[str, float], batch: int) -> float:
    """By the profile: the network's evaluations alone."""
    return 1e6 * batch / (point.steps * times[point.precision])


def target_costs(points: Sequence[Point], target: str, speed: Mapping[str, float], packages: Path,
                 recipes: Mapping[str, Recipe], teacher: Denoiser) -> dict[str, float]:
    """What goal.target wants to fall, by point name: seconds an image (latency), BitOPs an image, bytes of weights (size)."""
    if target == "latency":
        return {point.name: 1 / speed[point.name] for point in points}
    if target == "size":
        return {point.name: read_files(packages / point.package)[f"denoiser/{WEIGHTS}"]["bytes"] for point in points}
    layers = layer_costs(teacher)
    return {point.name: bitops(layers, point.recipe(recipes, teacher.schedule)) for point in points}


def contenders(points: Sequence[Point], cost: Mapping[str, float], quality: Mapping[str, float], bar: float) -> list[Point]:
    """The points that may be as good as compressed, cheapest first; of equally dear ones the best alone.

    The few samples of a front are not enough to turn a point down by EQUAL: up to SCREEN above compressed's FID stay in.
    """
    best_of = {cost[p.name]: p for p in sorted(points, key=lambda p: quality[p.name], reverse=True)}
    return [best_of[c] for c in sorted(best_of) if quality[best_of[c].name] <= bar * (1 + SCREEN)]


@dataclass(frozen=True)
class Front:
    """The measured grid and the point that stands for it as the variant dull_best."""

    points: Sequence[Point]
    speed: Mapping[str, float]    # images/s by point name
    cost: Mapping[str, float]     # on goal.target, by point name
    quality: Mapping[str, float]  # FID by point name
    bar: float                    # compressed's FID on the same seeds
    best: Point
    qualifies: bool               # whether best is as good as compressed

    @classmethod
    def of(cls, points: Sequence[Point], speed: Mapping[str, float], cost: Mapping[str, float], quality: Mapping[str, float],
           bar: float, confirm: Callable[[Point], bool]) -> "Front":
        """best: the cheapest contender that more samples confirm to be as good as compressed, or the point of lowest FID."""
        found = next(filter(confirm, contenders(points, cost, quality, bar)), None)
        best = found or min(points, key=lambda point: (quality[point.name], cost[point.name]))
        return cls(points, speed, cost, quality, bar, best, found is not None)

    def table(self, metric: str) -> list[dict]:
        """A row per point; metric: the name of the FID."""
        tried = contenders(self.points, self.cost, self.quality, self.bar)
        return [{"name": p.name, "precision": p.precision, "solver": p.solver, "spacing": p.spacing, "nfe": p.steps,
                 "images_per_s": self.speed[p.name], "cost": self.cost[p.name], metric: self.quality[p.name],
                 "contender": p in tried, "best": p == self.best} for p in self.points]


def equal_quality(fid: float, bar: float) -> bool:
    """With the tolerance that the verdict grants compressed: without it the front would have to be better to count as equal."""
    return fid <= bar * (1 + EQUAL)
