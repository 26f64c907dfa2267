"""Sparse transfer training on a one-block DiT: gradients by hand, teacher untouched, resume to the bit."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tasks.core.calibration import noised, predictions, relative_error
from tasks.core.checkpoint import Checkpoint
from tasks.core.denoiser import Denoiser, build
from tasks.core.sparsity import nm_mask
from tasks.distill.train import Images, Settings, SrSte, Student, draw, flip_rate, masked, refresh, train, transfer_loss
from tasks.mask_search.masks import nm_masks, unit_masks
from tasks.runtime.masks import apply_masks, remove_masks

SETTINGS = Settings(steps=6, batch=4, lr=1e-2, warmup=1, weight_decay=0.01, ema_decay=0.9, sr_ste=2e-4, lam=0.5, bank_share=0.5,
                    label_dropout=0.1, bf16=False, log_every=2, seed=0)
SCHEDULE = {"num_train_timesteps": 50, "prediction_type": "v_prediction"}


def tiny_dit() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build("DiTTransformer2DModel", {
            "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1,
            "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
            "norm_type": "ada_norm_zero"}, SCHEDULE)
    denoiser.model.eval().requires_grad_(False)
    return denoiser


def tiny_unet() -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        denoiser = build("UNet2DModel", {
            "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8],
            "norm_num_groups": 4, "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}, SCHEDULE)
    denoiser.model.eval().requires_grad_(False)
    return denoiser


def tiny_images(labelled: bool = True) -> Images:
    rng = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return Images(pixels=pixels, labels=torch.arange(12) % 3 if labelled else None, real=8)


def masks_of(denoiser: Denoiser, grain: str) -> tuple[dict, tuple[int, int] | None]:
    if grain == "2:4":
        layers = {n: layer for n, layer in denoiser.prunable_layers().items() if ".ff." in n or ".resnets." in n}
        return nm_masks(layers, 2, 4)[0], (2, 4)
    block = "transformer_blocks.0.ff" if denoiser.architecture == "dit" else "mid_block.resnets.0"
    return unit_masks(denoiser.model, {block: 0.5}), None


def distilled(denoiser: Denoiser, grain: str, checkpoint: Checkpoint, settings: Settings = SETTINGS) -> Student:
    return train(denoiser, *masks_of(denoiser, grain), tiny_images(denoiser.num_classes > 0), settings, checkpoint)


def test_sr_ste_gradient_by_hand():
    weight = torch.tensor([2.0, -3.0], requires_grad=True)
    used = SrSte.apply(weight, torch.tensor([True, False]), 0.1)
    (used * torch.tensor([5.0, 7.0])).sum().backward()
    assert used.tolist() == [2, 0]
    assert weight.grad.tolist() == pytest.approx([5, 7 + 0.1 * -3])  # the kept weight does not decay


def test_fixed_masks_cut_the_gradient_off():
    layer = nn.Linear(2, 1, bias=False)
    masked(layer, {"weight": torch.tensor([[True, False]])}, None)["weight"].sum().backward()
    assert layer.weight.grad.tolist() == [[1, 0]]


def test_flip_rate_and_refresh_by_hand():
    layer = nn.Linear(4, 1, bias=False)
    layer.weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    before = {"weight": torch.tensor([[True, False, True, False]])}
    assert refresh(layer, before, None)["weight"].tolist() == [[True, False, True, False]]
    after = refresh(layer, before, (2, 4))
    assert after["weight"].tolist() == [[True, True, False, False]]
    assert flip_rate(before, after) == 0.5


@pytest.mark.parametrize("share, expected", [(0.0, 0), (1.0, 1), (0.25, 0.25)])
def test_draw_mixes_the_bank_in(share, expected):
    images = Images(pixels=torch.tensor([0, 0, 255]).byte().view(3, 1, 1, 1), labels=torch.tensor([1, 1, 2]), real=2)
    x0, labels = draw(images, 4000, share, 9, 0.1, torch.Generator().manual_seed(0))
    taught = x0.flatten() == 1
    assert set(x0.flatten().tolist()) <= {-1, 1}
    assert taught.float().mean() == pytest.approx(expected, abs=0.03)
    assert (labels == 9).float().mean() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(labels[labels != 9] == 2, taught[labels != 9])


def test_the_loss_is_the_two_terms():
    teacher = tiny_dit()
    x0, labels = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)

    def loss(student, lam):
        return transfer_loss(student, teacher, x0, labels, lam, False, torch.Generator().manual_seed(0)).item()

    other = tiny_dit()
    other.model.proj_out_2.bias.data += 1.0
    assert loss(teacher, 3.0) == loss(teacher, 0.0)  # nothing to learn from oneself
    assert loss(other, 3.0) - loss(other, 0.0) == pytest.approx(3.0, rel=1e-4)  # predictions differ by 1 everywhere


@pytest.mark.parametrize("grain", ["2:4", "unit"])
@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_the_student_is_masked_and_the_teacher_untouched(make, grain, tmp_path):
    denoiser = make()
    before = copy.deepcopy(denoiser.model.state_dict())
    student = distilled(denoiser, grain, Checkpoint(tmp_path, "k" * 16))
    assert all(torch.equal(before[key], value) for key, value in denoiser.model.state_dict().items())
    assert student.weights.keys() == before.keys()
    for name, mask in student.masks.items():
        assert (student.weights[name][~mask] == 0).all() and not torch.equal(student.weights[name], before[name] * mask)
        assert grain == "unit" or torch.equal(mask, nm_mask(student.weights[name], 2, 4))
    assert [row[0] for row in student.curve] == [2, 4, 6]
    assert all(rate == 0 for *_, rate in student.curve) or grain == "2:4"


class Killed(Exception):
    pass


class DyingCheckpoint(Checkpoint):
    """Saves after every step and dies after the third."""

    def save_if_due(self, state):
        saved = state()
        self.save(saved)
        if saved["step"] == 3:
            raise Killed


@pytest.mark.parametrize("grain", ["2:4", "unit"])
def test_resumed_equals_undisturbed_to_the_bit(grain, tmp_path):
    undisturbed = distilled(tiny_dit(), grain, Checkpoint(tmp_path / "a", "k" * 16))
    with pytest.raises(Killed):
        distilled(tiny_dit(), grain, DyingCheckpoint(tmp_path / "b", "k" * 16))
    resumed = distilled(tiny_dit(), grain, Checkpoint(tmp_path / "b", "k" * 16))
    assert resumed.curve == undisturbed.curve
    for mine, theirs in ((resumed.weights, undisturbed.weights), (resumed.masks, undisturbed.masks)):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_training_brings_the_student_back_to_the_teacher(tmp_path):
    teacher, pixels = tiny_dit(), tiny_images().pixels.numpy()
    held = noised(teacher.schedule, pixels, tiny_images().labels.numpy(), 12, torch.Generator().manual_seed(5))
    reference = predictions(teacher, held)
    masks, pattern = masks_of(teacher, "2:4")
    apply_masks(teacher.model, masks)
    before = relative_error(predictions(teacher, held), reference)
    remove_masks(teacher.model)
    settings = replace(SETTINGS, steps=80, batch=16, lr=3e-3, lam=1000.0, ema_decay=0.8)
    student = distilled(teacher, "2:4", Checkpoint(tmp_path, "k" * 16), settings)
    teacher.model.load_state_dict(student.weights)
    assert relative_error(predictions(teacher, held), reference) < 0.5 * before


@pytest.mark.parametrize("key, value", [("steps", 0), ("lr", 2.0), ("bank_share", -0.1), ("log_every", 0)])
def test_settings_out_of_bounds_name_the_key_and_the_bound(key, value):
    with pytest.raises(ValueError, match=rf"distill\.{key}: {value} is not between"):
        replace(SETTINGS, **{key: value})
