"""Cuts and their errors, on a network whose prediction is one weight matrix, and on real architectures."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tasks.core.calibration import relative_error
from tasks.core.cost import layer_costs
from tasks.core.denoiser import Denoiser, build
from tasks.core.sampler import network
from tasks.core.sparsity import layer_density
from tasks.mask_search.allocate import Cut, Option
from tasks.mask_search.choose import CostModel
from tasks.mask_search.saliency import Statistics
from tasks.mask_search.sensitivity import (
    Trajectories,
    cut_errors,
    cut_masks,
    error_at,
    grain_densities,
    layer_cuts,
    priced,
    unit_cuts,
    unit_layers,
)
from tasks.runtime.masks import hidden_units

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 16],
        "norm_num_groups": 4, "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_elementwise_affine": False,
       "norm_type": "ada_norm_zero"}


class OneMatrix:
    """Predicts its matrix: of the unit vectors as inputs, so the error of a mask is the energy of what it removes."""

    def __init__(self):
        self.model = nn.ModuleDict({"a": nn.Linear(4, 2, bias=False)})
        self.model["a"].weight.data = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 5.0]])

    def __call__(self, x, t, labels):
        return self.model["a"](x)


EYE = torch.eye(4).view(4, 1, 1, 4)


def from_now(toy: OneMatrix, x: torch.Tensor) -> Callable[[], float]:
    """The error of its prediction against what it is now."""
    now = toy(x, None, None).detach()
    return lambda: relative_error(toy(x, None, None).detach(), now)


def test_errors_by_hand():
    toy = OneMatrix()
    before = toy.model["a"].weight.detach().clone()
    offered = {"2:4": [], "fine": [0.375, 0.99], "filter": [0.5]}
    cuts = [cut for grain, densities in offered.items() for cut in layer_cuts(toy.model, grain, densities)]
    with torch.inference_mode():
        errors = cut_errors(toy, cuts, from_now(toy, EYE))
    assert errors == {(("a",), "2:4"): {0.5: pytest.approx(5 / 55)},    # 2 and 1 go
                      (("a",), "fine"): {0.375: pytest.approx(5 / 55)},  # 5, 4 and 3 of eight stay; 0.99 would keep all
                      (("a",), "filter"): {0.5: pytest.approx(25 / 55)}}  # sums of 10 and 5
    assert torch.equal(toy.model["a"].weight, before)


def test_weights_that_stay_make_up_for_a_cut_where_inputs_are_known():
    """All inputs alike: one weight can stand for all, and only damping takes a little; without them 6 of 10 are lost."""
    toy = OneMatrix()
    toy.model["a"].weight.data = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    before = toy.model["a"].weight.detach().clone()
    alike = torch.ones(8, 1, 1, 4)
    statistics = {"a": Statistics(gram=torch.ones(4, 4, dtype=torch.float64) * 8, rows=8)}
    cuts = [Cut(("a",), "fine", 0.25)]
    (plain,), (made_up,) = (errors.values() for errors in (
        cut_errors(toy, cuts, from_now(toy, alike), known)[("a",), "fine"] for known in ({}, statistics)))
    assert plain == pytest.approx((6 / 10) ** 2) and made_up < 1e-3
    assert torch.equal(toy.model["a"].weight, before)


@pytest.mark.parametrize("name, config", [("DiTTransformer2DModel", DIT), ("UNet2DModel", UNET)])
def test_images_tell_how_far_another_network_leads(name, config):
    torch.manual_seed(0)
    denoiser = build(name, config, {"num_train_timesteps": 10})
    predict = network(Denoiser(denoiser.model.eval(), denoiser.schedule))
    found = [Trajectories.of(denoiser, predict, steps=4, n=n, seed=3) for n in (70, 70, 2)]  # more than a chunk, and less
    assert torch.equal(found[0].images, found[1].images) and torch.allclose(found[0].images[:2], found[2].images, atol=1e-5)
    assert found[0].error(predict) == 0
    off = [found[0].error(lambda x, t, labels, step, by=by: predict(x, t, labels, step) * by) for by in (0.999, 0.99, 0.9)]
    assert 0 < off[0] < off[1] < off[2]


@pytest.mark.parametrize("shape, grain, densities, expected", [
    ((8, 8), "2:4", [0.1], [0.5]), ((8, 16), "1:4", [], [0.25]), ((2, 2), "fine", [0.5, 0.9, 0.01], [0.25, 0.5]),
    ((6, 5, 3, 3), "kernel", [0.25, 0.5], [8 / 30, 0.5]), ((16, 16), "kernel", [0.3, 0.9], [0.25]),
    ((4, 9), "filter", [0.6], [0.5])])
def test_densities_are_those_of_whole_grains(shape, grain, densities, expected):
    assert grain_densities(shape, grain, densities) == expected


@pytest.mark.parametrize("name, config, count", [("DiTTransformer2DModel", DIT, 2), ("UNet2DModel", UNET, 3)])
def test_units_cover_the_layers_whose_shape_they_are(name, config, count):
    denoiser = build(name, config, {"num_train_timesteps": 10})
    counted = {cost.name for cost in layer_costs(denoiser)}
    for units in hidden_units(denoiser.model):
        layers = unit_layers(units, counted)
        if units.granule == 1 or "resnets" in units.block:
            assert len(layers) == count
        assert set(layers) <= counted and units.consumer in layers
        [cut] = unit_cuts({layers: units}, [0.5], 1)
        masks = layer_density(cut_masks(denoiser.model, [cut]))
        assert masks == {layer: cut.density for layer in layers if layer in denoiser.prunable_layers()}


def test_masks_of_a_mixed_plan_are_those_of_its_cuts():
    denoiser = build("DiTTransformer2DModel", DIT, {"num_train_timesteps": 10})
    block = next(units for units in hidden_units(denoiser.model) if units.block.endswith("0.ff"))
    plan = [*unit_cuts({unit_layers(block, denoiser.prunable_layers()): block}, [0.25], 16),
            Cut(("transformer_blocks.1.ff.net.0.proj",), "2:4", 0.5), Cut(("transformer_blocks.0.attn1.to_q",), "vector", 0.75)]
    masks = cut_masks(denoiser.model, plan)
    assert layer_density(masks) == {layer: cut.density for cut in plan for layer in cut.layers}
    for cut in plan:
        assert all(torch.equal(mask, masks[name]) for name, mask in cut_masks(denoiser.model, [cut]).items())


def test_units_near_a_density_are_one_cut():
    denoiser = build("DiTTransformer2DModel", DIT, {"num_train_timesteps": 10})
    blocks = {("x",): next(units for units in hidden_units(denoiser.model) if units.block.endswith("0.ff"))}  # 64 units
    assert unit_cuts(blocks, [0.2, 0.25, 0.3, 0.5, 0.99], 16) == [Cut(("x",), "unit", 0.25), Cut(("x",), "unit", 0.5)]


def test_errors_between_densities_are_interpolated_and_cuts_priced():
    measured = {0.5: 0.2, 0.25: 0.6}
    assert [error_at(measured, d) for d in (1.0, 0.75, 0.5, 0.375, 0.25, 0.1)] == pytest.approx([0, 0.1, 0.2, 0.4, 0.6, 0.6])
    model = CostModel("MACs", 100, lambda layer, grain, density: 10 * density)
    assert priced([Cut(("a", "b"), "unit", 0.75)], {(("a", "b"), "unit"): measured}, model) == [
        Option(("a", "b"), "unit", 0.75, pytest.approx(0.1), pytest.approx(5))]
