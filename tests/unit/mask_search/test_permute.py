"""Orders by hand and against all orders there are; the function of a permuted model in float64."""

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.denoiser import Denoiser, build
from tasks.core.sparsity import nm_mask
from tasks.mask_search.permute import freedom, permute_model, permute_units, permuted_order, retained
from tasks.runtime.masks import hidden_units

SCHEDULE = {"num_train_timesteps": 50}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 2,
       "sample_size": 8, "patch_size": 4, "num_embeds_ada_norm": 3, "norm_type": "ada_norm_zero",
       "norm_elementwise_affine": False, "attention_bias": True}
UNET = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": [8, 16],
        "norm_num_groups": 2, "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
MODELS = {"dit": ("DiTTransformer2DModel", DIT | {"activation_fn": "gelu-approximate"}),
          "dit gated": ("DiTTransformer2DModel", DIT | {"activation_fn": "geglu"}),
          "unet": ("UNet2DModel", UNET),
          "unet of small groups": ("UNet2DModel", UNET | {"norm_num_groups": 4}),
          "unet scale and shift": ("UNet2DModel", UNET | {"resnet_time_scale_shift": "scale_shift"})}


def tiny(name: str) -> Denoiser:
    """In float64, every parameter random: norms and biases too, or a slip there would not show."""
    denoiser = build(*MODELS[name], SCHEDULE)
    rng = torch.Generator().manual_seed(0)
    for parameter in denoiser.model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=rng)
    denoiser.model.double().eval().requires_grad_(False)
    return denoiser


def predict(denoiser: Denoiser) -> torch.Tensor:
    rng = torch.Generator().manual_seed(1)
    x = torch.randn((3, *denoiser.sample_shape), generator=rng, dtype=torch.float64)
    with torch.inference_mode():
        return denoiser(x, torch.tensor([0, 20, 49]), torch.tensor([0, 1, 2]) if denoiser.num_classes else None)


def shuffled(units, rng: torch.Generator) -> torch.Tensor:
    """Any order that keeps heads and groups: they trade places, but for heads, and so do units inside them."""
    count = units.count // units.granule
    outer = torch.arange(count) if units.products else torch.randperm(count, generator=rng)
    return torch.cat([units.granule * i + torch.randperm(units.granule, generator=rng) for i in outer.tolist()])


def test_large_columns_that_compete_are_parted():
    """1:2 over two rows: the large weights sit together, apart they all stay."""
    saliency = torch.tensor([[9.0, 8.0, 1.0, 0.0], [7.0, 6.0, 0.0, 1.0]])
    assert retained(saliency, 1, 2) == 9 + 1 + 7 + 1
    order = permuted_order(saliency, 1, 2, 4)
    assert retained(saliency[:, order], 1, 2) == 9 + 8 + 7 + 6
    assert permuted_order(saliency, 1, 2, 2).tolist() == [0, 1, 2, 3]  # nothing to gain inside a pool of one group


def test_columns_that_move_as_one():
    """2:4, columns in pairs: the pairs of large ones are parted, no pair is."""
    saliency = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 0.0, 0.0, 1.0]])
    order = permuted_order(saliency, 2, 4, 8, together=2)
    assert retained(saliency[:, order], 2, 4) == 9 + 8 + 7 + 6
    assert (order.view(4, 2)[:, 1] == order.view(4, 2)[:, 0] + 1).all() and (order.view(4, 2)[:, 0] % 2 == 0).all()


@settings(max_examples=80, deadline=None)
@given(st.sampled_from([(1, 2, 8, 1), (2, 4, 8, 1), (1, 4, 12, 1), (2, 4, 16, 1), (3, 4, 8, 1), (4, 4, 8, 1), (2, 4, 16, 2),
                        (3, 8, 24, 2), (4, 8, 16, 4)]), st.sampled_from([1, 2]), st.integers(1, 6), st.integers(0, 10**6))
def test_what_is_retained_never_falls_and_no_single_swap_is_left_that_gains(pattern, pools, rows, seed):
    n, m, count, together = pattern
    saliency = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    given, pool = saliency.clone(), count // pools
    order = permuted_order(saliency, n, m, pool, together)
    assert torch.equal(saliency, given)
    assert order.sort()[0].tolist() == list(range(count))
    assert torch.equal(order // pool, torch.arange(count) // pool)
    reached = retained(saliency[:, order], n, m)
    assert reached >= retained(saliency, n, m) - 1e-9
    parts = order.view(-1, together)
    for i in range(len(parts)):
        for j in range(i + 1, len(parts)):
            if i * together // pool == j * together // pool:
                other = parts.clone()
                other[[i, j]] = parts[[j, i]]
                assert retained(saliency[:, other.flatten()], n, m) <= reached + 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan"), float("inf")])
def test_what_leaves_nothing_to_gain_ends(value):
    assert permuted_order(torch.full((2, 8), value), 2, 4, 8).tolist() == list(range(8))


def test_close_to_the_best_of_all_orders():
    """2:4 over eight columns: 35 ways to part them into two groups, all tried."""
    ways = [[0, *way, *(set(range(1, 8)) - set(way))] for way in combinations(range(1, 8), 3)]
    gained = possible = 0.0
    for seed in range(20):
        saliency = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)).abs()
        start, best = retained(saliency, 2, 4), max(retained(saliency[:, way], 2, 4) for way in ways)
        reached = retained(saliency[:, permuted_order(saliency, 2, 4, 8)], 2, 4)
        assert reached <= best + 1e-5
        gained, possible = gained + reached - start, possible + best - start
    assert len(ways) == 35 and gained > 0.9 * possible


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_order_leaves_the_function(name, seed):
    denoiser = tiny(name)
    before, weights = predict(denoiser), copy.deepcopy(denoiser.model.state_dict())
    rng = torch.Generator().manual_seed(seed)
    for units in hidden_units(denoiser.model):
        order, name = shuffled(units, rng), f"{units.consumer}.weight"
        permute_units(denoiser.model, units, order)
        stays = torch.equal(order, torch.arange(len(order)))  # a few units may well be drawn in the order that they are in
        assert torch.equal(denoiser.model.get_parameter(name), weights[name]) == stays
    torch.testing.assert_close(predict(denoiser), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_permuted_model_is_the_same_and_its_masks_keep_more(name):
    denoiser = tiny(name)
    layers, before = denoiser.prunable_layers(), predict(denoiser)
    saliencies = {path: layer.weight.abs().clone() for path, layer in layers.items()}
    orders = permute_model(denoiser.model, 2, 4, saliencies)
    torch.testing.assert_close(predict(denoiser), before, rtol=1e-10, atol=1e-10)
    blocks = {units.block: units for units in hidden_units(denoiser.model)}
    movable = {name for name, units in blocks.items() if freedom(units, 4)[0] > 4}
    assert orders.keys() <= movable
    assert all(blocks[name].count == 8 for name in movable - orders.keys())  # three ways to pair four groups: none may gain
    for block, order in orders.items():
        consumer = blocks[block].consumer
        weight = layers[consumer].weight
        assert torch.equal(weight.abs(), saliencies[consumer][:, order])
        assert weight[nm_mask(weight, 2, 4)].abs().sum().item() == pytest.approx(retained(weight.abs(), 2, 4))
        assert retained(weight.abs(), 2, 4) > retained(saliencies[consumer], 2, 4)


def test_of_an_attention_the_values_move_alone():
    model = tiny("dit").model
    weights = copy.deepcopy(model.state_dict())
    units = next(units for units in hidden_units(model) if units.products)
    permute_units(model, units, torch.tensor([1, 0, *range(2, 16)]))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, weights[name])}
    assert changed == {f"{units.block}.{part}" for part in ("to_v.weight", "to_v.bias", "to_out.0.weight")}


def test_only_layers_with_a_saliency_that_fit_are_permuted():
    model = tiny("dit").model
    assert permute_model(model, 2, 4, {}) == {}
    weight = model.get_parameter("transformer_blocks.0.ff.net.2.weight")
    assert permute_model(model, 2, 5, {"transformer_blocks.0.ff.net.2": weight.abs()}) == {}
    assert permute_model(model, 2, 4, {"transformer_blocks.0.ff.net.2": weight.abs()}).keys() == {"transformer_blocks.0.ff"}


def test_wrong_orders_are_named():
    model = tiny("dit").model
    units = next(units for units in hidden_units(model) if units.products)
    with pytest.raises(ValueError, match=r"order of transformer_blocks.0.attn1: not a permutation of 0..15"):
        permute_units(model, units, torch.zeros(16, dtype=torch.int64))
    with pytest.raises(ValueError, match="units leave their head or group of 8"):
        permute_units(model, units, torch.arange(16).flip(0))
    with pytest.raises(ValueError, match="permutation of 6 columns for 2:4: 6 is no multiple of 4"):
        permuted_order(torch.ones(2, 6), 2, 4, 6)
    norm2 = next(units for units in hidden_units(tiny("unet of small groups").model) if units.granule == 2)
    with pytest.raises(ValueError, match="units leave their head or group of 2"):
        permute_units(model, norm2, torch.arange(8).roll(1))
