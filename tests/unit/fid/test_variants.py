"""Which samples are drawn and what each variant is compared with."""

import json
from dataclasses import replace

import pytest

from tasks.core.recipe import CachePlan, Recipe
from tasks.fid.variants import read_recipes, twin, twin_jobs, variant_jobs

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
