"""Training along the sampler's own steps: gates that are what runs, their gradient against finite differences, resume."""

import numpy as np
import pytest
import torch

from tasks.cache_learn.leader import Leader, in_units
from tasks.cache_learn.plan import plan_from_costs
from tasks.cache_learn.rollout import GatedHistory, draw_labels, gate_gradient, root_distance, train_rollout, uncached_states
from tasks.core.checkpoint import Checkpoint
from tasks.core.recipe import CachePlan, Recipe
from tasks.core.sampler import initial_noise, sample
from tasks.runtime.cache import apply_cache, remove_cache
from tasks.runtime.solver import solver_steps
from tests.unit.cache_learn.toy import Constant, Scale, ToyDenoiser, names, toy

TIMESTEPS = (999, 799, 600, 399, 199)
COMPUTE = [[True, True], [True, False], [False, True], [False, False], [True, False]]
FORECASTS = pytest.mark.parametrize("forecast", ["none", "taylor"])


def states_of(denoiser, solver="ddim", n=3):
    recipe = Recipe(timesteps=TIMESTEPS, solver=solver)
    return recipe, uncached_states(denoiser, recipe, initial_noise(denoiser.sample_shape, range(n), seed=0), None)


def gradient(denoiser, recipe, states, compute=COMPUTE, window=5, forecast="none"):
    return gate_gradient(denoiser, names(denoiser), torch.tensor(compute), solver_steps(denoiser.schedule.config, TIMESTEPS,
                         recipe.solver), states, None, window, forecast)


def cached_images(denoiser, recipe, noise, forecast):
    handle = apply_cache(denoiser.model, names(denoiser), COMPUTE, forecast, TIMESTEPS)

    def predict(x, t, labels, step):
        handle.step = step
        return denoiser(x, t, labels)

    images = sample(predict, denoiser.schedule, recipe, noise, None)
    remove_cache(denoiser.model)
    return images


@FORECASTS
@pytest.mark.parametrize("solver", ["ddim", "dpm2m"])
def test_what_is_trained_is_what_runs(solver, forecast):
    """Hard gates give the loss of the live cache's images, at either order, with and without forecasts."""
    denoiser = toy(Scale(0.4), Scale(-0.3))
    recipe, states = states_of(denoiser, solver)
    _, loss = gradient(denoiser, recipe, states, forecast=forecast)
    live = root_distance(cached_images(denoiser, recipe, states[0], forecast), states[-1])
    assert loss == pytest.approx(live.item(), rel=1e-5) and loss > 1e-3


@FORECASTS
def test_a_gates_gradient_reaches_what_later_steps_reuse(forecast):
    """h + g f(h) + (1 - g) kept, by hand over three steps of one sublayer; autograd of the written-out sum is the judge."""
    w, t = 0.5, [900.0, 700.0, 200.0]
    h = [torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([4.0])]
    gates = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    history = GatedHistory({"none": 1, "taylor": 2}[forecast])
    out = [history(t[i], w * h[i], gates[i]) for i in range(3)]
    assert [o.item() for o in out] == [0.5, 0.5, 0.5]
    out[2].backward()
    # kept after step 1: (1 - g1) 0.5 + g1 1.5; output of step 2: (1 - g2) kept + g2 2.0
    torch.testing.assert_close(gates.grad, torch.tensor([0.0, 1.0, 1.5]))


def test_a_forecasting_history_is_the_live_caches():
    """Computed 2 at 1000 and 8 at 800: 11 at 700, and a fresh output enters once its gate opens."""
    history = GatedHistory(2)
    outputs = [(1000, 2.0, 1), (900, 9.0, 0), (800, 8.0, 1), (700, 0.0, 0), (300, 6.0, 1), (0, 0.0, 0)]
    seen = [history(t, torch.tensor(y), torch.tensor(float(g))).item() for t, y, g in outputs]
    assert seen == pytest.approx([2, 2, 8, 11, 6, 4.8])


def test_a_window_cuts_gradients_and_takes_a_loss_at_its_end():
    denoiser = toy(Scale(0.4), Scale(-0.3))
    recipe, states = states_of(denoiser)
    whole, loss = gradient(denoiser, recipe, states)
    cut, same = gradient(denoiser, recipe, states, window=2)
    assert loss == same, "the student takes the same steps"
    assert not torch.allclose(whole, cut) and cut[3:].abs().sum() > 0 and cut[1, 1] != 0
    torch.testing.assert_close(gradient(denoiser, recipe, states, window=99)[0], whole)


def test_root_distance_by_hand():
    a, b = torch.zeros(2, 1, 2, 2), torch.stack([torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), 1.0)])
    assert root_distance(a, b).item() == pytest.approx(2.0)


def free_costs(sublayers=2, steps=5):
    costs = np.ones((sublayers, steps, steps))
    costs[:, np.tril(np.ones((steps, steps), bool), -1)] = np.inf
    costs[:, range(steps), range(steps)] = 0
    return costs


def trained(denoiser, folder, every_s=1e9, **changed):
    how = {"budget": 0.4, "max_masks": 3, "steps": 30, "batch": 4, "lr": 0.2, "noise": 0.5, "window": 5, "forecast": "none",
           "label_dropout": 0.1, "seed": 0, **changed}
    return train_rollout(denoiser, names(denoiser), free_costs(), Recipe(timesteps=TIMESTEPS), **how,
                         checkpoint=Checkpoint(folder, "r" * 16, every_s))


def test_a_rollout_finds_the_sublayer_that_is_free_to_reuse(tmp_path):
    """The table says that all cost the same; 4 of 10 evaluations go, and the constant's four later ones are free."""
    plan, curve = trained(toy(Constant(), Scale(-0.6)), tmp_path)
    assert [row[0] for row in plan.compute] == [True] + [False] * 4
    assert all(row[1] for row in plan.compute)
    assert plan.forecast == "none" and curve[-1][0] == 30


def test_a_rollout_with_forecasts_betters_the_plan_that_it_started_from(tmp_path):
    """Not always the best plan: where errors of one sign cancel, every gate alone is rightly priced and the set is not."""
    denoiser = toy(Constant(), Scale(-0.6))
    plan, _ = trained(denoiser, tmp_path, forecast="taylor")
    recipe, states = states_of(denoiser, n=16)
    start = plan_from_costs(free_costs(), names(denoiser), 0.4, 3)
    _, before = gradient(denoiser, recipe, states, start.compute, forecast="taylor")
    _, after = gradient(denoiser, recipe, states, plan.compute, forecast="taylor")
    assert plan.forecast == "taylor" and plan.removed_share == 0.4 and after < 0.8 * before


class Dying(ToyDenoiser):
    """Dies in the middle of a training step, after ten whole ones of twice five calls."""

    calls = 0

    def __call__(self, x, t, labels=None):
        self.calls += 1
        if self.calls > 107:
            raise InterruptedError
        return super().__call__(x, t, labels)


def test_a_resumed_rollout_ends_as_an_undisturbed_one(tmp_path):
    denoiser = toy(Scale(0.3), Scale(-0.6))
    whole = trained(denoiser, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        trained(Dying(denoiser.model, denoiser.schedule), tmp_path / "cut", every_s=0)
    assert Checkpoint(tmp_path / "cut", "r" * 16).load()["step"] == 10
    assert trained(denoiser, tmp_path / "cut", every_s=0) == whole


def test_labels_are_drawn_from_all_classes_and_dropped(tmp_path):
    labels = draw_labels(toy(Scale(0.1), num_classes=3), 1000, 0.2, torch.Generator().manual_seed(0))
    counts = torch.bincount(labels) / 1000
    torch.testing.assert_close(counts, torch.tensor([0.8 / 3] * 3 + [0.2]), atol=0.05, rtol=0)
    assert draw_labels(toy(Scale(0.1)), 4, 0.2, torch.Generator()) is None


def test_without_gradients_and_noise_the_leader_is_the_tables_plan():
    costs = free_costs(3) * np.random.default_rng(0).lognormal(0, 1, (3, 5, 5))
    costs[:, range(5), range(5)] = 0
    leader = Leader(costs, ["a", "b", "c"], 0.4, 3, 0.1, 0.0, 10)
    assert leader.plan() == plan_from_costs(costs, ["a", "b", "c"], 0.4, 3)


def test_a_learned_price_moves_a_skip_by_hand():
    """Two gates of equal cost, one skipped: its price of 5 units beats what the table says of the other."""
    leader = Leader(free_costs(1, 3), ["a"], 1 / 3, 3, 1.0, 0.0, 10)
    skipped = [i for i in (1, 2) if not leader.plan().compute[i][0]]
    assert len(skipped) == 1
    gradient = torch.zeros(3, 1)
    gradient[skipped[0]] = -5e-7
    leader.learn(torch.tensor(leader.plan().compute), gradient)
    assert leader.scores[skipped[0]].item() == pytest.approx(1.0), "one mean price at lr 1, whatever its unit"
    assert not leader.plan().compute[3 - skipped[0]][0] and leader.plan().removed_share == pytest.approx(1 / 3)


def test_costs_in_units_of_what_the_plan_pays():
    costs = free_costs(1, 3) * 7.0
    plan = CachePlan(sublayers=("a",), compute=((True,), (False,), (False,)))
    assert in_units(costs, plan)[0, 0, 1] == pytest.approx(1.0)
    free = np.where(np.isfinite(costs), 0.0, np.inf)
    assert np.array_equal(in_units(free, plan), free)
