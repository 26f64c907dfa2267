"""Which points of a front the study of BitOPs judges, and what anyone would try; sampling itself is its trial's, `--few`."""

import pytest

from benchmarks.search import bitops
from benchmarks.search.bitops import DULL_BITS, DULL_STEPS, FINALISTS, SPACINGS, Point, dull_recipes, first_of, levels
from benchmarks.search.efficiency import SOLVERS, eight_bits, layers_of
from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.evolve.search import Evaluation
from tasks.pretrain_load.architectures import SCHEDULE, dit


@pytest.fixture(scope="module")
def teacher():
    return build("DiTTransformer2DModel", dit(8, 1, 4, width=32, depth=2, heads=2, patch=2), SCHEDULE)


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_the_first_that_holds_is_found_in_few_tries(n):
    for first in range(n + 1):
        tried = []

        def holds(i, first=first, tried=tried):
            tried.append(i)
            return i >= first

        assert first_of(n, holds) == min(first, n - 1) and len(tried) <= n.bit_length()


def test_a_level_holds_the_best_of_about_its_cost():
    told = [Evaluation("dear", 3.0, 1.0), Evaluation("cheap", 1.0, 5.0), Evaluation("behind", 2.0, 6.0),
            Evaluation("failed", 1.0, None), Evaluation("as cheap", 0.6, 7.0), Evaluation("best of the cheap", 0.9, 4.0)]
    cheap = [Point("BEST OF THE CHEAP", 0.9, 4.0), Point("CHEAP", 1.0, 5.0), Point("AS CHEAP", 0.6, 7.0)]
    assert levels(told, str.upper, 0.5) == [cheap, [Point("DEAR", 3.0, 1.0)]]
    many = levels([Evaluation(str(k), 1.0, k) for k in range(3 * FINALISTS)], str, 0.1)
    assert [[point.guess for point in level] for level in many] == [list(range(FINALISTS))]


def test_what_costs_the_bound_is_within_it():
    bound = 0.0235359
    costs = {"below": 0.96 * bound, "at": 10 * (bound / 10), "above": 1.01 * bound}
    found = levels([Evaluation(name, cost, -cost) for name, cost in costs.items()], str, bound / 20)
    assert [[point.recipe for point in level] for level in found] == [["at", "below"], ["above"]]


def test_the_dull_are_all_solvers_spacings_steps_and_bits(teacher):
    found = list(dull_recipes(teacher))
    assert len(found) == len(SOLVERS) * len(SPACINGS) * len(DULL_STEPS) * len(DULL_BITS)
    assert {len(set(recipe.precision.values())) for recipe in found} == {1}
    assert all(set(recipe.precision) == set(layers_of(teacher)) and recipe.cache is None for recipe in found)


def test_the_base_is_eight_bits_at_a_hundred_uniform_steps(teacher):
    base = eight_bits(teacher, layers_of(teacher))
    assert (base.nfe, base.solver, set(base.precision.values())) == (100, "ddim", {"w8a8"})


def level(cost, *names):
    return [Point(Recipe(timesteps=(name, 0)), cost, 0.0) for name in names]


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
    ({1: 1.5, 2: 1.02, 3: 1.01, 4: 1.0}, {1: 0.6, 2: 0.04, 3: 0.0, 4: 0.0}, [2]),
    ({1: 1.5, 2: 1.02, 3: 1.01, 4: 1.0}, {1: 0.6, 2: 0.06, 3: 0.04, 4: 0.0}, [2, 3]),  # lucky where chosen: the next dearer
    ({1: 1.5, 2: 1.4, 3: 1.3, 4: 1.2}, {1: 0.6, 2: 0.5, 3: 0.4, 4: 0.3}, [4]),         # none is good enough: the best, and said
])
def test_the_cheapest_is_chosen_on_one_noise_and_judged_on_another(chosen, bounds, expected):
    found = Found(chosen, bounds).cheapest([level(cost, cost) for cost in chosen])
    assert [point.cost for point, _ in found] == expected


def test_of_a_level_the_best_where_samples_choose_is_judged():
    point, judged = Found({1: 1.2, 2: 1.1, 3: 1.3}, {1: 0.3, 2: 0.2, 3: 0.1}).judged(level(5.0, 1, 2, 3))
    assert (point.recipe.timesteps[0], judged) == (2, {"loss_upper95": 0.2})


def test_facts_of_a_recipe():
    plan = CachePlan(sublayers=("trunk",), compute=((True,), (False,)))
    found = bitops.facts(Recipe(timesteps=(9, 0), precision={"a": "w4a8", "b": "w6a6"}, cache=plan))
    assert found == {"nfe": 2, "bits_mean": 6, "removed_share": 0.5}
