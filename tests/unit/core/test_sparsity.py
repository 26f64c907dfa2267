"""Grains and their masks, on examples worked by hand and as properties of any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.sparsity import GRAINS, TILE, grain_mask, grain_shape, nm_mask

LINEAR, CONV, POINTWISE = (16, 24), (6, 5, 3, 3), (16, 8, 1, 1)


@pytest.mark.parametrize(("shape", "grain", "extent"), [
    (LINEAR, "fine", (1, 1)), (LINEAR, "vector", (1, 8)), (LINEAR, "kernel", (8, 8)), (LINEAR, "filter", (1, 24)),
    (CONV, "fine", (1, 1, 1, 1)), (CONV, "vector", (1, 1, 1, 3)), (CONV, "kernel", (1, 1, 3, 3)),
    (CONV, "filter", (1, 5, 3, 3)),
    (POINTWISE, "vector", (1, 8, 1, 1)), (POINTWISE, "kernel", (8, 8, 1, 1)), (POINTWISE, "filter", (1, 8, 1, 1))])
def test_what_one_grain_is(shape, grain, extent):
    assert grain_shape(shape, grain) == extent


def test_by_hand_a_convolution_keeps_the_rows_and_kernels_of_the_largest_sums():
    weight = torch.tensor([[[[1.0, -1.0], [5.0, 0.0]], [[2.0, 2.0], [0.0, -3.5]]]])  # rows 2, 5, 4, 3.5; kernels 7, 7.5
    rows = grain_mask(weight.abs(), "vector", 0.5)
    assert rows.tolist() == [[[[False, False], [True, True]], [[True, True], [False, False]]]]
    kernels = grain_mask(weight.abs(), "kernel", 0.5)
    assert kernels.tolist() == [[[[False] * 2] * 2, [[True] * 2] * 2]]


def test_by_hand_a_linear_keeps_the_row_of_the_largest_sum():
    weight = torch.tensor([[9.0, 0.0], [4.0, 4.0], [5.0, 5.0]])
    assert grain_mask(weight, "filter", 1 / 3).tolist() == [[False] * 2] * 2 + [[True] * 2]


def test_ties_go_to_the_earlier_grain_and_one_always_stays():
    assert grain_mask(torch.ones(1, 4), "fine", 0.5).tolist() == [[True, True, False, False]]
    assert grain_mask(torch.ones(2, 2), "filter", 0.01).sum() == 2


@pytest.mark.parametrize(("grain", "density", "message"), [
    ("vector", 0.5, r"grain vector does not divide a weight of shape \(4, 6\): 6 by 8"),
    ("rows", 0.5, "grain 'rows' is none of"),
    ("fine", 0.0, r"density of fine: 0.0 is not in \(0, 1\]"), ("fine", None, "density of fine: None")])
def test_what_cannot_be_is_said_in_one_line(grain, density, message):
    with pytest.raises(ValueError, match=message):
        grain_mask(torch.ones(4, 6), grain, density)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GRAINS), st.sampled_from([LINEAR, CONV, POINTWISE]), st.floats(0.01, 1.0), st.integers(0, 10**6))
def test_any_mask_has_its_density_keeps_whole_grains_and_is_its_own_mask(grain, shape, density, seed):
    saliency = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    mask = grain_mask(saliency, grain, density)
    grains = saliency.numel() // torch.tensor(grain_shape(shape, grain)).prod().item()
    assert mask.shape == saliency.shape and mask.dtype == torch.bool
    assert mask.float().mean().item() == pytest.approx(max(1, round(density * grains)) / grains)
    assert torch.equal(grain_mask(saliency * mask, grain, density), mask)
    assert torch.equal(grain_mask(mask.float(), grain, mask.float().mean().item()), mask)  # nothing but whole grains


@pytest.mark.parametrize("grain", ["2:4", "1:4", "4:8", "2:8"])
def test_a_pattern_is_a_grain_like_any_other(grain):
    n, m = map(int, grain.split(":"))
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    mask = grain_mask(weight.abs(), grain)
    assert torch.equal(mask, nm_mask(weight, n, m))
    assert mask.view(-1, m).sum(1).unique().tolist() == [n]


def test_a_tile_is_a_known_number_of_weights():
    assert grain_mask(torch.rand(2 * TILE, 3 * TILE), "kernel", 1 / 6).sum() == TILE * TILE
