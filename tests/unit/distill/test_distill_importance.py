import copy

import pytest
import torch

from tasks.core.denoiser import Denoiser, Schedule
from tasks.core.training import stratified_timesteps
from tasks.distill.importance import error_effects, interpolated, timestep_density
from tests.unit.distill.toy import SCHEDULE, tiny_dit, tiny_unet


def erring(teacher: Denoiser) -> Denoiser:
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return Denoiser(model, teacher.schedule)


@pytest.mark.parametrize("prediction, expected", [("sample", 1.0), ("v_prediction", None)])
def test_the_effect_of_the_last_step_is_what_its_formula_says(prediction, expected):
    """The image is the x0 of the last step: the prediction itself, or alpha x - sigma v."""
    teacher = tiny_unet()
    schedule = Schedule.from_config({**SCHEDULE, "prediction_type": prediction, "clip_sample": False})
    teacher = Denoiser(teacher.model, schedule)
    timesteps, effects = error_effects(teacher, erring(teacher))
    sigma2 = 1 - schedule.alphas_cumprod[timesteps[-1]].item()
    assert effects[-1].item() == pytest.approx(sigma2 if expected is None else expected, rel=1e-3)
    assert len(timesteps) == len(effects) == 20 and (timesteps.diff() < 0).all() and (effects > 0).all()


def test_density_is_even_where_nothing_is_asked_or_nothing_errs():
    teacher = tiny_dit()
    even = torch.full((50,), 1 / 50, dtype=torch.float64)
    torch.testing.assert_close(timestep_density(teacher, erring(teacher), 0.0), even)
    torch.testing.assert_close(timestep_density(teacher, tiny_dit(), 1.0), even)
    asked = timestep_density(teacher, erring(teacher), 0.8)
    assert asked.sum() == pytest.approx(1) and asked.min() >= 0.2 / 50 and asked.std() > 0


def test_between_two_effects_their_logarithm_is_straight():
    density = interpolated(torch.tensor([8, 4, 0]), torch.tensor([1.0, 100.0, 1.0], dtype=torch.float64), 10)
    wanted = torch.tensor([1, 10**0.5, 10, 10**1.5, 100, 10**1.5, 10, 10**0.5, 1, 1], dtype=torch.float64)
    torch.testing.assert_close(density, wanted / wanted.sum())


def test_timesteps_are_drawn_by_their_density():
    density = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64)
    drawn = stratified_timesteps(400, 4, torch.Generator().manual_seed(0), density)
    assert drawn.bincount(minlength=4).tolist() == pytest.approx([200, 0, 100, 100], abs=1)
    assert not torch.equal(drawn, drawn.sort().values)
