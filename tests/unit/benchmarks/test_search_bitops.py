"""Which points of a front the study of BitOPs judges, and what anyone would try; sampling itself is its trial's, `--few`."""

import pytest

from benchmarks.search import bitops
from benchmarks.search.bitops import DULL_BITS, DULL_STEPS, SPACINGS, Point, dull_recipes, first_of, front_of
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


def test_a_front_has_the_recipe_of_every_point():
    told = [Evaluation("dear", 3.0, 1.0), Evaluation("cheap", 1.0, 5.0), Evaluation("behind", 2.0, 6.0),
            Evaluation("failed", 1.0, None)]
    assert front_of(told, str.upper) == [Point("CHEAP", 1.0, 5.0), Point("DEAR", 3.0, 1.0)]


def test_the_dull_are_all_solvers_spacings_steps_and_bits(teacher):
    found = list(dull_recipes(teacher))
    assert len(found) == len(SOLVERS) * len(SPACINGS) * len(DULL_STEPS) * len(DULL_BITS)
    assert {len(set(recipe.precision.values())) for recipe in found} == {1}
    assert all(set(recipe.precision) == set(layers_of(teacher)) and recipe.cache is None for recipe in found)


def test_the_base_is_eight_bits_at_a_hundred_uniform_steps(teacher):
    base = eight_bits(teacher, layers_of(teacher))
    assert (base.nfe, base.solver, set(base.precision.values())) == (100, "ddim", {"w8a8"})


def front(*losses):
    """Points as far as they are good: (increase where it is chosen, bound where it is judged)."""
    return [Point(Recipe(timesteps=(k + 1, 0)), k, 0.0) for k in range(len(losses))]


@pytest.mark.parametrize("chosen, judged, expected", [
    ([0.5, 0.02, 0.01, 0.0], [0.6, 0.04, 0.0, 0.0], [1]),
    ([0.5, 0.02, 0.01, 0.0], [0.6, 0.06, 0.04, 0.0], [1, 2]),     # lucky where it was chosen: the next dearer one
    ([0.5, 0.4, 0.3, 0.2], [0.6, 0.5, 0.4, 0.3], [3]),            # none is good enough: the best is judged, and said
])
def test_the_cheapest_is_chosen_on_one_noise_and_judged_on_another(chosen, judged, expected):
    study = object.__new__(bitops.Study)
    study.base = None

    def loss(recipe, base, noise):
        place = recipe.timesteps[0] - 1
        return {"loss": chosen[place]} if noise == bitops.CHOOSING else {"loss_upper95": judged[place]}

    study.loss = loss
    assert [point.cost for point, _ in study.cheapest(front(*chosen))] == expected


def test_facts_of_a_recipe():
    plan = CachePlan(sublayers=("trunk",), compute=((True,), (False,)))
    found = bitops.facts(Recipe(timesteps=(9, 0), precision={"a": "w4a8", "b": "w6a6"}, cache=plan))
    assert found == {"nfe": 2, "bits_mean": 6, "removed_share": 0.5}
