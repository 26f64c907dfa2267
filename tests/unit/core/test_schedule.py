"""Which scheduler configs are taken and what is read from them, against every scheduler of the installed diffusers."""

import inspect
import json
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, PNDMScheduler

from tasks.core.model_folder import parts_of, read_block, scheduler_of
from tasks.core.schedule import STAND_INS, TAKEN, Schedule

EVERY = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name)))


def pipeline_folder(folder, scheduler, index=None):
    """The parts of a diffusers folder that a schedule is read from; index: the class that model_index.json names."""
    scheduler.save_pretrained(folder / "scheduler")
    named = {} if index is False else {"scheduler": ["diffusers", index or type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline", **named}))
    return folder


def read(folder):
    return Schedule.read(*scheduler_of(folder, parts_of(read_block(folder / "model_index.json"))))


def edit(folder, drop=(), **changes):
    path = folder / "scheduler" / "scheduler_config.json"
    config = {key: value for key, value in (json.loads(path.read_text()) | changes).items() if key not in drop}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", EVERY)
def test_every_scheduler_is_read_as_it_is_or_refused_by_name(name):
    if name in TAKEN:
        own = getattr(diffusers, STAND_INS.get(name, name))(num_train_timesteps=100)
        found = Schedule.from_config({"_class_name": name, "num_train_timesteps": 100})
        assert torch.equal(found.alphas_cumprod, own.alphas_cumprod)
    else:
        with pytest.raises(ValueError, match=f"_class_name: '{name}' is not a scheduler") as failure:
            Schedule.from_config({"_class_name": name})
        assert "\n" not in str(failure.value)


def test_what_is_taken_is_there():
    assert set(TAKEN) <= set(EVERY)
    assert {"FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler", "ScoreSdeVeScheduler", "CMStochasticIterativeScheduler",
            "LCMScheduler", "TCDScheduler", "DDIMInverseScheduler"} <= set(EVERY) - set(TAKEN)


@pytest.mark.parametrize("name", [name for name in TAKEN if name not in STAND_INS])
def test_a_saved_pipeline_is_read_as_diffusers_ddim_reads_it(name, tmp_path):
    """DDIMPipeline.from_pretrained: the scheduler's own class first, whose defaults are written out, then DDIM's."""
    cls = getattr(diffusers, name)
    asked = {"num_train_timesteps": 60} | ({"beta_schedule": "squaredcos_cap_v2"} if name == "UnCLIPScheduler" else
                                           {"beta_start": 0.001, "beta_end": 0.05, "beta_schedule": "scaled_linear"})
    found = read(pipeline_folder(tmp_path, cls(**asked)))
    ddim = DDIMScheduler.from_config(DDIMScheduler.from_config(json.loads((tmp_path / "scheduler/scheduler_config.json")
                                                                          .read_text())).config)
    assert torch.equal(found.alphas_cumprod, ddim.alphas_cumprod) and found.steps == 60
    assert found.equals(Schedule.from_config({key: value for key, value in ddim.config.items() if not key.startswith("_")}))


@pytest.mark.parametrize("cls, schedule", [
    (DDPMScheduler, "sigmoid"), (DDPMScheduler, "laplace"), (HeunDiscreteScheduler, "exp"),
    (diffusers.RePaintScheduler, "sigmoid"), (diffusers.DDPMParallelScheduler, "laplace")])
def test_betas_that_ddim_does_not_compute_are_those_of_the_class(cls, schedule, tmp_path):
    own = cls(beta_schedule=schedule)
    found = read(pipeline_folder(tmp_path, own))
    assert torch.equal(found.alphas_cumprod, own.alphas_cumprod)
    assert torch.equal(DDIMScheduler.from_config(found.config).alphas_cumprod, own.alphas_cumprod), "and a package's"


def test_defaults_are_the_classs_own_where_a_config_leaves_them_out(tmp_path):
    folder = edit(pipeline_folder(tmp_path, HeunDiscreteScheduler()), drop=("beta_start", "beta_end", "timestep_spacing"))
    found = read(folder)
    assert torch.equal(found.alphas_cumprod, HeunDiscreteScheduler().alphas_cumprod)
    assert found.config["timestep_spacing"] == "linspace" and found.config["clip_sample"] is False


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler])
def test_betas_rescaled_to_zero_snr(cls, tmp_path):
    """DPM-Solver and Euler write 2^-24 instead of the last 0; the noise that the network saw is the same up to that."""
    own = cls(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    found = read(pipeline_folder(tmp_path, own))
    assert torch.equal(found.alphas_cumprod[:-1], own.alphas_cumprod[:-1]) and found.alphas_cumprod[-1] == 0


def test_betas_of_training(tmp_path):
    betas = torch.linspace(0.01, 0.2, 12).tolist()
    found = read(pipeline_folder(tmp_path, PNDMScheduler(num_train_timesteps=12, trained_betas=betas)))
    torch.testing.assert_close(found.alphas_cumprod, (1 - torch.tensor(betas)).cumprod(0))


def test_what_a_ddim_config_keeps_of_other_schedulers_does_not_reach_a_package(tmp_path):
    """diffusers saves the options of the class that a scheduler was made from, and lambda_min_clipped is -Infinity."""
    DPMSolverMultistepScheduler().save_pretrained(tmp_path / "dpm")
    folder = pipeline_folder(tmp_path, DDIMScheduler.from_config(DPMSolverMultistepScheduler.load_config(tmp_path / "dpm")))
    config = read(folder).config
    assert "lambda_min_clipped" not in config and json.dumps(config, allow_nan=False)


@pytest.mark.parametrize("config, words", [
    ({"_class_name": "PNDMScheduler"}, "DDIM (eta 0), spacing leading, x0 clipped to 1, in place of PNDMScheduler"),
    ({"clip_sample": False, "timestep_spacing": "trailing"}, "DDIM (eta 0), spacing trailing, x0 not clipped"),
    ({"thresholding": True}, "DDIM (eta 0), spacing leading, x0 thresholded"),
])
def test_how_dense_samples_is_said(config, words):
    assert Schedule.from_config(config).dense_sampling == words


# ---- the class

def test_the_class_may_stand_in_model_index_alone(tmp_path):
    folder = edit(pipeline_folder(tmp_path, HeunDiscreteScheduler()), drop=("_class_name", "beta_start", "beta_end"))
    assert torch.equal(read(folder).alphas_cumprod, HeunDiscreteScheduler().alphas_cumprod)


@pytest.mark.parametrize("own, index, message", [
    (None, False, "scheduler_config.json: _class_name: missing, and model_index.json names no scheduler"),
    (None, "FlowMatchEulerDiscreteScheduler", "_class_name: 'FlowMatchEulerDiscreteScheduler' is not a scheduler"),
    ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "_class_name: 'FlowMatchEulerDiscreteScheduler' is not"),
    ("DDIMScheduler", "EDMEulerScheduler", "_class_name: 'EDMEulerScheduler' is not a scheduler"),
    ("DDIMScheduler", "MyScheduler", "_class_name: 'MyScheduler' is not a scheduler"),
    (["DDIMScheduler"], None, r"_class_name: \['DDIMScheduler'\] is not a scheduler"),
    ("DDIMScheduler", "PNDMScheduler", "'DDIMScheduler', but model_index.json names 'PNDMScheduler', which reads it as"),
])
def test_a_class_that_is_missing_unknown_or_doubtful_is_refused(own, index, message, tmp_path):
    folder = edit(pipeline_folder(tmp_path, DDIMScheduler(), index=index), drop=("set_alpha_to_one",), _class_name=own)
    with pytest.raises(ValueError, match=message) as failure:
        read(folder)
    assert "\n" not in str(failure.value) and str(tmp_path) in str(failure.value)


def test_two_classes_that_read_one_config_alike_are_no_contradiction(tmp_path):
    assert read(pipeline_folder(tmp_path, DDPMScheduler(), index="DDIMScheduler")).steps == 1000


# ---- options

@pytest.mark.parametrize("config, message", [
    ({"prediction_type": "flow_prediction"}, "prediction_type: 'flow_prediction' is not one of epsilon, v_prediction, sample"),
    ({"prediction_type": None}, "prediction_type: None is not one of"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule: 'sigmoid' is none that diffusers' DDIMScheduler computes"),
    ({"_class_name": "UnCLIPScheduler", "beta_schedule": "linear"}, "beta_schedule: 'linear' is none that diffusers' UnCLIP"),
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr: True leaves no signal at timestep 999, where pred"),
    ({"num_train_timesteps": 3, "trained_betas": [0.1, 0.2, 1.0]}, "num_train_timesteps: 3 is not a whole number between 4"),
    ({"num_train_timesteps": 4, "trained_betas": [0.1, 0.2, 0.3, 1.0]}, "trained_betas: .* leaves no signal at timestep 3"),
    ({"num_train_timesteps": 4, "trained_betas": [0.1, 0.0, 0.3, 0.4]}, "trained_betas: .*does not fall at timestep 1 of 4"),
    ({"num_train_timesteps": 4, "trained_betas": [0.1, 1.0, 0.3, 0.4]}, "trained_betas: .*does not fall at timestep 2 of 4"),
    ({"trained_betas": [0.1, 0.2]}, "num_train_timesteps: 1000, but trained_betas has 2"),
    ({"trained_betas": [0.1, 1.5]}, "trained_betas: .* is not null or a list of numbers between 0 and 1"),
    ({"trained_betas": "0.1"}, "trained_betas: '0.1' is not null or a list"),
    ({"num_train_timesteps": 1000.0}, "num_train_timesteps: 1000.0 is not a whole number"),
    ({"beta_start": "0.0001"}, "beta_start: '0.0001' is not a number"),
    ({"beta_end": math.nan}, "beta_end: nan is not a number"),
    ({"beta_start": 0.0, "beta_end": 0.0}, "beta_schedule: 'linear': alphas_cumprod does not fall at timestep 1"),
    ({"clip_sample": None}, "clip_sample: None is not true or false"),
    ({"clip_sample_range": -1.0}, "clip_sample_range: -1.0 is not a number above 0"),
    ({"thresholding": 1}, "thresholding: 1 is not true or false"),
    ({"dynamic_thresholding_ratio": 99.5}, "dynamic_thresholding_ratio: 99.5 is not a number between 0 and 1"),
    ({"sample_max_value": 0}, "sample_max_value: 0 is not a number above 0"),
    ({"set_alpha_to_one": "no"}, "set_alpha_to_one: 'no' is not true or false"),
    ({"steps_offset": -1}, "steps_offset: -1 is not a whole number"),
    ({"steps_offset": 500}, "steps_offset: 500 is not below half of num_train_timesteps, 1000"),
    ({"timestep_spacing": "karras"}, "timestep_spacing: 'karras' is not one of leading, trailing, linspace"),
    *(({"_class_name": "DPMSolverMultistepScheduler", key: True}, f"{key}: True is not honoured; taken: False") for key in (
        "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas",
        "use_dynamic_shifting")),
    ({"_class_name": "UniPCMultistepScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type: 'sigma_min' is not"),
    ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, "lambda_min_clipped: -5.1 is not honoured"),
    ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type: 'continuous' is not honoured"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 80.0}, "sigma_max: 80.0 is not honoured"),
    ({"predict_epsilon": False}, "predict_epsilon: False, which diffusers no longer reads; taken: prediction_type: sample"),
    ({"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True}, "True, an option that PNDMScheduler does not have"),
    ({"_class_name": "RePaintScheduler", "prediction_type": "sample"}, "'sample', an option that RePaintScheduler does not"),
])
def test_what_is_not_honoured_is_refused_by_key(config, message):
    with pytest.raises(ValueError, match=message) as failure:
        Schedule.from_config({"_class_name": "DDIMScheduler", **config}, "here/scheduler_config.json")
    assert str(failure.value).startswith("here/scheduler_config.json: ") and "\n" not in str(failure.value)


@pytest.mark.parametrize("config", [
    {"use_karras_sigmas": True},                                     # left over from another class; DDIM does not know it
    {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": None},
    {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf, "algorithm_type": "sde-dpmsolver++"},
    {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "tensor_format": "pt"},  # of diffusers 0.1
    {"beta_start": 0.0},                                             # nothing is added at timestep 0
    {"num_train_timesteps": 10_000, "beta_end": 0.002},
])
def test_what_makes_no_difference_is_taken(config):
    assert Schedule.from_config({"_class_name": "DDIMScheduler", **config}).steps >= 1000
