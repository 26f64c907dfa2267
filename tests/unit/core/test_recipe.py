from dataclasses import asdict, replace

import pytest

from tasks.core.recipe import CachePlan, Recipe, bits

PLAN = CachePlan(sublayers=("a", "b"), compute=((True, True), (False, True), (False, False), (False, True)))


def test_round_trip_through_json():
    recipe = Recipe(timesteps=(9, 5, 2, 0), solver="dpm2m", cache=PLAN, precision={"l": "w8a8"},
                    sparsity={"grain": "unit", "density": {"l": 0.5}})
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.to_json() == asdict(recipe) and recipe.to_json()["sparsity"] is not recipe.sparsity
    assert recipe.nfe == 4


def test_learned_weights_travel_and_wrong_ones_are_refused():
    weights = (((), ()), ((0.5,), ()), ((1.5,), (0.25, 0.1)), ((2.0,), ()))
    recipe = Recipe(timesteps=(9, 5, 2, 0), cache=replace(PLAN, forecast="learned", weights=weights))
    assert Recipe.from_json(recipe.to_json()) == recipe
    for wrong, message in ((None, "forecast learned has no weights"), (weights[:3], "weights of 3 steps for 4"),
                           ((*weights[:3], ((2.0,),)), "step 3 has weights of 1 sublayers for 2"),
                           ((*weights[:3], ((2.0, 1.0), ())), "step 3, sublayer 0 has 2 weights for 1 outputs")):
        with pytest.raises(ValueError, match=message):
            replace(PLAN, forecast="learned", weights=wrong)
    with pytest.raises(ValueError, match="forecast taylor takes no weights"):
        replace(PLAN, forecast="taylor", weights=weights)


def test_the_forecast_travels_and_older_plans_have_none():
    recipe = Recipe(timesteps=(9, 5, 2, 0), cache=replace(PLAN, forecast="taylor"))
    assert Recipe.from_json(recipe.to_json()) == recipe
    older = recipe.to_json()
    del older["cache"]["forecast"]
    assert Recipe.from_json(older).cache == PLAN and PLAN.forecast == "none"
    with pytest.raises(ValueError, match="forecast 'cubic' is not one of none, taylor, learned"):
        replace(PLAN, forecast="cubic")


def test_plan_counts_by_hand():
    assert PLAN.removed_share == 4 / 8
    assert PLAN.masks == [(True, True), (False, True), (False, False)]


@pytest.mark.parametrize("change, message", [
    ({"timesteps": (5, 5, 1)}, "not strictly decreasing"),
    ({"timesteps": ()}, "not strictly decreasing"),
    ({"timesteps": (3, -1)}, "not strictly decreasing"),
    ({"solver": "euler"}, "solver 'euler' is not one of ddim, dpm2m"),
    ({"precision": {"l": "w9a8"}}, "precision 'w9a8' of l"),
    ({"cache": PLAN, "timesteps": (3, 2)}, "the cache plan has 4 steps, the timestep list 2"),
])
def test_a_recipe_that_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{"timesteps": (9, 5, 2, 0), **change})


def test_a_plan_must_compute_its_first_step():
    with pytest.raises(ValueError, match="first step computes every sublayer"):
        CachePlan(sublayers=("a",), compute=((False,), (True,)))


def test_bits_of_tokens():
    assert [bits(t) for t in ("fp32", "bf16", "w8a8", "w3a6")] == [(32, 32), (16, 16), (8, 8), (3, 6)]
