"""Sparse transfer training on a one-block DiT: every method, teacher untouched, resume to the bit."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from tasks.core.calibration import noised, predictions, relative_error
from tasks.core.checkpoint import Checkpoint
from tasks.core.sparsity import grain_mask, nm_mask
from tasks.distill.images import Images
from tasks.distill.settings import METHODS, check_method
from tasks.distill.train import Transfer, step_preconditioned, train
from tasks.runtime.masks import apply_masks, remove_masks
from tests.unit.distill.toy import SETTINGS, distilled, masks_of, tiny_dit, tiny_images, tiny_unet


def transfer(method: str = "sr_ste", **changes) -> Transfer:
    teacher = tiny_dit()
    return Transfer(teacher, masks_of(teacher, "2:4"), "2:4", method, tiny_images(), replace(SETTINGS, **changes))


def same(mine: dict, theirs: dict) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("grain", ["2:4", "unit"])
@pytest.mark.parametrize("make", [tiny_dit, tiny_unet])
def test_the_student_is_masked_and_the_teacher_untouched(make, grain, tmp_path):
    denoiser = make()
    before = copy.deepcopy(denoiser.model.state_dict())
    student = distilled(denoiser, grain, Checkpoint(tmp_path, "k" * 16))
    assert same(before, denoiser.model.state_dict())
    assert student.weights.keys() == before.keys()
    for name, mask in student.masks.items():
        assert (student.weights[name][~mask] == 0).all() and not torch.equal(student.weights[name], before[name] * mask)
        assert grain == "unit" or torch.equal(mask, nm_mask(student.weights[name], 2, 4))
    assert [row[0] for row in student.curve] == [2, 4, 6]
    assert all(rate == 0 for *_, rate in student.curve) or grain == "2:4"


# ---- the methods ----

def test_dense_is_the_same_training_without_masks(tmp_path):
    teacher = tiny_dit()
    student = distilled(teacher, "2:4", Checkpoint(tmp_path, "k" * 16), method="dense")
    assert student.masks == {} and all(rate == 0 for *_, rate in student.curve)
    full = {name: torch.ones_like(mask) for name, mask in masks_of(teacher, "2:4").items()}
    kept = train(teacher, full, "unit", "fixed", tiny_images(), SETTINGS, Checkpoint(tmp_path / "full", "k" * 16))
    assert same(student.weights, kept.weights)


def test_fixed_masks_stay_and_pruned_weights_learn_nothing():
    moving = transfer("fixed", weight_decay=0.0)
    for i in range(3):
        moving.step(i)
    for name, mask in moving.given.items():
        now, before = moving.dense.get_parameter(name), moving.teacher.model.get_parameter(name)
        assert torch.equal(now[~mask], before[~mask]) and not torch.equal(now[mask], before[mask])
        assert torch.equal(moving.masks[name], mask)


@pytest.mark.parametrize("method", ["ste", "sr_ste"])
def test_pruned_weights_learn_and_masks_follow(method):
    moving = transfer(method, log_every=1)
    for i in range(3):
        moving.step(i)
    moving.mask(3)
    name, mask = next(iter(moving.given.items()))
    assert not torch.equal(moving.dense.get_parameter(name)[~mask], moving.teacher.model.get_parameter(name)[~mask])
    assert torch.equal(moving.masks[name], nm_mask(moving.dense.get_parameter(name), 2, 4))
    assert sum(moving.flips) > 0


def test_sr_ste_is_ste_and_a_decay():
    gradients = {}
    for method in ("ste", "sr_ste"):
        moving = transfer(method, sr_ste=0.5)
        moving.mask(0)
        moving.gradients(0)
        gradients[method] = {name: p.grad.clone() for name, p in moving.dense.named_parameters()}
    for name, gradient in gradients["sr_ste"].items():
        pruned = moving.dense.get_parameter(name) * ~moving.masks[name] if name in moving.masks else 0.0
        torch.testing.assert_close(gradient, gradients["ste"][name] + 0.5 * pruned)


def test_decoupled_decay_of_pruned_weights():
    """The same step twice, with the decay and without: pruned weights differ by lr sr_ste w, nothing else does."""
    lr = 1e-2  # after a warm-up of 0 steps the first step has the peak
    plain, decayed = (transfer("sr_ste", decay="decoupled", sr_ste=s, weight_decay=0.0, warmup=0) for s in (0.0, 20.0))
    before = copy.deepcopy(plain.dense.state_dict())
    plain.step(0)
    decayed.step(0)
    for name, weight in decayed.dense.named_parameters():
        pruned = before[name] * ~decayed.masks[name] if name in decayed.masks else torch.zeros_like(weight)
        torch.testing.assert_close(plain.dense.get_parameter(name) - weight, lr * 20 * pruned, atol=1e-6, rtol=1e-4)


def test_progressive_prunes_on_in_the_same_model():
    moving = transfer("progressive")
    model, optimiser, seen = moving.dense, moving.optimiser, []
    for i in range(6):
        moving.step(i)
        seen.append(sum(m.sum().item() for m in moving.masks.values()) / sum(m.numel() for m in moving.masks.values()))
    assert seen == [0.75, 0.75, 0.75, 0.5, 0.5, 0.5]
    assert moving.dense is model and moving.optimiser is optimiser
    assert all(optimiser.state[p]["step"] == 6 for p in model.parameters())  # nothing was left out, nothing began anew


@pytest.mark.parametrize("grain, density", [("fine", 0.3), ("vector", 0.5), ("filter", 0.25)])
def test_other_grains_keep_the_density_of_the_given_masks(grain, density, tmp_path):
    teacher = tiny_dit()
    name = "transformer_blocks.0.ff.net.2.weight"
    given = {name: grain_mask(teacher.model.get_parameter(name).abs(), grain, density)}
    student = train(teacher, given, grain, "progressive", tiny_images(), SETTINGS, Checkpoint(tmp_path, "k" * 16))
    assert student.masks[name].sum() == given[name].sum()
    assert torch.equal(student.masks[name], grain_mask(student.weights[name].abs(), grain, density))


def test_mixed_grains_train_side_by_side(tmp_path):
    teacher = tiny_dit()
    first, second = "transformer_blocks.0.ff.net.0.proj.weight", "transformer_blocks.0.attn1.to_q.weight"
    given = {name: nm_mask(teacher.model.get_parameter(name), 2, 4) for name in (first, second)}
    grains = {first: "2:4", second: "unit"}
    student = train(teacher, given, grains, "ste", tiny_images(), SETTINGS, Checkpoint(tmp_path, "k" * 16))
    assert torch.equal(student.masks[second], given[second]) and not torch.equal(student.masks[first], given[first])


def test_no_steps_are_one_shot(tmp_path):
    teacher = tiny_dit()
    student = distilled(teacher, "2:4", Checkpoint(tmp_path, "k" * 16), replace(SETTINGS, steps=0))
    given = masks_of(teacher, "2:4")
    assert student.curve == [] and same(student.masks, given)
    apply_masks(teacher.model, given)
    assert same(student.weights, teacher.model.state_dict())


# ---- freeze and precondition ----

def test_masks_freeze_on_the_way_to_those_of_the_ema():
    moving = transfer("ste", freeze_at=0.5, log_every=1)
    for i in range(3):
        moving.step(i)
    ema = {name: moving.ema.module.get_parameter(name).clone() for name in moving.given}
    for i in range(3, 6):
        moving.step(i)
        assert all(torch.equal(moving.masks[name], nm_mask(weight, 2, 4)) for name, weight in ema.items())
    assert moving.flips[4:] == [0, 0] and moving.flips_at_freeze > 0
    assert same(moving.student([(i, 0.0) for i in range(1, 7)]).masks, moving.masks)


def test_preconditioned_first_steps_are_dense():
    moving = transfer("ste", precondition=0.5)
    for i in range(3):
        moving.step(i)
        assert all(mask.all() for mask in moving.masks.values())
    before = {p: moving.optimiser.state[p]["exp_avg_sq"].clone() for p in moving.dense.parameters()}
    moving.step(3)
    assert not any(mask.all() for mask in moving.masks.values())
    assert all(torch.equal(moving.optimiser.state[p]["exp_avg_sq"], variance) for p, variance in before.items())


def test_a_preconditioned_step_is_adamw_when_the_variance_would_not_change():
    """At a constant gradient g Adam's corrected variance is g^2 at every step, frozen or not."""
    weights = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    plain, frozen = (torch.optim.AdamW([w], lr=0.1, weight_decay=0.5) for w in weights)
    for t in range(1, 5):
        for weight in weights:
            weight.grad = torch.tensor([0.3, -0.7])
        plain.step()
        if t <= 2:
            frozen.step()
        else:
            step_preconditioned(frozen, t, 2)
    torch.testing.assert_close(weights[0], weights[1])


# ---- data ----

def test_bank_share_1_touches_no_real_image(tmp_path):
    """Two pools with the same teacher samples and other real images, other labels: one student."""
    teacher, pool = tiny_dit(), tiny_images()
    other = Images(pixels=torch.cat([255 - pool.pixels[:8], pool.pixels[8:]]),
                   labels=torch.cat([pool.labels[:8] * 0, pool.labels[8:]]), real=8)

    def student(share, images, name):
        settings, checkpoint = replace(SETTINGS, bank_share=share), Checkpoint(tmp_path / name, "k" * 16)
        return train(teacher, masks_of(teacher, "2:4"), "2:4", "sr_ste", images, settings, checkpoint)

    first, second = student(1.0, pool, "a"), student(1.0, other, "b")
    assert same(first.weights, second.weights) and first.curve == second.curve
    assert not same(student(0.5, pool, "c").weights, student(0.5, other, "d").weights)


@pytest.mark.parametrize("features", [0.0, 1.0])
def test_accumulated_gradients_are_those_of_the_whole_batch(features):
    gradients = []
    for accumulate in (1, 4):
        moving = transfer(batch=8, accumulate=accumulate, features=features)
        moving.mask(0)
        loss = moving.gradients(0)
        gradients.append((loss, torch.cat([p.grad.flatten() for p in moving.dense.parameters()])))
    (whole_loss, whole), (parts_loss, parts) = gradients
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    assert (parts - whole).norm() < 1e-5 * whole.norm()


# ---- resume ----

class Killed(Exception):
    pass


class DyingCheckpoint(Checkpoint):
    """Saves after every step and dies after the third."""

    def save_if_due(self, state):
        saved = state()
        self.save(saved)
        if saved["step"] == 3:
            raise Killed


RESUMED = [("2:4", method, {}) for method in METHODS] + [
    ("unit", "sr_ste", {}), ("2:4", "sr_ste", {"decay": "decoupled", "sr_ste": 2.0}),
    ("2:4", "ste", {"freeze_at": 0.4}), ("2:4", "ste", {"freeze_at": 0.5}), ("2:4", "ste", {"precondition": 0.4}),
    ("2:4", "sr_ste", {"features": 1.0, "accumulate": 2, "bf16": True, "bank_share": 1.0})]


@pytest.mark.parametrize("grain, method, changes", RESUMED, ids=str)
def test_resumed_equals_undisturbed_to_the_bit(grain, method, changes, tmp_path):
    settings = replace(SETTINGS, **changes)
    undisturbed = distilled(tiny_dit(), grain, Checkpoint(tmp_path / "a", "k" * 16), settings, method)
    with pytest.raises(Killed):
        distilled(tiny_dit(), grain, DyingCheckpoint(tmp_path / "b", "k" * 16), settings, method)
    resumed = distilled(tiny_dit(), grain, Checkpoint(tmp_path / "b", "k" * 16), settings, method)
    assert resumed.curve == undisturbed.curve and resumed.flips_at_freeze == undisturbed.flips_at_freeze
    assert same(resumed.weights, undisturbed.weights) and same(resumed.masks, undisturbed.masks)


# ---- does it learn, and does it refuse ----

@pytest.mark.parametrize("method", ["fixed", "ste", "sr_ste", "progressive"])
def test_training_brings_the_student_back_to_the_teacher(method, tmp_path):
    teacher, pixels = tiny_dit(), tiny_images().pixels.numpy()
    held = noised(teacher.schedule, pixels, tiny_images().labels.numpy(), 12, torch.Generator().manual_seed(5))
    reference = predictions(teacher, held)
    apply_masks(teacher.model, masks_of(teacher, "2:4"))
    before = relative_error(predictions(teacher, held), reference)
    remove_masks(teacher.model)
    settings = replace(SETTINGS, steps=80, batch=16, lr=3e-3, data=0.0, lam=1.0, ema_decay=0.8)
    student = distilled(teacher, "2:4", Checkpoint(tmp_path, "k" * 16), settings, method)
    teacher.model.load_state_dict(student.weights)
    assert relative_error(predictions(teacher, held), reference) < 0.5 * before


@pytest.mark.parametrize("changes, message", [
    ({"steps": -1}, "steps: -1 is not between 0"), ({"lr": 2.0}, "lr: 2.0 is not between"),
    ({"bank_share": -0.1}, "bank_share: -0.1 is not between"), ({"log_every": 0}, "log_every: 0 is not between"),
    ({"decay": "coupled"}, "decay: 'coupled' is not one of gradient, decoupled"),
    ({"accumulate": 3}, "accumulate: 3 does not divide distill.batch, 4"),
    ({"data": 0.0, "lam": 0.0}, "data: 0, as distill.lam and distill.features are"),
    ({"prune_at": (0.5, 0.25)}, r"prune_at: \[0.5, 0.25\] does not rise"),
    ({"prune_at": (1.5,)}, "prune_at: 1.5 is not between 0 and 1"),
    ({"precondition": 0.5, "freeze_at": 0.4}, "precondition: 0.5 is more than distill.freeze_at, 0.4"),
    ({"decay": "decoupled", "sr_ste": 200.0}, "sr_ste: 200.0 times distill.lr, 0.01, is more than 1"),
])
def test_settings_out_of_bounds_name_the_key_and_the_bound(changes, message):
    with pytest.raises(ValueError, match=rf"distill\.{message}"):
        replace(SETTINGS, **changes)


def test_methods_are_checked():
    with pytest.raises(ValueError, match=r"distill.method: 'sr_st' is not one of dense, .*did you mean sr_ste"):
        check_method("sr_st", SETTINGS)
    with pytest.raises(ValueError, match="distill.freeze_at: 0.4 is before the last of distill.prune_at, 0.5"):
        check_method("progressive", replace(SETTINGS, freeze_at=0.4))
    check_method("ste", replace(SETTINGS, freeze_at=0.4))
