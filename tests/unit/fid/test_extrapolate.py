"""Skipped evaluations as rows, against the loop that skips them."""

import numpy as np
import pytest
import torch

from tasks.core.recipe import Recipe
from tasks.core.sampler import spaced_timesteps
from tasks.core.schedule import Schedule
from tasks.fid.extrapolate import evaluated_steps, extrapolated_sampling
from tasks.runtime.solver import integrate, recipe_steps, solver_steps

NOISE = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def net(x, t, labels=None, step=0):
    """Bounded."""
    return torch.tanh(1.3 * x.flip(-1)) + torch.sin(t.view(-1, 1, 1, 1) / 150)


def test_what_is_evaluated_by_default_of_28_steps():
    """OpenVINO GenAI's should_compute: warm-up, then two extrapolated steps before each evaluation, the last two evaluated."""
    assert evaluated_steps(28) == [0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 20, 23, 26, 27]
    assert evaluated_steps(10) == [0, 1, 2, 3, 4, 5, 8, 9] and evaluated_steps(4) == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("evaluations", [1, 7, 8, 9, 12, 16])
def test_rows_are_the_loop_that_extrapolates(evaluations, kind):
    schedule = Schedule.from_config({"prediction_type": kind, "clip_sample": False})
    recipe = Recipe(**extrapolated_sampling(schedule, evaluations, "uniform"))
    assert recipe.nfe == evaluations
    steps = {1: 1, 7: 7, 8: 10, 9: 13, 12: 22, 16: 34}[evaluations]
    timesteps, x, asked, outputs = spaced_timesteps(schedule, steps), NOISE, evaluated_steps(steps), {}
    for i, row in enumerate(solver_steps(schedule.config, timesteps, "ddim")):
        if i in asked:
            outputs[i] = net(x, torch.full((2,), timesteps[i]))
            prediction = outputs[i]
        else:
            earlier, last = list(outputs)[-2:]
            prediction = outputs[last] + (i - last) * (outputs[last] - outputs[earlier]) / (last - earlier)
        x0 = row.p * x + row.q * prediction
        x = row.a * x + row.b[0] * x0
    *_, (_, _, found) = integrate(net, recipe_steps(schedule.config, recipe), NOISE, None, None)
    assert ((found - x).abs().max() / x.abs().max()).item() < 1e-9
    assert recipe.timesteps == tuple(np.array(timesteps)[asked].tolist())


def test_a_schedule_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="no list of extrapolated takes 9 evaluations with 10 timesteps"):
        extrapolated_sampling(Schedule.from_config({"num_train_timesteps": 10}), 9, "uniform")
