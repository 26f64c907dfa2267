"""Shared steps: what is counted as shared by hand, and that images are the same bit for bit with and without."""

from dataclasses import replace

import pytest
import torch

from tasks.core.denoiser import build
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import sample_in_chunks
from tasks.evolve.fitness import live
from tasks.evolve.prefix import Predictions, evaluated, shared, step_keys
from tasks.runtime.precision import calibrate_ranges
from tasks.runtime.solver import solver_steps
from tests.unit.evolve.toy import CONFIG, SCHEDULE

PLAN = CachePlan(sublayers=("a", "b"), compute=((True, True), (False, True), (True, True), (True, False)))


@pytest.fixture(scope="module")
def denoiser():
    torch.manual_seed(0)
    made = build("DiTTransformer2DModel", CONFIG, SCHEDULE)
    for parameter in made.model.parameters():  # adaLN-Zero begins as the identity: without this no sublayer would matter
        parameter.data = parameter.data + 0.2 * torch.randn(parameter.shape)
    made.model.eval().requires_grad_(False)
    return made


def keys(timesteps, solver="ddim", plan=None, head="h"):
    return step_keys(head, solver_steps(SCHEDULE, timesteps, solver), plan)


def common(a, b):
    """Keys that are equal, which are the first ones."""
    same = [x == y for x, y in zip(a, b, strict=False)]
    assert same == sorted(same, reverse=True)
    return sum(same)


def test_a_step_is_shared_up_to_the_first_timestep_that_differs():
    base = keys((99, 70, 40, 10))
    assert common(base, keys((99, 70, 40, 10))) == 4
    assert common(base, keys((99, 70, 40, 20))) == 3
    assert common(base, keys((99, 60, 40, 10))) == 1  # the step to 60 is another one, the prediction at 99 is not
    assert common(base, keys((98, 70, 40, 10))) == 0
    assert common(base, keys((99, 70, 40, 10), head="other bits")) == 0
    assert common(keys((99, 70, 40)), keys((99, 70, 40, 10))) == 3


def test_solvers_differ_from_their_second_step_on():
    """dpm2m's first step has no history: state and prediction at the second timestep are DDIM's; the step from there is not."""
    assert common(keys((99, 70, 40, 10)), keys((99, 70, 40, 10), "dpm2m")) == 2


def test_a_cache_plan_matters_from_the_first_step_that_skips():
    timesteps = (99, 70, 40, 10)
    assert common(keys(timesteps), keys(timesteps, plan=PLAN)) == 1
    later = replace(PLAN, compute=(*PLAN.compute[:3], (True, True)))
    assert common(keys(timesteps, plan=PLAN), keys(timesteps, plan=later)) == 3
    assert common(keys(timesteps, plan=PLAN), keys(timesteps, plan=replace(PLAN, forecast="taylor"))) == 3
    learned = replace(PLAN, forecast="learned", weights=(((), ()), ((0.5,), ()), ((), ()), ((), (0.5, 0.1, 0.2))))
    other = replace(learned, weights=(*learned.weights[:3], ((), (0.5, 0.1, 0.3))))
    assert common(keys(timesteps, plan=learned), keys(timesteps, plan=other)) == 3
    whole = replace(PLAN, compute=((True, True),) * 4)
    assert common(keys(timesteps), keys(timesteps, plan=whole)) == 4


def test_a_known_step_is_evaluated_where_a_later_one_reuses_it():
    known = [True, True, True, False]
    assert evaluated(known, None) == [False, False, False, True]
    assert evaluated(known, PLAN) == [False, False, True, True]                              # b of step 2 is reused
    assert evaluated(known, replace(PLAN, forecast="taylor")) == [True, True, True, True]    # of step 1, too; there a of 0
    assert evaluated([True] * 4, PLAN) == [False] * 4


def test_the_least_recently_used_goes_first_and_size_is_bounded():
    store, value = Predictions(capacity=3 * 4 * 10), torch.zeros(10)
    for key in "abc":
        store.put(key, value)
    store.get("a")
    store.put("d", value)
    store.put("d", value)
    assert set(store.kept) == {"a", "c", "d"} and store.size == 120
    store.put("e", torch.zeros(1000))
    assert not store.kept and store.size == 0
    assert Predictions(0).get("a") is None


def test_a_view_keeps_no_more_than_itself():
    store = Predictions(capacity=40)
    store.put("a", torch.zeros(100)[:10])
    assert store.kept["a"].untyped_storage().nbytes() == 40


def images(denoiser, recipe, ranges, store):
    steps = solver_steps(SCHEDULE, recipe.timesteps, recipe.solver)
    with live(denoiser, recipe, ranges) as predict:
        if store is not None:
            predict = shared(predict, store, ["teacher", recipe.precision], steps, recipe.cache)
        chunks = sample_in_chunks(predict, denoiser.schedule, recipe, denoiser.sample_shape, 7, 3, 3, chunk=4)
        return torch.cat([torch.from_numpy(chunk) for chunk in chunks])


@pytest.mark.parametrize("forecast", ["none", "taylor"])
def test_images_are_the_same_bit_for_bit(denoiser, forecast):
    names = tuple(s.name for s in denoiser.sublayers())
    x, labels = torch.randn(32, *denoiser.sample_shape), torch.zeros(32, dtype=torch.int64)
    ranges = calibrate_ranges(denoiser.model, [(x, torch.randint(0, 100, (32,)), labels)])
    low = dict.fromkeys(ranges, "w4a5")
    rows = [[True] * 4, [True, False, True, False], [False, True, True, True], [True] * 4, [True, True, False, True]]
    plan = CachePlan(sublayers=names, compute=tuple(map(tuple, rows)), forecast=forecast)
    base = Recipe(timesteps=(99, 80, 60, 40, 20), precision=low)
    recipes = [base, replace(base, solver="dpm2m"), replace(base, timesteps=(99, 80, 60, 30, 20)), replace(base, cache=plan),
               replace(base, cache=plan, timesteps=(99, 80, 60, 40, 10)), replace(base, precision={}),
               replace(base, cache=replace(plan, compute=plan.compute[:4]), timesteps=(99, 80, 60, 40)), base]
    store = Predictions(1 << 20)
    for recipe in recipes:
        assert torch.equal(images(denoiser, recipe, ranges, store), images(denoiser, recipe, ranges, None)), recipe
    assert store.asked == 2 * sum(recipe.nfe for recipe in recipes)
    assert 0.3 < store.hit_rate < 0.7
    before = store.saved
    images(denoiser, base, ranges, store)
    assert store.saved == before + 2 * 5, "both chunks of a recipe that was seen cost nothing"
