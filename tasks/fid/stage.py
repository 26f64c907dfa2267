"""Quality of every package, through the backend that it ships for, on seeds and a feature net that no choice was made with.

Reads: data (holdout, train split, both feature nets, reference statistics), pretrain_load (teacher: shape, schedule, classes),
profile (model.csv: times of the dull front's precisions), package (every variant, and dense at three precisions).
Writes: fid.csv (a row per variant), dull.csv (a row per point of the dull front that ran, and what it had to reach),
dull_best.json (package and recipe of the front's best point), samples/<variant>.npy (the first images, uint8). Report: the
rows, the front, the protocol.
Left out: guidance (scale 1 throughout); FID against published reference sets.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tasks.core.artifacts import Inputs, Report, digest, hash_file, write_json
from tasks.core.denoiser import Denoiser, load
from tasks.core.params import Goal, check_choice, check_different, check_range
from tasks.core.progress import track
from tasks.core.quality import EQUAL, features, fid, fid_name, strata_of
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, labels_for
from tasks.data.features import describe_judge, load_feature_net, load_inception, load_labels, load_reference
from tasks.fid import dull, measure
from tasks.fid.extrapolate import EXTRAPOLATED
from tasks.fid.measure import Judge, Seen
from tasks.fid.sampling import Job, Sampler, sample_jobs
from tasks.fid.variants import read_networks, read_recipes, same_samples, twice_the_steps, twin_jobs, variant_jobs
from tasks.runtime.solver import SOLVERS

INPUTS = ("data", "pretrain_load", "profile", "package")
DULL_SOLVERS = (*SOLVERS, EXTRAPOLATED)
SHOWN = 40  # images of every variant that are kept

Draw = Callable[[list[Job], str], dict[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class DullParams:
    """The grid of the dull front, and the set of samples on which its best point is selected."""

    precisions: tuple[str, ...]   # fp32 | bf16 | int8
    solvers: tuple[str, ...]      # see runtime/solver.py, or extrapolated
    spacings: tuple[str, ...]     # uniform | logsnr | quadratic | karras
    steps: tuple[int, ...]
    heat: int                     # images on which all solvers and spacings of one number of steps are compared first
    kept: int                     # of these, nearest to the converged image, go on to the race at every precision
    rounds: tuple[int, ...]       # samples after which points clearly worse than compressed drop out; the last decides
    seed: int
    batch: int                    # of the profile's times that say how fast a point is

    def __post_init__(self):
        for name, choices in (("precisions", ("fp32", "bf16", "int8")), ("solvers", DULL_SOLVERS), ("spacings", SPACINGS)):
            check_different(f"fid.dull.{name}", getattr(self, name))
            for value in getattr(self, name):
                check_choice(f"fid.dull.{name}", value, choices)
        for name, low, high in (("steps", 1, 1000), ("rounds", 10, 10**6)):
            check_different(f"fid.dull.{name}", getattr(self, name))
            for value in getattr(self, name):
                check_range(f"fid.dull.{name}", value, low, high)
        if list(self.rounds) != sorted(set(self.rounds)):
            raise ValueError(f"fid.dull.rounds: {list(self.rounds)} does not rise")
        for name, low, high in (("seed", 0, 10**6), ("batch", 1, 4096), ("heat", 2, 10**6), ("kept", 1, 1000)):
            check_range(f"fid.dull.{name}", getattr(self, name), low, high)


@dataclass(frozen=True, kw_only=True)
class Params:
    samples: int      # of every variant
    pairs: int        # of these that fidelity compares
    batch: int        # images per network evaluation
    seed: int         # of the noise; no other stage's
    resamples: int    # of the paired bootstrap
    dull: DullParams
    goal: Goal

    def __post_init__(self):
        for name, low, high in (("samples", 10, 10**6), ("pairs", 2, self.samples), ("batch", 1, 4096), ("seed", 0, 10**6),
                                ("resamples", 20, 10**5)):
            check_range(f"fid.{name}", getattr(self, name), low, high)
        if self.seed == self.dull.seed:
            raise ValueError(f"fid.seed: {self.seed} is fid.dull.seed too; what is selected on may not be reported on")


def run(params: Params, inputs: Inputs, out: Path) -> Report:
    teacher, recipes = load(inputs["pretrain_load"] / "teacher"), read_recipes(inputs["package"])
    packages = inputs.cluster.ship(inputs["package"])
    make = partial(Sampler, packages, teacher.schedule, teacher.sample_shape, teacher.num_classes, params.batch)
    inputs.cluster.prepare(make)
    draw = partial(sample, params=params, inputs=inputs, make=make)
    front = dull_front(params, inputs, teacher, recipes, draw)
    jobs = [*variant_jobs(recipes, params.samples, params.seed),
            dull.job(front.best, recipes, teacher.schedule, params.samples, params.seed, name="dull_best")]
    images, twins, finer = draw_variants(jobs, recipes["dense"], teacher, params, draw)
    rows = measured(images, twins, finer, params, inputs, teacher.num_classes)
    for job in jobs:
        rows[job.name] |= {"nfe": job.recipe.nfe, "solver": job.recipe.solver}
    rows["dull_best"] |= {"point": front.best.name, "as_good_as_compressed": front.qualifies,
                          "selection_samples": params.dull.rounds[-1]}
    write_front(front, jobs[-1].recipe, params, out)
    write_samples(out / "samples", images)
    write_rows(out / "fid.csv", [{"variant": name, **row} for name, row in rows.items()])
    return Report({**rows, "dull": front.table(), "protocol": protocol(params, inputs["data"])})


def sample(jobs: list[Job], label: str, *, params: Params, inputs: Inputs,
           make: Callable[[], Sampler]) -> dict[str, np.ndarray]:
    """uint8 (n, C, H, W) by job name, on as many workers as there are; what several jobs would draw alike is drawn once."""
    drawn_as = same_samples(jobs, read_networks(inputs["package"], [job.package for job in jobs]))
    distinct = [job for job in jobs if drawn_as[job.name] is job]
    images = sample_jobs(distinct, make, inputs.cluster, params.batch, inputs.checkpoint, label)
    return {job.name: images[drawn_as[job.name].name][:job.n] for job in jobs}


def dull_front(params: Params, inputs: Inputs, teacher: Denoiser, recipes: Mapping[str, Recipe], draw: Draw) -> dull.Front:
    """Race the grid against compressed on the selection seeds and the search net."""
    how, data = params.dull, inputs["data"]
    times = dull.read_times(inputs["profile"] / "model.csv", how.batch, how.precisions)
    points = dull.grid(how.precisions, how.solvers, how.spacings, how.steps)
    bar = Job(name="dull_bar", package="compressed", recipe=recipes["compressed"], n=how.rounds[-1], seed=how.seed)
    jobs = {job.name: job for job in (bar, *(dull.job(point, recipes, teacher.schedule, bar.n, how.seed) for point in points))}
    net, reference = load_feature_net(data, "search"), load_reference(data, "search")

    def more(names: Sequence[str], first: int, last: int) -> dict[str, np.ndarray]:
        asked = {f"{name}_{first}": name for name in names}
        fresh = [replace(jobs[name], name=key, first=first, n=last - first) for key, name in asked.items()]
        racing = sum(name != bar.name for name in names)
        found = draw(fresh, f"fid: the dull front, {racing} point{'s' * (racing != 1)} to {last} samples")
        return {asked[key]: features(net, images) for key, images in found.items()}

    fastest, ranked = min(times, key=times.get), {}

    def enter(names: Sequence[str]) -> list[str]:
        """Those whose solver and spacing go on from the heat of their number of steps, at whatever precision it was."""
        there = [point for point in points if point.name in names]
        for steps in sorted({point.steps for point in there} - ranked.keys()):
            field = [point for point in points if point.steps == steps]
            heat = dull.heat_jobs(field, fastest, recipes, teacher.schedule, how.heat, how.seed)
            images = draw([*heat.values()], f"fid: {len(heat) - 1} solvers and spacings at {steps} steps")
            ranked[steps] = dull.nearest({key: features(net, images[job.name]) for key, job in heat.items()}, how.kept)
        return [point.name for point in there if dull.sampler_of(point) in ranked[point.steps]]

    speed = {point.name: dull.images_per_s(point, times, how.batch) for point in points}
    cost = dull.target_costs(points, params.goal.target, speed, inputs["package"], recipes, teacher)
    standings, seen = dull.race(cost, bar.name, how.rounds, more, features(net, np.load(data / "holdout.npy")), reference,
                                lambda n: strata_of(asked_labels(n, teacher.num_classes)), enter)
    fids = {name: fid(found, reference) for name, found in seen.items()}
    reached = fids.pop(bar.name)
    front = dull.Front.of(points, speed, cost, standings, fids, reached)
    if not front.qualifies:
        print(f"fid: no point of the dull front reached compressed's quality on {bar.n} selection samples; "
              f"dull_best is the one of the lowest FID of those that ran to the end, {front.best.name}")
    return front


def draw_variants(jobs: list[Job], dense: Recipe, teacher: Denoiser, params: Params,
                  draw: Draw) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """-> images by variant, images of the dense twin by variant, images of dense at twice the steps."""
    finer = twice_the_steps(dense, teacher.schedule, params.pairs, params.seed)
    extra, twins = twin_jobs(jobs, dense, params.pairs)
    images = draw([*jobs, finer, *extra], "fid: sampling the variants")
    return ({job.name: images[job.name] for job in jobs}, {name: images[other][:params.pairs] for name, other in twins.items()},
            images[finer.name])


def measured(images: Mapping[str, np.ndarray], twins: Mapping[str, np.ndarray], finer: np.ndarray, params: Params,
             inputs: Inputs, num_classes: int) -> dict[str, dict]:
    """Every number of every variant, on the report net; num_classes: of the teacher."""
    data, rng = inputs["data"], np.random.default_rng(params.seed)
    train, holdout = np.load(data / "train.npy"), np.load(data / "holdout.npy")
    judge = Judge.of(load_feature_net(data, "report"), holdout, load_labels(data, "holdout"), load_reference(data, "report"))
    seen = {name: Seen.of(judge, found) for name, found in images.items()}
    labels = asked_labels(params.samples, num_classes)
    rows = {name: measure.distribution(s, judge, labels) for name, s in track(seen.items(), len(seen), "fid: metrics")}
    found = {name: s.features for name, s in seen.items()}
    dense_twins = {name: features(judge.net, x) for name, x in twins.items()}
    add(rows, measure.fidelities(found, dense_twins, features(judge.net, finer)))
    real = measure.real_fid(train, load_labels(data, "train"), params.samples, judge)
    add(rows, measure.losses(found, judge, labels, params.goal.max_quality_loss, params.resamples, rng, real))
    add(rows, {name: measure.memorised(images[name], train, holdout, rng) for name in ("dense", "compressed")})
    add(rows, inception_fids(images, data))
    return rows


def asked_labels(n: int, num_classes: int) -> np.ndarray | None:
    """What samples 0 .. n - 1 are asked to show; None from a teacher without classes."""
    labels = labels_for(range(n), num_classes)
    return None if labels is None else labels.numpy()


def add(rows: dict[str, dict], more: Mapping[str, dict]) -> None:
    for name, numbers in more.items():
        rows[name] |= numbers


def inception_fids(images: Mapping[str, np.ndarray], data: Path) -> dict[str, dict[str, float]]:
    """FID on the net that data.inception names, under its own name; nothing if it names none."""
    net = load_inception(data)
    if net is None:
        return {}
    reference = load_reference(data, "inception")
    return {name: {f"{fid_name(len(found))}_inception": fid(features(net, found), reference)} for name, found in images.items()}


def protocol(params: Params, data: Path) -> dict:
    """What a reader needs to repeat the numbers."""
    *early, decisive = params.dull.rounds
    dropping = " and ".join(map(str, early)) or "no"
    reference = digest([hash_file(data / f"reference_report_{part}.npy") for part in ("mu", "sigma")])
    return {"samples": params.samples, "seed": params.seed, "feature net": describe_judge(data),
            "reference": f"holdout, {len(np.load(data / 'holdout.npy', mmap_mode='r'))} images, {reference}",
            "backend": f"OpenVINO, batch {params.batch}", "fidelity pairs": params.pairs, "resamples": params.resamples,
            "dull front": f"seed {params.dull.seed}, search net; of each number of steps the {params.dull.kept} solvers and "
                          f"spacings run that are nearest to the converged image on {params.dull.heat} samples; points drop "
                          f"out after {dropping} samples where their KID is {dull.SURE:g} standard errors, their FID "
                          f"{EQUAL:.0%} above compressed's, and do not run if a cheaper one is as good; dull_best: the least "
                          f"{params.goal.target} with a FID of {decisive} samples up to {EQUAL:.0%} above compressed's"}


def write_front(front: dull.Front, recipe: Recipe, params: Params, out: Path) -> None:
    n = params.dull.rounds[-1]
    compressed = {"name": "compressed", "samples": n, "kid_above": 0.0, fid_name(n): front.bar}
    write_rows(out / "dull.csv", [*front.table(), compressed])
    write_json(out / "dull_best.json", {"package": front.best.package, "recipe": recipe.to_json(), "point": front.best.name,
                                        "as_good_as_compressed": front.qualifies})


def write_samples(folder: Path, images: Mapping[str, np.ndarray]) -> None:
    folder.mkdir()
    for name, found in images.items():
        np.save(folder / f"{name}.npy", found[:SHOWN])


def write_rows(path: Path, rows: list[dict]) -> None:
    """A number that a row does not have is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
