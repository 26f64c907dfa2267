"""What the study prunes where places are chosen one by one."""

from types import SimpleNamespace

import torch

from benchmarks.sparsity.arms import EXACT, LAYERS, OURS, UNITS
from benchmarks.sparsity.choice import around, image_error, unit_plan
from benchmarks.sparsity.storage import storage_share
from benchmarks.sparsity.study import masks_of
from tasks.core.calibration import noised
from tasks.core.cost import layer_costs
from tasks.mask_search.allocate import Option
from tasks.mask_search.sensitivity import masked_error
from tests.unit.distill.toy import UNET, frozen, tiny_dit, tiny_images


def option(layers: str, grain: str, density: float, error: float, saved: float) -> Option:
    return Option(tuple(layers), grain, density, error, saved)


def test_around_goes_from_one_density_to_the_least_summed_error():
    deep = {"a": 1.0, "b": 9.0}  # errors at half; a quarter more or less moves them by the half
    offered = [option(name, "unit", density, error * (2 - 2 * density), 8 * (1 - density))
               for name, error in deep.items() for density in (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)]
    plan = [o for o in offered if o.density == 0.5]
    ways = around(offered, plan, 8, [0, 0.13, 0.25])
    densities = [{o.layers[0]: o.density for o in way} for way in ways]
    assert densities == [{"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0.375, "b": 0.625}, {"a": 0.25, "b": 0.75},
                         {"a": 0.25, "b": 0.75}]
    assert all(sum(o.saved for o in way) >= 8 for way in ways)


def test_around_leaves_no_layer_dense_that_the_plan_prunes():
    offered = [option("a", "unit", 0.5, 1.0, 4), option("a", "unit", 0.25, 2.0, 8), option("b", "unit", 0.5, 5.0, 4)]
    plan = [offered[0], offered[2]]
    assert around(offered, plan, 8, [0.3]) == [plan, plan, [offered[1]]]


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
    plans = {arm.allocation: unit_plan(arm, lab) for arm in (UNITS[0], EXACT)}
    assert {option.density for option in plans["uniform"]} == {0.5}  # eight of sixteen units, where 0.6 is asked
    saved = {how: sum(option.saved for option in plan) for how, plan in plans.items()}
    assert (1 - EXACT.density) / 0.5 <= saved["exact"] / saved["uniform"] < 1
