"""Blocks, padding, resuming, and a block that fails; the network is a function of noise and label."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.core.checkpoint import Checkpoint
from tasks.core.cluster import Cluster, ClusterParams
from tasks.core.denoiser import Schedule
from tasks.core.parcel import Parcel
from tasks.core.recipe import CachePlan, Recipe
from tasks.fid.sampling import Job, Sampler, sample_jobs

SHAPE = (1, 4, 4)
HERE = Cluster(ClusterParams(address=None, workers=1, cpus_per_worker=1, gpus_per_worker=0, max_attempts=1, max_object_mb=1,
                             storage_uri=None, connect_timeout_s=1, start_timeout_s=1))
RECIPE = Recipe(timesteps=(900, 500, 100))


@pytest.fixture(scope="module")
def schedule():
    return Schedule.from_config({"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": "sample"})


def opener(folder: Path, batch: int, seen: list):
    """A network that shows its label; it records the batch and step of every call."""
    seen.append(folder.name)

    def predict(x, t, labels, step):
        assert len(x) == batch
        seen.append(step)
        return labels.view(-1, 1, 1, 1) / 5 - 1 + 0.1 * x

    return predict


def sampler(schedule, seen, open_package=opener) -> functools.partial:
    packages = Parcel("packages", here=Path("packages"))
    return functools.partial(Sampler, packages, schedule, SHAPE, 10, 4, functools.partial(open_package, seen=seen))


def draw(jobs, make, folder, batch=4) -> dict:
    return sample_jobs(jobs, make, HERE, batch, lambda name: Checkpoint(folder / name, "key", every_s=0), "test")


def job(n: int, **more) -> Job:
    return Job(**{"name": "a", "package": "dense", "recipe": RECIPE, "n": n, "seed": 3, **more})


def test_blocks_cover_a_job_once_and_skip_what_is_done():
    blocks = job(10).blocks(4, done=4)
    assert [(b.first, b.n) for b in blocks] == [(4, 4), (8, 2)]
    assert [(b.first, b.n) for b in job(3, first=7).blocks(4)] == [(7, 3)]


def test_samples_do_not_depend_on_how_many_are_drawn(schedule, tmp_path):
    make = sampler(schedule, [])
    few, many = draw([job(5)], make, tmp_path / "few"), draw([job(11)], make, tmp_path / "many")
    assert few["a"].shape == (5, *SHAPE) and few["a"].dtype == np.uint8
    assert np.array_equal(few["a"], many["a"][:5])
    means = many["a"].mean((1, 2, 3))
    assert means[0] < means[5] < means[9] and abs(means[10] - means[0]) < 25  # labels are stratified: 10 is class 0 again


def test_an_interrupted_run_draws_only_what_is_missing(schedule, tmp_path):
    whole = draw([job(10)], sampler(schedule, []), tmp_path / "whole")["a"]
    Checkpoint(tmp_path / "cut" / "samples-a", "key").save({"images": torch.from_numpy(whole[:8])})
    seen = []
    assert np.array_equal(draw([job(10)], sampler(schedule, seen), tmp_path / "cut")["a"], whole)
    assert seen == ["dense", 0, 0, 0]  # one block of three steps
    seen.clear()
    assert np.array_equal(draw([job(10)], sampler(schedule, seen), tmp_path / "cut")["a"], whole) and seen == []


def test_the_last_packages_stay_open(schedule, tmp_path):
    seen = []
    packages = ("dense", "dense", "b", "c", "dense", "d", "b")
    draw([job(8, name=str(i), package=package) for i, package in enumerate(packages)], sampler(schedule, seen), tmp_path)
    assert [s for s in seen if isinstance(s, str)] == ["dense", "b", "c", "d", "b"], "three of them"


def test_only_a_cache_sees_the_number_of_the_step(schedule, tmp_path):
    """Without one, a recipe may be longer than the package's own, whose graphs know only its own steps."""
    seen = []
    plan = CachePlan(sublayers=("x",), compute=((True,), (False,), (True,)))
    draw([job(4), job(4, name="b", recipe=Recipe(timesteps=RECIPE.timesteps, cache=plan))], sampler(schedule, seen), tmp_path)
    assert seen == ["dense", 0, 0, 0, 0, 1, 2]


def broken(folder: Path, batch: int, seen: list):
    def predict(x, t, labels, step):
        raise MemoryError("no room")
    return predict


def test_a_failed_block_says_which_and_why(schedule, tmp_path):
    with pytest.raises(RuntimeError, match="test: a, samples from 0: MemoryError: no room"):
        draw([job(4)], sampler(schedule, [], broken), tmp_path)
