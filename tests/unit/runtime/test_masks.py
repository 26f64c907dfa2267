"""apply, remove and shrink on tiny models whose every parameter is random (norms too, or a slip there would not show)."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention

from tasks.core.denoiser import Denoiser, build
from tasks.mask_search.masks import unit_masks
from tasks.runtime.masks import apply_masks, hidden_units, kept_units, remove_masks, restore_shapes, shrink_units

SCHEDULE = {"num_train_timesteps": 50}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 16],
        "norm_num_groups": 4, "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
MODELS = {
    "dit": ("DiTTransformer2DModel", DIT | {"activation_fn": "gelu-approximate"}),
    "dit gated": ("DiTTransformer2DModel", DIT | {"activation_fn": "geglu"}),
    "unet": ("UNet2DModel", UNET),
    "unet scale and shift": ("UNet2DModel", UNET | {"resnet_time_scale_shift": "scale_shift"}),
    "unet resnets that resample": ("UNet2DModel", UNET | {"downsample_type": "resnet", "upsample_type": "resnet"}),
}


def tiny(name: str) -> Denoiser:
    denoiser = build(*MODELS[name], SCHEDULE)
    rng = torch.Generator().manual_seed(0)
    for parameter in denoiser.model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    denoiser.model.eval().requires_grad_(False)
    return denoiser


def predict(denoiser: Denoiser) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    x, t = torch.randn((3, *denoiser.sample_shape), generator=rng), torch.tensor([0, 20, 49])
    with torch.inference_mode():
        return denoiser(x, t, torch.tensor([0, 1, 2]) if denoiser.num_classes else None)


def random_masks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    return {name: torch.rand(p.shape, generator=rng) < 0.5 for name, p in model.named_parameters() if p.ndim > 1}


def half(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return unit_masks(model, {units.block: 0.5 for units in hidden_units(model)})


def test_masked_weights_are_zero_and_the_others_untouched():
    layer = torch.nn.Linear(2, 2)
    layer.weight.data = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    apply_masks(layer, {"weight": torch.tensor([[True, False], [False, True]])})
    assert layer.weight.tolist() == [[1, 0], [0, -4]]
    assert not torch.signbit(layer.weight[0, 1])


@pytest.mark.parametrize("name", MODELS)
def test_apply_twice_then_remove_is_bit_identical(name):
    denoiser = tiny(name)
    weights, before = copy.deepcopy(denoiser.model.state_dict()), predict(denoiser)
    apply_masks(denoiser.model, random_masks(denoiser.model))
    once = predict(denoiser)
    apply_masks(denoiser.model, random_masks(denoiser.model))
    assert torch.equal(predict(denoiser), once)
    assert not torch.equal(once, before)
    remove_masks(denoiser.model)
    remove_masks(denoiser.model)
    assert torch.equal(predict(denoiser), before)
    after = denoiser.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


def test_other_masks_replace_the_live_ones():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data = torch.tensor([[1.0, 2.0]])
    apply_masks(layer, {"weight": torch.tensor([[False, True]])})
    apply_masks(layer, {"weight": torch.tensor([[True, False]])})
    assert layer.weight.tolist() == [[1, 0]]


@pytest.mark.parametrize("masks, message", [
    ({"wieght": torch.ones(1, 2)}, "wieght: the model has no such parameter"),
    ({"weight": torch.ones(2, 1)}, r"weight: shape \(2, 1\), the parameter's is \(1, 2\)"),
])
def test_a_wrong_mask_is_named_and_changes_nothing(masks, message):
    layer = torch.nn.Linear(2, 1)
    before = layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        apply_masks(layer, masks)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", MODELS)
def test_shrunk_equals_masked(name):
    denoiser = tiny(name)
    masks = half(denoiser.model)
    dense, parameters = predict(denoiser), sum(p.numel() for p in denoiser.model.parameters())
    apply_masks(denoiser.model, masks)
    masked = predict(denoiser)
    kept = shrink_units(denoiser.model, masks)
    assert kept == {units.block: units.count for units in hidden_units(denoiser.model)}
    assert sum(p.numel() for p in denoiser.model.parameters()) < parameters
    scale = masked.abs().max()
    assert (masked - dense).abs().max() > 1e-3 * scale
    torch.testing.assert_close(predict(denoiser), masked, rtol=1e-5, atol=1e-5 * scale.item())


@pytest.mark.parametrize("name", MODELS)
def test_restored_shapes_take_the_shrunk_weights(name):
    shrunk, fresh = tiny(name), tiny(name)
    kept = shrink_units(shrunk.model, half(shrunk.model))
    restore_shapes(fresh.model, kept)
    restore_shapes(fresh.model, kept)
    for parameter in fresh.model.parameters():
        parameter.data.zero_()
    fresh.model.load_state_dict(shrunk.model.state_dict())
    assert torch.equal(predict(fresh), predict(shrunk))


def test_heads_leave_whole_and_the_attention_knows_how_many_are_left():
    """Three heads of 2 channels; head 1 and half of head 2 are masked."""
    attention = Attention(query_dim=4, heads=3, dim_head=2, bias=True).requires_grad_(False)
    model = torch.nn.ModuleDict({"attn": attention})
    [units] = hidden_units(model)
    assert (units.block, units.count, units.granule) == ("attn", 6, 2)
    assert units.producers == ("attn.to_q", "attn.to_k", "attn.to_v") and units.consumer == "attn.to_out.0"
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[:, [2, 3, 4]] = False
    before = copy.deepcopy(attention)
    assert shrink_units(model, {"attn.to_out.0.weight": mask}) == {"attn": 4}
    for layer in ("to_q", "to_k", "to_v"):
        assert torch.equal(getattr(attention, layer).weight, getattr(before, layer).weight[[0, 1, 4, 5]])
        assert torch.equal(getattr(attention, layer).bias, getattr(before, layer).bias[[0, 1, 4, 5]])
    assert attention.to_out[0].weight[:, 2].tolist() == [0] * 4
    rebuilt = Attention(query_dim=4, heads=2, dim_head=2, bias=True)  # what diffusers makes of two heads
    rebuilt.load_state_dict(attention.state_dict())
    for name, value in vars(rebuilt).items():
        assert name.startswith("_") or name in ("processor", "training") or getattr(attention, name) == value, name
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attention(x), rebuilt(x))


def test_units_leave_by_whole_groups_and_one_always_stays():
    units = hidden_units(tiny("unet").model)[0]
    assert (units.count, units.granule) == (8, 2)
    mask = torch.ones(8, 8, 3, 3, dtype=torch.bool)
    mask[:, [0, 2, 3]] = False  # half of group 0, all of group 1
    assert kept_units(units, mask).tolist() == [0, 1, 4, 5, 6, 7]
    assert kept_units(units, torch.zeros_like(mask)).tolist() == [0, 1]


def test_masks_that_free_no_unit_leave_the_shapes():
    model = tiny("dit").model
    assert shrink_units(model, random_masks(model)) == {}


@pytest.mark.parametrize("kept, message", [
    ({"mid_block.resnets.7": 8}, "mid_block.resnets.7: the model has no such"),
    ({"mid_block.resnets.0": 6}, "6 is not a multiple of 4 up to 16"),
    ({"mid_block.resnets.0": 0}, "0 is not a multiple of 4 up to 16"),
    ({"mid_block.attentions.0": 4}, "4 is not a multiple of 8 up to 16"),
])
def test_wrong_kept_counts_are_named(kept, message):
    with pytest.raises(ValueError, match=message):
        restore_shapes(tiny("unet").model, kept)
