"""The border to diffusers: what is read, what is refused, and what a reload gives back."""

import json

import pytest
import torch

from tasks.core.denoiser import Schedule, build, load, save
from tasks.pretrain_load.architectures import SCHEDULE, dit, unet

DIT = dit(8, 1, 3, width=16, depth=2, heads=2, patch=4)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    save(build("DiTTransformer2DModel", DIT, SCHEDULE), tmp_path / "teacher")
    return tmp_path / "teacher"


def forward(denoiser):
    x = torch.randn(2, *denoiser.sample_shape, generator=torch.Generator().manual_seed(0))
    return denoiser(x, torch.tensor([10, 900]), torch.tensor([0, denoiser.null_label]))


def test_a_reload_predicts_the_same_bits(folder, tmp_path):
    first = load(folder)
    save(first, tmp_path / "again")
    assert torch.equal(forward(first), forward(load(tmp_path / "again")))
    assert first.num_classes == 3 and first.sample_shape == (1, 8, 8)


def test_fp16_is_loaded_as_fp32(folder, tmp_path):
    save(load(folder), tmp_path / "half", torch.float16)
    half = load(tmp_path / "half")
    assert next(half.model.parameters()).dtype == torch.float32
    torch.testing.assert_close(forward(half), forward(load(folder)), atol=1e-2, rtol=1e-2)


def test_a_learned_variance_is_cut_off():
    config = DIT | {"out_channels": 2}
    assert forward(build("DiTTransformer2DModel", config, SCHEDULE)).shape == (2, 1, 8, 8)


def test_velocity_and_noising_by_hand():
    schedule = Schedule.from_config(SCHEDULE)
    a = schedule.alphas_cumprod[300]
    x0, noise, t = torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 2.0), torch.tensor([300])
    assert schedule.add_noise(x0, noise, t).item() == pytest.approx((a.sqrt() * 0.5 + (1 - a).sqrt() * 2).item())
    assert schedule.target(x0, noise, t).item() == pytest.approx((a.sqrt() * 2 - (1 - a).sqrt() * 0.5).item())


def break_index(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))


def truncate(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def pickle_only(folder):
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "model_index.json").unlink(), "model_index.json: not found; expected a diffusers folder"),
    (break_index, "model_index.json: holds none of DiTTransformer2DModel, UNet2DModel; its parts are vae"),
    (truncate, "diffusion_pytorch_model.safetensors: cannot be read as DiTTransformer2DModel"),
    (pickle_only, "diffusion_pytorch_model.bin is a pickle and is never read"),
])
def test_a_damaged_folder_is_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as failure:
        load(folder)
    assert "\n" not in str(failure.value)


def test_a_unet_without_classes_ignores_labels():
    denoiser = build("UNet2DModel", unet(8, 1, width=8), SCHEDULE)
    assert denoiser.num_classes == 0
    assert denoiser(torch.zeros(1, 1, 8, 8), torch.tensor([5]), None).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("file, content, message", [
    ("model_index.json", "{", "model_index.json: not JSON at line 1"),
    ("model_index.json", "[1]", "model_index.json: holds list, expected an object"),
    ("model_index.json", '{"transformer": null}', "model_index.json: holds none of DiTTransformer2DModel"),
    ("scheduler/scheduler_config.json", "[]", "scheduler_config.json: holds list"),
])
def test_a_damaged_description_names_its_file(tmp_path, file, content, message):
    import shutil

    from tasks.core import denoiser
    from tests.contract.reading import ROOT
    folder = tmp_path / "teacher"
    shutil.copytree(ROOT / "tasks/pretrain_load/teachers/mnist_dit", folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        denoiser.load(folder)
