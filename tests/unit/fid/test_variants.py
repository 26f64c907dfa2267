"""Which samples are drawn and what each variant is compared with."""

import json
from dataclasses import replace

import pytest

from tasks.core.recipe import CachePlan, Recipe
from tasks.fid.sampling import Job
from tasks.fid.variants import read_networks, read_recipes, same_samples, twin, twin_jobs, variant_jobs

DENSE = Recipe(timesteps=(999, 500, 0))
FEW = Recipe(timesteps=(999, 0), solver="dpm2m")
CACHED = Recipe(timesteps=(999, 0), cache=CachePlan(sublayers=("a",), compute=((True,), (False,))))
INT8 = Recipe(timesteps=(999, 0), precision={"layer": "w8a8"})
PRUNED = Recipe(timesteps=DENSE.timesteps, sparsity={"grain": "2:4", "density": {"layer": 0.5}})


def write(folder, **recipes):
    for name, recipe in recipes.items():
        (folder / name).mkdir()
        (folder / name / "recipe.json").write_text(json.dumps(recipe.to_json()))


def test_variants_are_the_packages_but_for_the_dull_front(tmp_path):
    write(tmp_path, dense=DENSE, compressed=CACHED, dull_int8=INT8)
    recipes = read_recipes(tmp_path)
    assert recipes == {"compressed": CACHED, "dense": DENSE, "dull_int8": INT8}
    assert [(j.name, j.package, j.n, j.seed) for j in variant_jobs(recipes, 7, 1)] == [
        ("compressed", "compressed", 7, 1), ("dense", "dense", 7, 1)]


def test_without_compressed_there_is_nothing_to_judge(tmp_path):
    write(tmp_path, dense=DENSE)
    with pytest.raises(ValueError, match="holds no package compressed; found dense"):
        read_recipes(tmp_path)


def test_a_twin_keeps_solver_and_timesteps_alone():
    assert twin(CACHED) == Recipe(timesteps=(999, 0))
    assert twin(replace(FEW, precision={"layer": "bf16"})) == FEW


@pytest.mark.parametrize("recipe", [DENSE, FEW, Recipe(timesteps=(9,), precision={"layer": "fp32"})])
def test_what_changes_nothing_but_the_sampling_has_no_twin(recipe):
    assert twin(recipe) is None


def test_equal_twins_are_drawn_once_and_dense_never_again():
    recipes = {"dense": DENSE, "few": FEW, "cache": CACHED, "precision": INT8, "sparse": PRUNED}
    extra, twins = twin_jobs(variant_jobs(recipes, 100, 1), DENSE, 20)
    assert twins == {"cache": "dense_as_cache", "precision": "dense_as_cache", "sparse": "dense"}
    assert [(j.name, j.package, j.recipe, j.n) for j in extra] == [("dense_as_cache", "dense", Recipe(timesteps=(999, 0)), 20)]


def test_a_network_is_its_weights_and_their_ranges(tmp_path):
    def write_package(name, weights, ranges, recipe):
        (tmp_path / name).mkdir()
        files = {"denoiser/weights.safetensors": weights, "denoiser/packing.json": ranges, "recipe.json": recipe}
        (tmp_path / name / "package.json").write_text(json.dumps({"files": files}))

    for name, facts in {"a": "wr1", "same": "wr2", "ranges": "wx1", "weights": "xr1"}.items():
        write_package(name, *facts)
    found = read_networks(tmp_path, ["a", "same", "ranges", "weights"])
    assert found["a"] == found["same"] and len(set(found.values())) == 3


def test_what_would_be_the_same_images_is_drawn_once_and_the_longest():
    def job(name, package="dense", recipe=FEW, n=10, seed=1):
        return Job(name=name, package=package, recipe=recipe, n=n, seed=seed)

    jobs = [job("short", n=5), job("few"), job("timesteps", package="timesteps"), job("bits", package="int8"),
            job("seed", seed=2), job("solver", recipe=replace(FEW, solver="ddim")),
            job("cache", recipe=replace(CACHED, solver="dpm2m"))]
    found = same_samples(jobs, {"dense": "w", "timesteps": "w", "int8": "q"})
    assert found["short"] is found["few"] is found["timesteps"] and found["few"].n == 10
    assert all(found[name].name == name for name in ("bits", "seed", "solver", "cache"))
