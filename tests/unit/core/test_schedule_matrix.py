"""Dense, DDIM and DPM-Solver++ against diffusers' own schedulers: class, prediction type, spacing, clipping, zero SNR, steps.

diffusers runs in float64 here, so that what is left is the difference between two algorithms and not that of two roundings.
"""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    IPNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from tasks.core.denoiser import inspect, load
from tasks.core.recipe import Recipe
from tasks.core.sampler import dense_and_finer, dense_recipe, network, pipeline_timesteps, sample, spaced_timesteps
from tasks.core.schedule import STAND_INS, TAKEN, Schedule
from tasks.package.write import write_package
from tasks.runtime.packed import PackedDenoiser
from tasks.runtime.pipeline import CompressedPipeline
from tasks.runtime.solver import clip_bound, data_prediction, integrate, solver_steps
from tests.contract.reading import ROOT

KINDS = ("epsilon", "v_prediction", "sample")
CLIPPING = {"none": {"clip_sample": False}, "to 1": {"clip_sample": True},
            "to 0.7": {"clip_sample": True, "clip_sample_range": 0.7},
            "dynamic": {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}}
STEPS = ((1000, 1), (1000, 10), (1000, 7), (100, 20), (99, 11), (60, 8), (50, 50))
NOISE = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = 0.5 * torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def net(x, t, labels=None, step=0):
    """Bounded, and of channels and time."""
    return 1.3 * torch.tanh(torch.einsum("ij,njhw->nihw", MIX, x) + torch.sin(t.view(-1, 1, 1, 1) / 150))


def ours(schedule, recipe):
    steps = solver_steps(schedule.config, recipe.timesteps, recipe.solver)
    *_, (_, _, image) = integrate(net, steps, NOISE, None, clip_bound(schedule.config))
    return image


def theirs(scheduler, **how):
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t.repeat(len(x))), t, x, **how).prev_sample
    return x


def ddim_in_fp64(config, steps):
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = (
        bars.double() for bars in (scheduler.alphas_cumprod, scheduler.final_alpha_cumprod))
    return scheduler


def by_hand(scheduler, timesteps):
    """Eq. 12 of arXiv 2010.02502 with eta 0 from each timestep to the next of the list, the noise as predicted."""
    x, bars, config = NOISE, scheduler.alphas_cumprod, scheduler.config
    for t, bar, after in zip(timesteps, bars[list(timesteps)], [*bars[list(timesteps[1:])], scheduler.final_alpha_cumprod],
                             strict=True):
        out, alpha, sigma = net(x, torch.tensor([t]).repeat(len(x))), bar.sqrt(), (1 - bar).sqrt()
        x0, noise = {"epsilon": ((x - sigma * out) / alpha, out),
                     "v_prediction": (alpha * x - sigma * out, alpha * out + sigma * x),
                     "sample": (out, (x - alpha * out) / sigma)}[config.prediction_type]
        if config.thresholding:
            x0 = scheduler._threshold_sample(x0)
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        x = after.sqrt() * x0 + (1 - after).sqrt() * noise
    return x


def assert_equal(found, wanted, tolerance=1e-5):
    assert ((found - wanted).abs().max() / wanted.abs().max()).item() < tolerance


def steps_right(scheduler, total, steps):
    """diffusers goes on to t - T // N, whatever its list says."""
    times = scheduler.timesteps.tolist()
    return len(times) == steps and all(b == a - total // steps for a, b in itertools.pairwise(times)) and (
        times[-1] < total // steps or scheduler.config.timestep_spacing == "leading")


# ---- dense

@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_is_diffusers_ddim(kind, spacing, clipping):
    """Where diffusers' own goes another way than its list, dense goes the list's, as computed by hand."""
    compared = 0
    for i, ((total, steps), zero) in enumerate(itertools.product(STEPS, (False, True))):
        config = {"_class_name": "DDIMScheduler", "num_train_timesteps": total, "prediction_type": kind, **CLIPPING[clipping],
                  "timestep_spacing": spacing, "rescale_betas_zero_snr": zero, "set_alpha_to_one": i % 3 > 0,
                  "steps_offset": 1 if steps < total and i % 4 else 0}
        if zero and kind == "epsilon":
            with pytest.raises(ValueError, match="rescale_betas_zero_snr: True leaves no signal"):
                Schedule.from_config(config)
            continue
        schedule, scheduler = Schedule.from_config(config), ddim_in_fp64(config, steps)
        recipe, wanted = dense_recipe(schedule, steps), theirs(scheduler)
        found = ours(schedule, recipe)
        if steps_right(scheduler, total, steps):
            assert_equal(found, wanted)
            compared += 1
        else:
            assert_equal(found, by_hand(scheduler, recipe.timesteps))
            assert (found - wanted).abs().max() > 1e-4, f"diffusers, {steps} of {total}"
    assert compared >= 2


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in STAND_INS])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_of_another_class_is_the_ddim_that_diffusers_makes_of_it(name, kind, tmp_path):
    cls = getattr(diffusers, name)
    asked = {"num_train_timesteps": 60, "prediction_type": kind, "timestep_spacing": "trailing"}
    known = {key: value for key, value in asked.items() if key in cls.__init__.__wrapped__.__code__.co_varnames}
    cls(**known).save_config(tmp_path)
    config = cls.load_config(tmp_path)
    schedule, scheduler = Schedule.from_config(config), ddim_in_fp64(config, 20)
    assert schedule.prediction_type == known.get("prediction_type", "epsilon")
    assert_equal(ours(schedule, dense_recipe(schedule, 20)), theirs(scheduler))


def test_noise_as_predicted_is_not_noise_derived_from_clipped_x0():
    """The two differ where x0 is clipped, and only there."""
    def gap(**clipping):
        schedule = Schedule.from_config({"prediction_type": "v_prediction", "timestep_spacing": "trailing", **clipping})
        recipe = dense_recipe(schedule, 10)
        return (ours(schedule, recipe) - ours(schedule, Recipe(timesteps=recipe.timesteps))).abs().max()

    assert gap(clip_sample=True, clip_sample_range=0.5) > 1e-2 and gap(clip_sample=False) < 1e-12


# ---- the solvers of compressed models

@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_is_diffusers_ddim_with_the_noise_of_the_clipped_x0(kind, clipping):
    for (total, steps), zero in itertools.product(((1000, 10), (60, 60), (99, 33)), (False, True)):
        config = {"num_train_timesteps": total, "prediction_type": kind, **CLIPPING[clipping], "timestep_spacing": "trailing",
                  "rescale_betas_zero_snr": zero and kind != "epsilon"}
        schedule, scheduler = Schedule.from_config(config), ddim_in_fp64(config, steps)
        recipe = Recipe(timesteps=spaced_timesteps(schedule, steps))
        assert_equal(ours(schedule, recipe), theirs(scheduler, use_clipped_model_output=True))


LISTS = ([999], [500, 0], [999, 60], [980, 400, 100], [999, 700, 400, 100], [990, 700, 400, 100, 20],
         [999, 900, 850, 300, 150, 40, 7], [*range(999, 0, -85)], [*range(975, 0, -75), 0], [*range(999, 0, -70)],
         [*range(999, 0, -50)])
MULTISTEP = {"dpm2m": (DPMSolverMultistepScheduler, 2), "dpm3m": (DPMSolverMultistepScheduler, 3),
             "unipc": (UniPCMultistepScheduler, 2), "unipc3": (UniPCMultistepScheduler, 3),
             "deis": (DEISMultistepScheduler, 2), "deis3": (DEISMultistepScheduler, 3)}


def on_list(solver, config, timesteps):
    """diffusers' scheduler as it is but for its timesteps, its levels in fp64."""
    kind, order = MULTISTEP[solver]
    scheduler = kind.from_config(config, solver_order=order, timestep_spacing="trailing")
    scheduler.set_timesteps(len(timesteps))
    scheduler.timesteps = torch.tensor(timesteps)
    bars = scheduler.alphas_cumprod.double()
    last = ((1 - bars[0]) / bars[0]).sqrt() if kind is DEISMultistepScheduler else torch.tensor(0.0)
    scheduler.sigmas = torch.cat([((1 - bars) / bars).sqrt()[timesteps], last[None].double()])
    return scheduler


@pytest.mark.parametrize("clipping", ["none", "dynamic"])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", MULTISTEP)
def test_multistep_solvers_are_diffusers(solver, kind, zero, clipping):
    """From one and the same config, its clipping left to us where these solvers have none."""
    if zero and solver.startswith("deis"):
        pytest.skip("diffusers' has no such option, and no finite level for it")
    config = {"_class_name": "DDIMScheduler", "prediction_type": kind, **CLIPPING[clipping],
              "rescale_betas_zero_snr": zero and kind != "epsilon"}
    for timesteps in LISTS:
        expected = theirs(on_list(solver, config, timesteps))
        found = ours(Schedule.from_config(config), Recipe(timesteps=tuple(timesteps), solver=solver))
        assert_equal(found, expected, 1e-5 if solver.startswith("dpm") else 1e-9)  # whose state is fp32, whatever is handed in


@pytest.mark.parametrize("kind", KINDS)
def test_ipndm_is_diffusers_on_our_levels(kind):
    """diffusers' has a noise schedule of its own, and predicts v; on other levels it is the same solver."""
    config = {"prediction_type": kind, "clip_sample": False}
    schedule = Schedule.from_config(config)
    for timesteps in LISTS:
        bars = torch.cat([schedule.alphas_cumprod.double()[timesteps], torch.ones(1)])
        scheduler, x = IPNDMScheduler(), NOISE
        scheduler.set_timesteps(len(timesteps))
        scheduler.alphas, scheduler.betas = bars.sqrt(), (1 - bars).sqrt()
        for i, t in enumerate(timesteps):
            out, alpha, sigma = net(x, torch.tensor([t]).repeat(len(x))), scheduler.alphas[i], scheduler.betas[i]
            v = {"epsilon": (out - sigma * x) / alpha, "v_prediction": out, "sample": (alpha * x - out) / sigma}[kind]
            x = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        assert_equal(ours(schedule, Recipe(timesteps=tuple(timesteps), solver="ipndm")), x, 1e-9)


# ---- lists

@pytest.mark.parametrize("total", [50, 60, 99, 100, 1000])
def test_uniform_is_diffusers_trailing_at_every_number_of_steps(total):
    """Where diffusers' list has one entry more, timestep -1, it is left out."""
    config = {"num_train_timesteps": total, "timestep_spacing": "trailing"}
    schedule, scheduler = Schedule.from_config(config), DDIMScheduler.from_config(config)
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps)
        wanted = scheduler.timesteps.tolist()
        assert wanted[steps:] in ([], [-1])
        assert list(spaced_timesteps(schedule, steps)) == list(pipeline_timesteps(schedule, steps)) == wanted[:steps]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("total", [50, 60, 99, 100, 1000])
def test_the_pipelines_own_list_at_every_number_of_steps(total, spacing):
    config = {"num_train_timesteps": total, "timestep_spacing": spacing, "steps_offset": 1}
    schedule, scheduler = Schedule.from_config(config), DDIMScheduler.from_config(config)
    for steps in range(1, total + 1):
        scheduler.set_timesteps(steps)
        wanted = scheduler.timesteps.tolist()
        if wanted[0] < total:
            assert list(pipeline_timesteps(schedule, steps)) == wanted
        else:
            with pytest.raises(ValueError, match=f"steps_offset: 1 puts the first of {steps} steps at timestep {total}"):
                pipeline_timesteps(schedule, steps)


@pytest.mark.parametrize("config", [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"beta_start": 0.0}])
@pytest.mark.parametrize("total, steps", [(1000, 6), (1000, 50), (50, 50), (60, 7)])
def test_log_snr_spacing_where_a_log_snr_is_infinite(config, total, steps):
    """Evenly spaced between finite ends: log-SNRs of 2^-24 and 1 - 2^-24, or of half of what the next timestep has."""
    found = spaced_timesteps(schedule := Schedule.from_config({**config, "num_train_timesteps": total}), steps, "logsnr")
    assert len(found) == steps and found[0] == total - 1 and found[-1] >= 0 and all(a > b for a, b in itertools.pairwise(found))
    if (total, steps) == (1000, 6):
        bars = schedule.alphas_cumprod.double().numpy().copy()
        bars[-1], bars[0] = bars[-1] or min(2.0**-24, bars[-2] / 2), min(bars[0], 1 - 2.0**-24)
        lam = 0.5 * np.log(bars / (1 - bars))
        places = np.interp(np.linspace(lam[-1], lam[0], steps, endpoint=False), lam[::-1], np.arange(1000)[::-1])
        assert np.abs(places - found).max() <= 1


@pytest.mark.parametrize("name", ["mnist_dit", "mnist_unet"])
def test_the_shipped_teachers_are_sampled_from_the_noisiest_timestep_on(name):
    """As their cards' samples were."""
    schedule = inspect(ROOT / "tasks/pretrain_load/teachers" / name).denoiser.schedule
    assert dense_recipe(schedule, 50).timesteps == tuple(range(999, 0, -20)) == spaced_timesteps(schedule, 50)


def test_the_reference_of_a_short_schedule_is_half_of_its_timesteps_and_all():
    lengths = {total: tuple(recipe.nfe for recipe in dense_and_finer(Schedule.from_config({"num_train_timesteps": total}), 50))
               for total in (1000, 100, 99, 60, 50, 10)}
    assert lengths == {1000: (50, 100), 100: (50, 100), 99: (49, 98), 60: (30, 60), 50: (25, 50), 10: (5, 10)}
    offset = Schedule.from_config({"num_train_timesteps": 60, "steps_offset": 1})
    assert [recipe.nfe for recipe in dense_and_finer(offset, 50)] == [29, 58]


def test_where_nothing_is_left_of_the_image_noise_says_nothing_of_it():
    assert data_prediction(0.0, 1.0, "v_prediction") == (0.0, -1.0) and data_prediction(0.0, 1.0, "sample") == (0.0, 1.0)
    with pytest.raises(ValueError, match="epsilon at a timestep without signal"):
        data_prediction(0.0, 1.0, "epsilon")


# ---- the whole way: a folder that diffusers wrote, our eager sampler, the package that ships

@pytest.mark.parametrize("changes", [
    {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
    {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"timestep_spacing": "trailing", "thresholding": True, "sample_max_value": 1.5},
    {"timestep_spacing": "leading", "prediction_type": "sample", "clip_sample": False},
    {"timestep_spacing": "trailing", "prediction_type": "sample", "clip_sample_range": 0.3, "set_alpha_to_one": False},
    {"timestep_spacing": "leading", "num_train_timesteps": 60, "beta_schedule": "squaredcos_cap_v2"},
], ids=str)
def test_a_users_pipeline_its_eager_dense_and_its_package(changes, tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,),
                       norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    DDIMPipeline(unet, DDIMScheduler(**changes)).save_pretrained(tmp_path / "mine")
    pipe = in_fp64(DDIMPipeline.from_pretrained(tmp_path / "mine"), "unet")
    wanted = pipe(batch_size=2, generator=torch.Generator().manual_seed(3), num_inference_steps=20, output_type="pt").images

    denoiser = load(tmp_path / "mine")
    recipe = dense_recipe(denoiser.schedule, 20)
    folder = write_package(denoiser, recipe, {}, {}, tmp_path / "package")
    shipped = in_fp64(CompressedPipeline(PackedDenoiser.from_pretrained(folder / "denoiser"),
                                         DDIMScheduler.from_pretrained(folder, subfolder="scheduler")), "denoiser")
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert_equal(shipped(noise=noise, output_type="pt").images, wanted)

    denoiser.model.double()
    image = sample(network(denoiser), denoiser.schedule, recipe, noise, None)
    assert_equal((image / 2 + 0.5).clamp(0, 1), wanted)


def in_fp64(pipe, network):
    """The network, and the noise levels that diffusers calculates with."""
    getattr(pipe, network).double()
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.double()
    pipe.scheduler.final_alpha_cumprod = pipe.scheduler.final_alpha_cumprod.double()
    pipe.set_progress_bar_config(disable=True)
    return pipe
