"""Grains and their masks, on examples worked by hand and as properties of any weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.core.sparsity import GRAINS, TILE, grain_mask, grain_shape, nm_mask, stored_bits

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


def kept_at(places, count):
    mask = torch.zeros(1, count, dtype=torch.bool)
    mask[0, list(places)] = True
    return mask


@pytest.mark.parametrize(("places", "entries"), [
    ([0, 1, 2], 3),
    ([15], 1),           # 15 went before it, which four bits can say
    ([16], 2),           # 16 did: 15, a zero, then none
    ([31], 2), ([32], 3),
    ([0, 16, 33], 4),    # 15 between the first two, 16 between the last two
    ([0], 1)])           # what went after the last one needs no word
def test_by_hand_a_relative_index_of_four_bits_is_padded(places, entries):
    assert stored_bits(kept_at(places, 40), "fine", 8) == entries * (8 + 4)


def test_by_hand_a_grain_shares_its_index():
    assert stored_bits(torch.ones(2, 16, dtype=torch.bool), "vector", 8) == 4 * (8 * 8 + 4)
    assert stored_bits(torch.ones(2, 3, 3, 3, dtype=torch.bool), "vector", 8) == 18 * (3 * 8 + 4)
    assert stored_bits(torch.ones(2, 3, 3, 3, dtype=torch.bool), "kernel", 8) == 6 * (9 * 8 + 4)
    assert stored_bits(torch.ones(2, 3, 3, 3, dtype=torch.bool), "filter", 8) == 2 * (27 * 8 + 4)
    late = torch.zeros(18, 2, 1, 3, dtype=torch.bool)
    late[17] = True  # 34 kernels went before: two kernels of zeros, then it and its neighbour
    assert stored_bits(late, "vector", 4) == 4 * (3 * 4 + 4)


@pytest.mark.parametrize(("grain", "share"), [("2:4", 0.625), ("1:4", 0.3125), ("4:8", 0.6875), ("1:1", 1.0)])
def test_by_hand_a_pattern_stores_the_place_in_its_group(grain, share):
    """2:4 at 8 bits: half the weights at 10 bits each."""
    mask = grain_mask(torch.rand(4, 16), grain)
    assert stored_bits(mask, grain, 8) == share * 4 * 16 * 8


def test_units_need_no_index():
    mask = torch.tensor([[True, False, True, False]] * 3)
    assert stored_bits(mask, "unit", 8) == 6 * 8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=200))
def test_the_relative_index_can_be_read_back(flags):
    """Against a decoder: walking the entries as a reader would must land on every kept weight."""
    entries, since = 0, 0
    for kept in flags:
        if kept or since == 15:
            entries, since = entries + 1, 0
        else:
            since += 1
    trailing = len(flags) - 1 - max((i for i, kept in enumerate(flags) if kept), default=-1)
    entries -= trailing // 16  # zeros stored after the last kept weight, which nobody needs
    assert stored_bits(torch.tensor([flags]), "fine", 8) == entries * 12
