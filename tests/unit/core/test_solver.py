"""The precomputed solvers against diffusers' schedulers, on a network whose outputs are known."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from tasks.core.denoiser import Schedule
from tasks.core.recipe import Recipe
from tasks.core.sampler import SPACINGS, initial_noise, labels_for, sample, sample_in_chunks, spaced_timesteps
from tasks.runtime.solver import SolverStep, clip_bound, integrate, solver_steps, with_guidance

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True, "set_alpha_to_one": True,
          "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def linear_predict(x, t, labels, step):
    return 0.3 * x - 0.1 + 1e-4 * t.view(-1, 1, 1, 1)


def run(config, timesteps, solver, noise, clip=1.0):
    return list(integrate(linear_predict, solver_steps(config, timesteps, solver), noise, None, clip))[-1][2]


def diffusers_loop(scheduler, noise, **extra):
    x = noise.double()
    for t in scheduler.timesteps:
        x = scheduler.step(linear_predict(x, t.repeat(len(x)), None, 0), t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("steps", [4, 20])
def test_ddim_equals_diffusers(kind, steps):
    config = CONFIG | {"prediction_type": kind}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = diffusers_loop(scheduler, noise, use_clipped_model_output=True)
    ours = run(config, scheduler.timesteps.tolist(), "ddim", noise.double())
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("timesteps", [[990, 700, 400, 100, 20], [999, 900, 850, 300, 299, 298, 7]])
def test_dpm2m_equals_diffusers_on_any_list(timesteps):
    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", solver_order=2,
                                            prediction_type="v_prediction", final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=timesteps)
    expected = diffusers_loop(scheduler, noise)
    torch.testing.assert_close(run(CONFIG, timesteps, "dpm2m", noise.double(), clip=None), expected, atol=2e-4, rtol=2e-4)


def test_rows_are_sampled_as_the_solver_that_they_were_taken_from(schedule):
    """Bit for bit, and the network is told times between timesteps as they are."""
    noise, told = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def predict(x, t, labels, step):
        told.append(t)
        return linear_predict(x, t, labels, step)

    plain = Recipe(timesteps=(999, 700, 400, 20), solver="dpm2m")
    rows = tuple(solver_steps(CONFIG, plain.timesteps, "dpm2m"))
    learned = replace(plain, solver="learned", rows=rows)
    assert torch.equal(sample(predict, schedule, learned, noise, None), sample(predict, schedule, plain, noise, None))
    assert all(t.dtype == torch.float32 and t.shape == (3,) for t in told)
    told.clear()
    moved = replace(learned, rows=(rows[0], replace(rows[1], t=700.25), *rows[2:]))
    sample(predict, schedule, Recipe.from_json(moved.to_json()), noise, None)
    assert [t[0].item() for t in told] == [999, 700.25, 400, 20]


def test_a_row_weighs_all_x0_so_far_by_hand():
    """x0 is the prediction: 1, 2, 3."""
    factors = (0.5, (2.0,)), (1.0, (1.0, 10.0)), (2.0, (1.0, 0.0, 100.0))
    rows = [SolverStep(t, 0, 1, *both) for t, both in zip((2.0, 1.0, 0.0), factors, strict=True)]
    noise = torch.full((1, 1), 4.0)
    *_, (_, before, image) = integrate(lambda x, t, labels, i: torch.full_like(x, i + 1), rows, noise, None, None)
    first = 0.5 * 4 + 2 * 1
    second = first + 2 + 10 * 1
    assert before.item() == second and image.item() == 2 * second + 3 + 100 * 1


def test_one_step_is_the_data_prediction_by_hand():
    config = CONFIG | {"prediction_type": "epsilon", "clip_sample": False}
    bar = DDIMScheduler.from_config(config).alphas_cumprod[500].double()
    noise = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    expected = (noise - (1 - bar).sqrt() * linear_predict(noise, torch.tensor([500]), None, 0)) / bar.sqrt()
    torch.testing.assert_close(run(config, [500], "ddim", noise, clip=clip_bound(config)), expected, atol=1e-6, rtol=1e-6)


def test_epsilon_from_the_last_timestep_does_not_diverge():
    """Cosine schedule, epsilon prediction, t = 999: 1 / alpha is 4e4 there; without clipping x0 the sample is lost."""
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    config = CONFIG | {"prediction_type": "epsilon"}
    assert run(config, [999, 500, 100], "dpm2m", noise).abs().max() <= 1
    assert run(config, [999], "ddim", noise, clip=None).abs().max() > 100


def test_guidance_by_hand():
    guided = with_guidance(lambda x, t, y, i: y.view(-1, 1, 1, 1).float() + 0 * x, 3.0, null_label=10)
    out = guided(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.tensor([1, 4]), 0)
    assert out.flatten().tolist() == [10 + 3 * (1 - 10), 10 + 3 * (4 - 10)]
    with pytest.raises(ValueError, match="needs class labels"):
        guided(torch.zeros(2, 1, 1, 1), torch.zeros(2), None, 0)


@pytest.fixture
def schedule():
    return Schedule.from_config(CONFIG)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 5, 50, 999])
def test_spacings_are_strictly_decreasing_lists_from_the_noisiest_step(schedule, spacing, steps):
    found = spaced_timesteps(schedule, steps, spacing)
    assert len(found) == steps and found[-1] >= 0
    assert found[0] == 999 or spacing == "karras" and schedule.alphas_cumprod[found[0]] < 1e-3
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


def test_uniform_is_diffusers_trailing(schedule):
    scheduler = DDIMScheduler.from_config(CONFIG)
    scheduler.set_timesteps(20)
    assert spaced_timesteps(schedule, 20, "uniform") == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", [1, 2, 4, 12])
def test_karras_is_diffusers(steps, beta_schedule):
    highest = None if beta_schedule == "scaled_linear" else 80.0  # its noisiest level is 14.6 times the signal
    config = {"beta_schedule": beta_schedule, "beta_start": 0.00085, "beta_end": 0.02}
    scheduler = UniPCMultistepScheduler(**config, use_karras_sigmas=True, sigma_max=highest)
    scheduler.set_timesteps(steps)
    assert spaced_timesteps(Schedule.from_config(config), steps, "karras") == tuple(scheduler.timesteps.tolist())


def test_a_sample_does_not_depend_on_its_chunk(schedule):
    recipe = Recipe(timesteps=(900, 500, 100))
    chunks = {chunk: list(sample_in_chunks(linear_predict, schedule, recipe, (1, 4, 4), 7, 3, 10, chunk)) for chunk in (2, 7)}
    assert [len(c) for c in chunks[2]] == [2, 2, 2, 1]
    assert all((a == b).all() for a, b in zip([i for c in chunks[2] for i in c], chunks[7][0], strict=True))
    later = next(sample_in_chunks(linear_predict, schedule, recipe, (1, 4, 4), 1, 3, 10, 2, first=5))
    assert (later[0] == chunks[7][0][5]).all()


def test_noise_is_per_sample_and_labels_are_stratified(schedule):
    assert torch.equal(initial_noise((1, 2, 2), [3], 0)[0], initial_noise((1, 2, 2), [1, 3], 0)[1])
    assert not torch.equal(initial_noise((1, 2, 2), [3], 0), initial_noise((1, 2, 2), [3], 1))
    assert labels_for(range(8, 12), 10).tolist() == [8, 9, 0, 1]
    assert labels_for(range(3), 0) is None


def test_sample_returns_the_last_data_prediction(schedule):
    recipe = Recipe(timesteps=(10,))
    out = sample(lambda x, t, y, i: torch.zeros_like(x), schedule, recipe, torch.full((1, 1, 1, 1), 0.4), None)
    assert out.item() == pytest.approx(0.4 * schedule.alphas_cumprod[10].sqrt().item(), rel=1e-5)
