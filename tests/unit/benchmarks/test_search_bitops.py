"""Which points of a front the study of BitOPs judges, and what anyone would try; sampling itself is its trial's, `--few`."""

import pytest

from benchmarks import results
from benchmarks.search import bitops
from benchmarks.search.bitops import DULL_BITS, DULL_STEPS, SPACINGS, Point, best_of_each_cost, dull_recipes
from benchmarks.search.curves import SOLVERS
from benchmarks.search.efficiency import eight_bits, layers_of
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.pretrain_load.architectures import SCHEDULE, dit


@pytest.fixture(scope="module")
def teacher():
    return build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)


def test_of_each_cost_the_best_guess_is_tried_if_it_may_be_as_good_as_any():
    def point(cost, guess):
        return Point(Recipe(timesteps=(int(100 * guess), 0)), cost, guess)

    points = [point(2.0, 1.3), point(1.0, 1.05), point(1.0, 1.02), point(0.5, 1.2), point(3.0, 1.0), point(4.0, 1.09)]
    assert [(one.cost, one.guess) for one in best_of_each_cost(points)] == [(1.0, 1.02), (3.0, 1.0), (4.0, 1.09)]


def test_the_dull_are_all_solvers_spacings_steps_and_bits(teacher):
    found = list(dull_recipes(teacher))
    assert len(found) == len(SOLVERS) * len(SPACINGS) * len(DULL_STEPS) * len(DULL_BITS)
    assert {len(set(recipe.precision.values())) for recipe in found} == {1}
    assert all(set(recipe.precision) == set(layers_of(teacher)) and recipe.cache is None for recipe in found)


def test_the_base_is_eight_bits_at_a_hundred_uniform_steps(teacher):
    base = eight_bits(teacher, layers_of(teacher))
    assert (base.nfe, base.solver, set(base.precision.values())) == (100, "ddim", {"w8a8"})


def point(name):
    return Point(Recipe(timesteps=(name, 0)), float(name), 0.0)


class Found(bitops.Study):
    """A study whose FIDs where samples choose and bounds where they are judged are given, by name; the base's FID is 1."""

    sizes, base = bitops.FEW, Recipe(timesteps=(99, 0))

    def __init__(self, chosen, bounds):
        self.chosen, self.bounds = {99: 1.0, **chosen}, bounds

    def fid(self, recipe, noise, n):
        assert noise == bitops.CHOOSING
        return self.chosen[recipe.timesteps[0]]

    def loss(self, recipe, base, n):
        return {"loss_upper95": self.bounds[recipe.timesteps[0]]}


@pytest.mark.parametrize("chosen, bounds, expected", [
    ({1: 1.5, 2: 1.02, 3: 1.01}, {2: 0.04}, [None, 0.04]),
    ({1: 1.5, 2: 1.02, 3: 1.01}, {2: 0.06, 3: 0.04}, [None, 0.06, 0.04]),  # lucky where chosen: the next dearer one
    ({1: 1.02, 2: 1.3, 3: 1.0}, {1: 0.2, 3: 0.0}, [0.2, None, 0.0]),       # what is clearly worse is not judged
])
def test_the_cheapest_is_chosen_on_one_noise_and_judged_on_another(chosen, bounds, expected):
    found = list(Found(chosen, bounds).cheapest(map(point, chosen)))
    assert [numbers.get("loss_upper95") for _, numbers in found] == expected
    assert [(point.cost, numbers["loss_chosen"]) for point, numbers in found] == [
        (name, pytest.approx(fid - 1)) for name, fid in chosen.items()][: len(expected)]


def test_what_wins_where_samples_choose_is_judged():
    assert Found({1: 1.2, 2: 1.1, 3: 1.3}, {}).best(point(name).recipe for name in (1, 2, 3)) == point(2).recipe


def test_rows_and_recipes_of_a_part_replace_all_that_it_had(tmp_path):
    study = object.__new__(bitops.Study)
    study.results, study.recipes = tmp_path / "results.csv", {}
    for name in ("dull.3", "steps5.ddim_uniform"):
        results.append(study.results, bitops.rows(name, {"cost": 1.0}, "p"))
    (tmp_path / "recipes").mkdir()
    for name in ("dull.3", "steps5"):
        (tmp_path / "recipes" / f"{name}.json").write_text("{}")

    def judged():
        study.recipes["dull.0"] = Recipe(timesteps=(5, 0))
        yield from bitops.rows("dull.0", {"cost": 2.0}, "p")

    study.compared_at_equal_quality = judged
    study.run([bitops.EQUAL])
    assert {row["variant"] for row in results.read(study.results)} == {
        "bitops.dull.0", "bitops.steps5.ddim_uniform", "bitops.seconds_equal"}
    assert {path.name for path in (tmp_path / "recipes").iterdir()} == {"dull.0.json", "steps5.json"}


def test_facts_of_a_recipe():
    plan = CachePlan(sublayers=("trunk",), compute=((True,), (False,)))
    found = bitops.facts(Recipe(timesteps=(9, 0), precision={"a": "w4a8", "b": "w6a6"}, cache=plan))
    assert found == {"nfe": 2, "bits_mean": 6, "removed_share": 0.5}
