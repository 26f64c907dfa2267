"""The dull front: what anyone gets from few steps, a better solver, a better spacing and one precision for all layers.

Solvers and spacings are compared first, in heats: one for each number of steps, at the fastest precision, on few images of the
same noise. The nearest to the converged image go on, at every precision, to a race of quality against `compressed`.
"""

import csv
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tasks.core.cost import bitops, layer_costs
from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.quality import EQUAL, Difference, Gaussian, fid, fid_name, kid_difference, paired_distance
from tasks.core.recipe import Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.fid.extrapolate import EXTRAPOLATED, extrapolated_sampling
from tasks.fid.sampling import Job
from tasks.fid.variants import read_files
from tasks.runtime.packed import WEIGHTS

BACKEND = "openvino"  # whose times of profile/model.csv count: packages ship for it
CONVERGED, CONVERGED_STEPS = "converged", 3  # of a heat: key, and how many times the steps of its points
LAST_ONES = 5         # points that run on where all are clearly worse
SURE = 2.5            # standard errors of KID above compressed's from which on a point counts as worse before the race ends


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
        if self.solver == EXTRAPOLATED:
            return replace(packages[self.package], **extrapolated_sampling(schedule, self.steps, self.spacing))
        timesteps = spaced_timesteps(schedule, self.steps, self.spacing)
        return replace(packages[self.package], solver=self.solver, rows=None, timesteps=timesteps)


def grid(precisions: Iterable[str], solvers: Iterable[str], spacings: Iterable[str], steps: Iterable[int]) -> list[Point]:
    """The full grid, precision outermost: a worker keeps few packages open."""
    axes = itertools.product(precisions, solvers, spacings, steps)
    return [Point(precision=p, solver=solver, spacing=spacing, steps=n) for p, solver, spacing, n in axes]


def job(point: Point, packages: Mapping[str, Recipe], schedule: Schedule, n: int, seed: int, name: str | None = None) -> Job:
    """n samples of the point; name: instead of its own."""
    return Job(name=name or point.name, package=point.package, recipe=point.recipe(packages, schedule), n=n, seed=seed)


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


# ---- heats: which solvers and spacings are worth a race ----

def heat_jobs(points: Sequence[Point], precision: str, packages: Mapping[str, Recipe], schedule: Schedule, n: int,
              seed: int) -> dict[str, Job]:
    """By (solver, spacing) of the points, which have one number of steps: n images each, at one precision; and under CONVERGED
    what they are compared with, images of the same noise and precision after so many steps that most solvers agree."""
    steps = min(schedule.steps, CONVERGED_STEPS * points[0].steps)
    finest = Point(precision=precision, solver="dpm2m", spacing="uniform", steps=steps)
    jobs = {CONVERGED: job(finest, packages, schedule, n, seed, name=f"dull_converged_{finest.name}")}
    for point in points:
        jobs.setdefault(sampler_of(point), job(replace(point, precision=precision), packages, schedule, n, seed))
    return {key: replace(found, name=f"heat_{found.name}") for key, found in jobs.items()}


def sampler_of(point: Point) -> tuple[str, str]:
    return point.solver, point.spacing


def nearest(found: Mapping[Hashable, np.ndarray], kept: int) -> list[Hashable]:
    """Keys of the `kept` sets of features that are nearest to those of CONVERGED, image by image, nearest first."""
    distances = {key: paired_distance(x, found[CONVERGED]) for key, x in found.items() if key != CONVERGED}
    return sorted(distances, key=distances.get)[:kept]


# ---- the race ----

Enter = Callable[[Sequence[str]], Sequence[str]]
Draw = Callable[[Sequence[str], int, int], Mapping[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a point came: above is its KID less that of compressed, on as many samples of the same noise."""

    samples: int
    above: Difference
    fid_ratio: float  # to compressed's, on as many samples


def race(cost: Mapping[str, float], bar: str, rounds: Sequence[int], draw: Draw, holdout: np.ndarray, reference: Gaussian,
         strata: Callable[[int], np.ndarray | None], enter: Enter = list) -> tuple[dict[str, Standing], dict[str, np.ndarray]]:
    """Every name that ran, and features of all samples of those that ran to the end and of `bar`, which is what they are
    compared with.

    The cheapest run first, with all that cost as much, then the next cheapest, until one that ran to the end is as good as
    `bar`: no dearer one can be the best, and none is run. If none is, the LAST_ONES nearest ones run to the end. enter(names):
    those that take part, of names of one cost; asked once for each cost, in this order.
    rounds: samples after which the clearly worse drop out, rising; the last is the end. draw(names, first, last): features of
    samples first .. last - 1. holdout: features (M, D), reference: their distribution. strata(n): classes of the first n
    samples, or None. The rounds save samples, they do not choose: a point is lost if its KID is SURE standard errors above that
    of `bar`, which happens to an equally good one at most once in 160 rounds, and its FID, too, is above what counts as equal.
    """
    standings: dict[str, Standing] = {}
    seen = dict.fromkeys((*cost, bar), np.empty((0, holdout.shape[1])))

    def go_on(names: Sequence[str], last: int) -> list[str]:
        """-> those that are not shown to be worse."""
        for first in sorted({len(seen[name]) for name in (*names, bar) if len(seen[name]) < last}):
            drawn = draw([name for name in (*names, bar) if len(seen[name]) == first], first, last)
            seen.update({name: np.concatenate([seen[name], found]) for name, found in drawn.items()})
        met, reached = seen[bar][:last], fid(seen[bar][:last], reference)
        for name in names:
            above = kid_difference(seen[name], met, holdout, strata(last))
            standings[name] = Standing(samples=last, above=above, fid_ratio=fid(seen[name], reference) / reached)
        return [name for name in names if not is_worse(standings[name])]

    def to_the_end(names: Sequence[str]) -> bool:
        """Whether one came there that is as good as `bar`."""
        for last in rounds[1:]:
            names = go_on(names, last) if names else []
        return any(equal_quality(standings[name].fid_ratio, 1.0) for name in names)

    levels = sorted(set(cost.values()))
    if not any(to_the_end(go_on(enter([name for name in cost if cost[name] == level]), rounds[0])) for level in levels):
        last = sorted(standings, key=lambda name: standings[name].above.estimate)[:LAST_ONES]
        go_on([name for name in last if len(seen[name]) < rounds[-1]], rounds[-1])
    return standings, {name: found for name, found in seen.items() if len(found) == rounds[-1]}


def is_worse(standing: Standing) -> bool:
    """Shown to be, by both distances."""
    return standing.above.estimate > SURE * standing.above.error and not equal_quality(standing.fid_ratio, 1.0)


@dataclass(frozen=True)
class Front:
    """The measured grid and the point that stands for it as the variant dull_best. fids: of those that ran to the end."""

    points: Sequence[Point]
    speed: Mapping[str, float]          # images/s by point name
    cost: Mapping[str, float]           # on goal.target, by point name
    standings: Mapping[str, Standing]   # by point name
    fids: Mapping[str, float]           # of those that ran to the end, by point name
    bar: float                          # compressed's FID on the same noise
    best: Point
    qualifies: bool                     # whether best is as good as compressed

    @classmethod
    def of(cls, points: Sequence[Point], speed: Mapping[str, float], cost: Mapping[str, float],
           standings: Mapping[str, Standing], fids: Mapping[str, float], bar: float) -> "Front":
        """best: the cheapest as good as compressed, of equally dear ones the better; if none is, the point of lowest FID."""
        ran = [point for point in points if point.name in fids]
        equal = [point for point in ran if equal_quality(fids[point.name], bar)]
        best = min(equal, key=lambda point: (cost[point.name], fids[point.name]), default=None) or min(
            ran, key=lambda point: (fids[point.name], cost[point.name]))
        return cls(points, speed, cost, standings, fids, bar, best, bool(equal))

    def table(self) -> list[dict]:
        """A row per point that ran; the FID of those that ran to the end, under the name of its samples."""
        rows = []
        for p in self.points:
            if p.name not in self.standings:
                continue
            standing = self.standings[p.name]
            decisive = {fid_name(standing.samples): self.fids[p.name]} if p.name in self.fids else {}
            rows.append({"name": p.name, "precision": p.precision, "solver": p.solver, "spacing": p.spacing, "nfe": p.steps,
                         "images_per_s": self.speed[p.name], "cost": self.cost[p.name], "samples": standing.samples,
                         "kid_above": standing.above.estimate, "kid_above_error": standing.above.error,
                         "fid_ratio": standing.fid_ratio, **decisive, "best": p == self.best})
        return rows


def equal_quality(fid: float, bar: float) -> bool:
    """With the tolerance that the verdict grants compressed: without it the front would have to be better to count as equal."""
    return fid <= bar * (1 + EQUAL)
