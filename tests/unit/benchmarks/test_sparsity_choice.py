"""What the study prunes where places are chosen one by one."""

from types import SimpleNamespace

import torch

from benchmarks.sparsity import choice, study
from benchmarks.sparsity.arms import BLOCKS, EXACT, LAYERS, OURS, UNIT
from benchmarks.sparsity.choice import image_error, unit_plan
from benchmarks.sparsity.lab import CALIBRATION_NOISE
from benchmarks.sparsity.storage import storage_share
from benchmarks.sparsity.study import masks_of
from tasks.core.calibration import noised
from tasks.core.cost import layer_costs
from tasks.mask_search.sensitivity import cut_masks, masked_error
from tests.unit.distill.toy import UNET, frozen, tiny_dit, tiny_images


def test_layers_chosen_one_by_one_store_no_more_than_one_pattern_and_err_less():
    teacher, images = tiny_dit(), tiny_images()
    seen = noised(teacher.schedule, images.pixels.numpy(), images.labels.numpy(), 12, torch.Generator().manual_seed(0))
    lab = SimpleNamespace(name="tiny", teacher=teacher, calibration=seen)
    masks = {arm.allocation: masks_of(arm, lab, teacher) for arm in (OURS, LAYERS)}
    stored = {how: storage_share(layer_costs(teacher), found, "2:4", {}) for how, found in masks.items()}
    error = image_error(lab, 10, 12)
    strays = {how: masked_error(teacher, found, error) for how, found in masks.items()}
    assert stored["as_uniform"] <= stored["uniform"] and strays["as_uniform"] < strays["uniform"]
    assert len({mask.float().mean().item() for mask in masks["as_uniform"].values()}) > 1


def test_units_chosen_exactly_save_what_was_asked_where_one_density_saves_more():
    teacher, images = frozen("UNet2DModel", UNET | {"block_out_channels": [16]}), tiny_images(labelled=False)
    seen = noised(teacher.schedule, images.pixels.numpy(), None, 12, torch.Generator().manual_seed(0))
    lab = SimpleNamespace(name="tiny", teacher=teacher, calibration=seen)
    plans = {arm.allocation: unit_plan(arm, lab) for arm in (UNIT, EXACT)}
    assert {option.density for option in plans["uniform"]} == {0.5}  # eight of sixteen units, where 0.6 is asked
    saved = {how: sum(option.saved for option in plan) for how, plan in plans.items()}
    assert (1 - EXACT.density) / 0.5 <= saved["exact"] / saved["uniform"] < 1


def test_blocks_chosen_by_images_save_as_much_as_one_density_attentions_too_and_stray_less():
    teacher, images = tiny_dit(), tiny_images()
    seen = noised(teacher.schedule, images.pixels.numpy(), images.labels.numpy(), 12, torch.Generator().manual_seed(0))
    lab = SimpleNamespace(name="tiny", teacher=teacher, calibration=seen)
    one_density, chosen = (unit_plan(arm, lab) for arm in BLOCKS)
    assert any(layer.endswith(".qk") for option in one_density for layer in option.layers)
    assert sum(option.saved for option in chosen) >= sum(option.saved for option in one_density)
    error, model = image_error(lab, 10, 12), teacher.model
    strays = [masked_error(teacher, cut_masks(model, plan), error) for plan in (one_density, chosen)]
    assert strays[1] <= strays[0]


def test_plans_are_compared_on_noise_that_none_was_chosen_by(monkeypatch):
    teacher, images = tiny_dit(), tiny_images()
    seen = noised(teacher.schedule, images.pixels.numpy(), images.labels.numpy(), 12, torch.Generator().manual_seed(0))
    noises, judge = [], choice.image_error
    monkeypatch.setattr(choice, "image_error", lambda *args: noises.append(args[3:] or (CALIBRATION_NOISE,)) or judge(*args))
    monkeypatch.setattr(choice, "WHOLE_IMAGES", 12)
    found = choice.plan_errors(SimpleNamespace(name="tiny", teacher=teacher, calibration=seen))
    assert list(found) == ["one_density", "by_predictions", "by_images"]
    assert noises == [(CALIBRATION_NOISE,), (CALIBRATION_NOISE + 1,), (CALIBRATION_NOISE + 2,)]  # one chooses, two compare
    assert sum(found["by_images"]) <= sum(found["one_density"])


def test_masks_that_are_chosen_are_chosen_once_for_all_training_seeds(tmp_path, monkeypatch):
    lab, asked, masks = SimpleNamespace(folder=tmp_path), [], {"a.weight": torch.tensor([True, False])}
    monkeypatch.setattr(study, "masks_of", lambda *of: asked.append(of) or masks)
    for arm, times in ((LAYERS, 1), (OURS, 3)):
        asked.clear()
        for _ in range(3):
            found = study.kept_masks(arm, lab, None)
            assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)
        assert len(asked) == times
