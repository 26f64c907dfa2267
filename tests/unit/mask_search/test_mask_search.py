"""N:M and unit masks: by hand, by properties, and against torch.ao.pruning."""


import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.pruning import WeightNormSparsifier

from tasks.core.denoiser import build
from tasks.core.sparsity import kept_shares, layer_density, nm_mask, parse_pattern
from tasks.mask_search import sensitivity
from tasks.mask_search.masks import covered, kept_count, misfits, unit_masks, unit_saliency
from tasks.runtime.masks import HiddenUnits, hidden_units

UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 16],
        "norm_num_groups": 4, "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}


class FeedForward(nn.Module):
    """The layout of diffusers' feed-forward, 2 -> 4 -> 2, without its activation."""

    def __init__(self):
        super().__init__()
        act = nn.Module()
        act.proj = nn.Linear(2, 4)
        self.net = nn.ModuleList([act, nn.Identity(), nn.Linear(4, 2)])
        act.proj.weight.data = torch.tensor([[1.0, 0.0], [0.0, 3.0], [0.0, 0.0], [2.0, 0.0]])
        self.net[2].weight.data = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-9.0, 0.0, 0.0, 0.0]])


def test_two_of_four_by_hand():
    weight = torch.tensor([[0.1, -0.9, 0.5, 0.2, 7.0, 8.0, -9.0, 6.0]])
    assert nm_mask(weight, 2, 4).tolist() == [[False, True, True, False, False, True, True, False]]


def test_ties_go_to_the_earlier():
    assert nm_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]
    assert nm_mask(torch.tensor([[0.0, 1.0, -1.0, 1.0]]), 2, 4).tolist() == [[False, True, True, False]]


def test_a_convolution_is_grouped_along_its_input_channels():
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, :, 0, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    weight[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mask = nm_mask(weight, 2, 4)
    assert mask[0, :, 0, 0].tolist() == [True, True, False, False]
    assert mask[0, :, 0, 1].tolist() == [False, False, True, True]


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("shape", [(16, 32), (8, 16, 3, 3)])
def test_nm_agrees_with_torch_ao(n, m, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rows = weight.movedim(1, -1).reshape(-1, shape[1])  # torch.ao knows matrices only
    model = nn.Sequential(nn.Linear(shape[1], len(rows), bias=False))
    model[0].weight.data = rows.clone()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, m), zeros_per_block=m - n)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    theirs = model[0].parametrizations.weight[0].mask.bool()
    assert torch.equal(nm_mask(weight, n, m).movedim(1, -1).reshape(rows.shape), theirs)


@st.composite
def weights_and_patterns(draw):
    m = draw(st.sampled_from([2, 4, 8]))
    n = draw(st.integers(1, m))
    shape = (draw(st.integers(1, 3)), m * draw(st.integers(1, 3)), *draw(st.sampled_from([(), (1, 1), (3, 2)])))
    values = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))  # many ties
    return values.float(), n, m


@settings(max_examples=60, deadline=None)
@given(weights_and_patterns())
def test_nm_properties(case):
    weight, n, m = case
    mask = nm_mask(weight, n, m)
    kept = mask.movedim(1, -1).reshape(-1, m)
    size = weight.abs().movedim(1, -1).reshape(-1, m)
    assert mask.shape == weight.shape and mask.dtype == torch.bool and mask.is_contiguous()
    assert (kept.sum(1) == n).all()
    assert ((size * kept).sum(1) == size.topk(n, 1)[0].sum(1)).all()
    assert torch.equal(nm_mask(weight * mask, n, m) & mask & (weight != 0), mask & (weight != 0))


def test_indivisible_layers_are_named():
    layers = {"a": nn.Linear(8, 3), "b": nn.Linear(6, 4), "c": nn.Conv2d(3, 8, 3)}
    assert misfits(layers, "2:4") == {"b": "6 inputs are no multiple of 4", "c": "3 inputs are no multiple of 4"}
    with pytest.raises(ValueError, match="no multiple of 4"):
        nm_mask(layers["b"].weight, 2, 4)


def test_patterns_of_grain_and_cover():
    assert parse_pattern("2:4") == (2, 4)
    for bad in ("unit", "4:2", "0:4", "2:"):
        with pytest.raises(ValueError, match="is not N:M"):
            parse_pattern(bad)
    assert covered(["x.0.ff.net.2", "proj_out_1"], ("x.*.ff.*", "mid.*")) == ["x.0.ff.net.2"]
    with pytest.raises(ValueError, match="none of y"):
        covered(["x.0.ff.net.2"], ("y",))


def test_unit_masks_by_hand():
    model = nn.ModuleDict({"ff": FeedForward()})
    [units] = hidden_units(model)
    assert unit_saliency(model, units).tolist() == [10, 3, 0, 2]
    masks = unit_masks(model, {"ff": 0.5})
    assert masks["ff.net.0.proj.weight"].tolist() == [[True, True], [True, True], [False, False], [False, False]]
    assert masks["ff.net.0.proj.bias"].tolist() == [True, True, False, False]
    assert masks["ff.net.2.weight"].tolist() == [[True, True, False, False]] * 2
    assert layer_density(masks) == {"ff.net.0.proj": 0.5, "ff.net.2": 0.5}


def test_density_one_masks_nothing_and_wrong_densities_are_named():
    model = nn.ModuleDict({"ff": FeedForward()})
    assert unit_masks(model, {"ff": 1.0}) == {}
    for density, message in (({"ff": 0.0}, r"ff: 0.0 is not in \(0, 1\]"), ({"gg": 0.5}, "gg is no feed-forward")):
        with pytest.raises(ValueError, match=message):
            unit_masks(model, density)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 12), st.sampled_from([1, 2, 4]), st.floats(0.01, 1), st.sampled_from([1, 8, 16]))
def test_kept_count_is_whole_granules_near_the_density(granules, granule, density, multiple):
    units = HiddenUnits("b", granules * granule * 4, granule, (), "c")
    kept = kept_count(units, density, multiple)
    together = max(granule, multiple) if units.count % max(granule, multiple) == 0 else granule
    assert 0 < kept <= units.count and kept % granule == 0
    assert abs(kept - density * units.count) <= together


def test_unet_units_are_masked_by_whole_groups():
    model = build("UNet2DModel", UNET, {"num_train_timesteps": 10}).model
    for units in (units for units in hidden_units(model) if not units.products):
        masks = unit_masks(model, {units.block: 0.5})
        norm = masks[f"{units.block}.norm2.weight"].view(-1, units.granule)
        assert torch.equal(norm.any(1), norm.all(1))
        assert norm.float().mean() == 0.5
        for name, dim in (("conv1.weight", 0), ("time_emb_proj.weight", 0), ("conv2.weight", 1)):
            mask = masks[f"{units.block}.{name}"].movedim(dim, 0).flatten(1)
            assert torch.equal(mask.all(1), norm.flatten()) and torch.equal(mask.any(1), norm.flatten())


class OneAttention(nn.Module):
    """Four heads of 2 channels, whose queries' weights alone differ: head h has 1 + (h + 2) % 4 everywhere."""

    def __init__(self):
        super().__init__()
        self.attn = Attention(query_dim=3, heads=4, dim_head=2)
        for parameter in self.parameters():
            parameter.data.fill_(1.0)
        self.attn.to_q.weight.data *= torch.tensor([3.0, 4.0, 1.0, 2.0]).repeat_interleave(2)[:, None]


@pytest.mark.parametrize(("density", "kept"), [(0.25, [1]), (0.3, [1]), (0.5, [0, 1]), (0.7, [0, 1, 3]), (0.01, [1])])
def test_heads_are_masked_whole_by_hand(density, kept):
    model = OneAttention()
    masks = unit_masks(model, {"attn": density})
    assert set(masks) == {f"attn.to_{part}.weight" for part in ("q", "k", "v", "out.0")}
    stays = torch.tensor([head in kept for head in range(4)]).repeat_interleave(2)
    for name, mask in masks.items():
        assert torch.equal(mask, (stays[None] if "to_out" in name else stays[:, None]).expand_as(mask)), name


def test_kept_shares_of_heads_include_the_products():
    model = OneAttention()
    assert kept_shares(model, "unit", unit_masks(model, {"attn": 0.75})) == dict.fromkeys(
        ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.qk", "attn.av"], 0.75)


def test_densities_that_keep_the_same_heads_are_one_cut_of_all_that_is_proportional_to_them():
    [units] = hidden_units(OneAttention())
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.qk", "attn.av")
    layers = sensitivity.unit_layers(units, {*parts, "elsewhere"})
    assert layers == parts
    cuts = sensitivity.unit_cuts({layers: units}, [0.9, 0.2, 0.3, 0.5], 1)
    assert [(cut.layers, cut.density) for cut in cuts] == [(parts, 0.25), (parts, 0.5)]
