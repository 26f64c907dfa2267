"""Which samples the table needs: every package under its own recipe, and what each is compared with, image by image."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tasks.core.artifacts import digest, read_json
from tasks.core.denoiser import Schedule
from tasks.core.recipe import Recipe
from tasks.core.sampler import dense_recipe
from tasks.fid.sampling import Job
from tasks.runtime.packed import MANIFEST

FRONT = "dull_"  # packages of the dull front: raw material of dull_best, no variants themselves


def read_recipes(packages: Path) -> dict[str, Recipe]:
    """Of every package, by name. Raises ValueError if what everything is compared with, or compared for, is missing."""
    found = {p.parent.name: Recipe.from_json(read_json(p)) for p in sorted(packages.glob("*/recipe.json"))}
    missing = {"dense", "compressed"} - found.keys()
    if missing:
        raise ValueError(f"{packages}: holds no package {', '.join(sorted(missing))}; found {', '.join(found) or 'none'}")
    return found


def read_files(package: Path) -> dict[str, dict]:
    """Bytes and hash of every data file of a package, by its place in it."""
    return read_json(package / MANIFEST)["files"]


def read_networks(packages: Path, names: Sequence[str]) -> dict[str, str]:
    """What each package evaluates, as a digest of denoiser/: equal weights alone may be run with other activation ranges."""
    return {name: digest({path: facts for path, facts in read_files(packages / name).items() if path.startswith("denoiser/")})
            for name in names}


def same_samples(jobs: Sequence[Job], networks: Mapping[str, str]) -> dict[str, Job]:
    """By job name the one job whose first samples are its own: the longest of equal network, sampling and noise.

    Precision and sparsity are part of the network that a package holds.
    """
    def sampled(job: Job) -> tuple:
        recipe = job.recipe
        return networks[job.package], *recipe.sampling.values(), recipe.cache, job.seed, job.first

    longest = {sampled(job): job for job in sorted(jobs, key=lambda job: job.n)}
    return {job.name: longest[sampled(job)] for job in jobs}


def variant_jobs(recipes: Mapping[str, Recipe], n: int, seed: int) -> list[Job]:
    """One job per variant, under its own recipe."""
    return [Job(name=name, package=name, recipe=recipe, n=n, seed=seed) for name, recipe in recipes.items()
            if not name.startswith(FRONT)]


def twice_the_steps(dense: Recipe, schedule: Schedule, n: int, seed: int) -> Job:
    """Dense at 2 x its steps: the distance between the two is the unit of fidelity."""
    return Job(name="dense_twice_the_steps", package="dense", recipe=dense_recipe(schedule, 2 * dense.nfe), n=n, seed=seed)


def twin(recipe: Recipe) -> Recipe | None:
    """The same solver and timesteps with nothing compressed; None where the variant is just that: only its sampling differs."""
    changed = recipe.cache or recipe.sparsity or any(token != "fp32" for token in recipe.precision.values())
    return Recipe(**recipe.sampling) if changed else None


def twin_jobs(jobs: list[Job], dense: Recipe, n: int) -> tuple[list[Job], dict[str, str]]:
    """-> jobs of the distinct twins other than dense itself, name of the job that is a variant's twin by variant."""
    names, twins, extra = {tuple(dense.sampling.values()): "dense"}, {}, []
    for job in jobs:
        recipe = twin(job.recipe)
        if recipe is None:
            continue
        sampling = tuple(recipe.sampling.values())
        if sampling not in names:
            names[sampling] = f"dense_as_{job.name}"
            extra.append(replace(job, name=names[sampling], package="dense", recipe=recipe, n=n))
        twins[job.name] = names[sampling]
    return extra, twins
